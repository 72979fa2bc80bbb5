"""What loading takes: quantizing peaks at the packed model and a little more, and a packed model is mapped, not read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import write_llama

HERE = Path(__file__).resolve().parent
WEIGHT = 2048 * 8192 * 2  # bytes of the largest in the source: it is in memory while it is packed
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
    assert taken["peak_anonymous"] < 1.05 * taken["size"] + (4 << 20), taken
    assert taken["peak"] < 1.1 * taken["size"] + WEIGHT + (8 << 20), taken  # 320 MB where pages are not dropped
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


@pytest.mark.parametrize(("fmt", "rows"), [("q4k", 3), ("q4k", 3000), ("q8_0", 900), ("fp8", 2000), ("afq4", 1111)])
def test_the_sample_of_a_mapped_weight_is_read_from_its_file(tmp_path: Path, fmt: str, rows: int) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    from isqtorch import get_format
    from isqtorch.integrations.transformers.mapped import MappedFiles
    from isqtorch.modules.plausible import _sample, weight_fault

    format, path = get_format(fmt), tmp_path / "model.safetensors"
    before = torch.zeros(7, dtype=torch.uint8)
    weight = torch.ops.isqtorch.quantize(torch.randn(rows, 1024), fmt, None, None)
    save_file({"a": before, "b": weight}, path)
    with safe_open(path, "pt", backend="mmap") as file:
        view = file.get_tensor("b")
    with closing(MappedFiles([str(path)])) as files:
        assert files.place(weight) is None and files.place(view[:, ::2]) is None
        place = files.place(view)
        assert place is not None and place.path == str(path)
        assert torch.equal(_sample(view, format, place), _sample(weight, format, None))
        tail, place_of_tail = view[rows // 2 :], files.place(view[rows // 2 :])
        assert torch.equal(_sample(tail, format, place_of_tail), _sample(tail.clone(), format, None))
        assert weight_fault(view, format, place) is None
        os.truncate(path, 300)  # to read the memory would end the process now
        with pytest.raises(OSError, match=r"model\.safetensors: became shorter while it was read"):
            weight_fault(view, format, place)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(place.descriptor)


def test_a_file_that_was_replaced_is_not_read_for_the_one_that_is_mapped(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    from isqtorch.integrations.transformers.mapped import MappedFiles

    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(5000, dtype=torch.uint8)}, path)
    save_file({"a": torch.zeros(5000, dtype=torch.uint8)}, tmp_path / "other")
    with safe_open(path, "pt", backend="mmap") as file:
        view = file.get_tensor("a")
    with closing(MappedFiles([str(path)])) as files:
        assert files.holds(view)
        os.replace(tmp_path / "other", path)
        assert files.place(view) is None and bool(view.all())
