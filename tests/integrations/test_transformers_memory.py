"""What loading takes: quantizing peaks at the packed model and a little more, and a packed model is mapped, not read."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import write_llama

HERE = Path(__file__).resolve().parent
SMALL = 24 << 20  # code and tables of a first load, which have nothing to do with the model's size

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """201 MB in bf16, in three files."""
    folder = tmp_path_factory.mktemp("llama")
    assert write_llama(folder, 1, "90MB") > 200e6
    assert len(list(folder.glob("*.safetensors"))) > 2
    yield folder
    for path in folder.glob("*.safetensors"):
        path.unlink()


def loaded(folder: Path, fmt: str = "", save_to: Path | str = "") -> dict[str, Any]:
    command = [sys.executable, str(HERE / "load_memory.py"), str(folder), fmt, str(save_to)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_peak_of_quantizing_and_of_loading_again(folder: Path, tmp_path: Path) -> None:
    taken = loaded(folder, "q8_0", tmp_path)
    assert taken["peak"] < 1.1 * taken["size"] + 2048 * 8192 * 2 + SMALL, taken  # one weight of the source is in memory
    again = loaded(tmp_path)
    assert again["size"] == taken["size"]
    assert again["peak_anonymous"] < 0.05 * again["size"] + (2 << 20), again
    assert again["peak"] < 0.05 * again["size"] + SMALL, again
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()


def test_nothing_stays_mapped_and_nothing_written_is_lost(folder: Path) -> None:
    """Weights left in float are copies: the files are free, and pages are dropped only where nobody has written."""
    from hf import load

    from isqtorch import IsqConfig

    other = load(folder)  # all its weights are views of the same files
    norm, head = other.model.norm.weight, other.lm_head.weight
    with torch.no_grad():
        head[5] = 7.0
        norm[3] = 7.0
    before = mapped(folder)
    assert before > 0
    model = load(folder, quantization_config=IsqConfig("q8_0", include="mlp"))
    assert mapped(folder) == before
    assert float(head[5].detach().min()) == float(norm[3].detach()) == 7.0
    assert (
        float(model.model.norm.weight[3].detach()) == 1.0 and float(model.lm_head.weight[5].detach().abs().max()) < 0.1
    )


def mapped(folder: Path) -> int:
    with open("/proc/self/maps", encoding="utf-8") as file:
        return sum(str(folder) in line for line in file)


def test_weights_that_the_caller_passes_are_left_alone(folder: Path) -> None:
    """A state dict may be a view of a file, changed by its owner: its pages must not be dropped."""
    from safetensors import safe_open
    from transformers import AutoConfig, LlamaForCausalLM

    from isqtorch import IsqConfig

    state = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt", backend="mmap") as file:
            state.update({name: file.get_tensor(name) for name in file.keys()})
    with torch.no_grad():
        state["lm_head.weight"][5] = 7.0
    config = AutoConfig.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(
        None, config=config, state_dict=state, quantization_config=IsqConfig("q8_0")
    )
    assert float(state["lm_head.weight"][5].min()) == 7.0
    assert float(model.lm_head.dequantize()[5].float().mean()) == pytest.approx(7.0, rel=0.01)
