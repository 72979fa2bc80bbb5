"""Experts are packed as they are read: what that takes, what goes wrong, and what two processes make of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from moe_models import build
from safetensors.torch import load_file, save_file
from synthetic import write_moe
from torch import Tensor
from two_processes import run_two

from isqtorch import IsqConfig, get_format, ops
from isqtorch.integrations.transformers.experts import pack_matrices
from isqtorch.modules import QuantExperts

HERE = Path(__file__).resolve().parent
SMALL = 32 << 20  # code and tables of a first load, the module of the model among them


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    build("qwen3_moe").save_pretrained(tmp_path)
    return tmp_path


def load(folder: Path, config: IsqConfig | None) -> Any:
    from transformers import AutoModelForCausalLM

    options = {} if config is None else {"quantization_config": config}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)


def rewrite(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def test_the_importance_is_that_of_the_experts_in_the_file() -> None:
    """A rank that gets a part of a stack cannot know which experts these are."""
    job: Any = SimpleNamespace(fmt=get_format("q8_0"), importance=torch.ones(3, 64))
    matrices = [lambda: torch.ones(4, 64)] * 2
    with pytest.raises(ValueError, match="the checkpoint has 2 experts, and their importance is that of 3"):
        pack_matrices([matrices], (2, 4, 68), job, lambda matrix, expert: None)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_of_quantizing_experts(tmp_path: Path) -> None:
    """The packed model and one expert, never the float experts of a layer, which are half of this model."""
    assert write_moe(tmp_path / "float", 2) > 150e6

    def run(folder: Path, *options: str) -> dict[str, Any]:
        command = [sys.executable, str(HERE / "load_memory.py"), str(folder), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    taken = run(tmp_path / "float", "q8_0")
    assert taken["size"] < 0.55 * 160e6
    assert taken["peak"] < 1.1 * taken["size"] + SMALL, taken


def test_importance_is_that_of_each_expert(qwen: Path) -> None:
    stacks = build("qwen3_moe").model.layers[1].mlp.experts
    vectors = torch.rand(8, 128) + 0.01
    name = "model.layers.1.mlp.experts.gate_up_proj"
    model = load(qwen, IsqConfig("q4_0", imatrix={name: vectors}))
    want = ops.quantize(stacks.gate_up_proj.detach(), "q4_0", vectors)
    assert torch.equal(model.get_parameter(name), want)


def test_topology_and_moqe(qwen: Path) -> None:
    model = load(qwen, IsqConfig("q4_0", organization="moqe", topology={"/layers.0.*down_proj/": "q8_0"}))
    packed = {name: module for name, module in model.named_modules() if isinstance(module, QuantExperts)}
    assert [m.formats["down_proj"] for m in packed.values()] == ["q8_0", "q4_0"]
    assert {layer.kind for layer in model.isq_report.quantized} == {"experts"}
    model.save_pretrained(qwen / "packed")
    assert load(qwen / "packed", None).model.layers[0].mlp.experts.formats == {
        "gate_up_proj": "q4_0",
        "down_proj": "q8_0",
    }


def poison(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.mlp.experts.5.up_proj.weight"][3, 7] = float("nan")


def lose(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.0.mlp.experts.7.down_proj.weight"]


def widen(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.mlp.experts.7.gate_proj.weight"] = torch.ones(64, 160, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (poison, r"layers.1.mlp.experts.gate_up_proj: expert 5: weight\[3, 7\] is nan"),
        (lose, r"layers.0.mlp.experts.down_proj: the checkpoint has 7 experts where the model has 8"),
        (widen, r"layers.0.mlp.experts.gate_up_proj: expert 7 is \[64, 160\] in the checkpoint; it does not fit"),
    ],
    ids=["nan", "missing", "wrong width"],
)
def test_damaged_experts_are_named(qwen: Path, change: Any, message: str) -> None:
    rewrite(qwen, change)
    with pytest.raises(ValueError, match=message):
        load(qwen, IsqConfig("q8_0"))


def test_a_config_that_packs_half_of_them_is_refused(qwen: Path) -> None:
    model = load(qwen, IsqConfig("q8_0"))
    model.save_pretrained(qwen / "packed")
    config = json.loads((qwen / "packed/config.json").read_text())
    del config["quantization_config"]["layers"]["model.layers.1.mlp.experts.down_proj"]
    (qwen / "packed/config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match="gate_up_proj of model.layers.1.mlp.experts are packed and its other experts are not"
    ):
        load(qwen / "packed", None)


@pytest.mark.slow  # three processes import transformers
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_expert_parallel(family: str, tmp_path: Path) -> None:
    """Each of two processes packs the experts it has; together they compute, and save, what one does."""
    build(family).save_pretrained(tmp_path / "float")
    one = load(tmp_path / "float", IsqConfig("q8_0", organization="moqe"))
    one.save_pretrained(tmp_path / "one")
    with torch.no_grad():
        want = one(torch.arange(12)[None]).logits
    run_two(HERE / "expert_parallel.py", str(tmp_path), timeout=600)
    got = torch.load(tmp_path / "logits.pt")
    assert float((got - want).float().norm() / want.float().norm()) < 0.02
    again = load(tmp_path / "two", None)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_an_expert_of_small_weights_is_said_while_loading(qwen: Path) -> None:
    names: list[str] = []

    def shrink(tensors: dict[str, Tensor]) -> None:
        names.extend(name for name in tensors if "experts.1.up_proj" in name)
        tensors[names[0]] *= 1e-5

    rewrite(qwen, shrink)
    with pytest.warns(UserWarning, match="1 layer lost much more than usual: .*experts"):
        model = load(qwen, IsqConfig("q8_0"))
    [layer] = model.isq_report.damaged
    assert "in expert 1: error" in layer.reason
