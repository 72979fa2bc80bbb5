"""Fused experts of every kind that transformers has: quantized in place, while loading, saved and reloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from moe_models import FAMILIES, build
from torch import Tensor, nn

import isqtorch
from isqtorch import get_format, quantize_
from isqtorch.modules import QuantExperts
from isqtorch.modules.convert import experts_to_float

IDS = torch.arange(12)[None]
families = pytest.mark.parametrize("family", FAMILIES)


def output(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS)[0]


def packed(model: nn.Module) -> dict[str, QuantExperts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantExperts)}


def same_state(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name


@families
def test_experts_are_packed_and_nothing_else_changes(family: str) -> None:
    """Footprint, error of each module for the inputs it gets in the model, routers; and back."""
    model = build(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls: dict[str, tuple[tuple[Any, ...], Tensor]] = {}
    report = isqtorch.plan(model, "q8_0", organization="moqe")
    names = {layer.name for layer in report.quantized}
    owners = {name if name in dict(model.named_modules()) else name.rpartition(".")[0] for name in names}
    handles = []
    for name in owners:

        def note(_module: nn.Module, args: tuple[Any, ...], y: Tensor, name: str = name) -> None:
            calls.setdefault(name, (args, y))

        handles.append(model.get_submodule(name).register_forward_hook(note))
    output(model)
    assert calls.keys() == owners
    for handle in handles:
        handle.remove()

    done = quantize_(model, "q8_0", organization="moqe")
    assert {layer.name for layer in done.quantized} == names and done.bytes_after == report.bytes_after
    assert packed(model).keys() == owners
    bits = get_format("q8_0").bits_per_weight
    for name, module in packed(model).items():
        stacks = [getattr(module, leaf) for leaf in module.packed]
        weights = sum(before[name + "." + leaf].numel() for leaf in module.packed)
        assert abs(sum(stack.nbytes for stack in stacks) / (2 * weights) / (bits / 16) - 1) < 0.03
        args, y = calls[name]
        with torch.no_grad():
            error = float((module(*args) - y).float().norm() / y.float().norm())
        assert error < 0.02, name
        for leaf, parameter in experts_to_float(module)._parameters.items():
            if parameter is not None:
                want = before[f"{name}.{leaf}"].float()
                assert parameter.shape == want.shape and float((parameter - want).norm()) < 0.01 * float(want.norm())
    for name, tensor in model.state_dict().items():
        if tensor.dtype != torch.uint8:
            assert torch.equal(tensor, before[name]), name
    isqtorch.dequantize_(model)
    assert not packed(model) and {n: t.shape for n, t in model.state_dict().items()} == {
        n: t.shape for n, t in before.items()
    }
    assert output(model).isfinite().all()


@families
def test_loading_quantizes_alike_and_saved_models_reload(family: str, tmp_path: Path) -> None:
    """Immediate and deferred agree bit for bit, and so do both layouts on the disk."""
    model = build(family)
    cls = type(model)
    model.save_pretrained(tmp_path / "float")
    deferred = cls.from_pretrained(tmp_path / "float", dtype=torch.bfloat16)
    quantize_(deferred, "q4_0")
    config = isqtorch.IsqConfig("q4_0")
    loaded, info = cls.from_pretrained(
        tmp_path / "float", dtype=torch.bfloat16, quantization_config=config, output_loading_info=True
    )
    assert not any(info.values()), info
    assert packed(loaded).keys() == packed(deferred).keys() != set()
    assert torch.equal(output(loaded), output(deferred))
    same_state(loaded, deferred)
    assert [(r.name, r.stored) for r in loaded.isq_report.layers] == [
        (r.name, r.stored) for r in deferred.isq_report.layers
    ]
    for original in (True, False):
        folder = tmp_path / f"packed{original}"
        loaded.save_pretrained(folder, save_original_format=original)
        again, info = cls.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
        assert not any(info.values()), info
        assert torch.equal(output(again), output(loaded))
        same_state(again, loaded)
        if original:
            again.save_pretrained(tmp_path / "twice")
            assert torch.equal(output(cls.from_pretrained(tmp_path / "twice", dtype=torch.bfloat16)), output(loaded))


def test_shared_experts_of_inkling_are_packed_and_are_not_routed() -> None:
    model = build("inkling").float()
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any], Tensor]] = {}
    owners = [name for name, _ in model.named_modules() if name.endswith("shared_experts")]
    for name in owners:

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor, name: str = name) -> None:
            calls[name] = (args, kwargs, y)

        model.get_submodule(name).register_forward_hook(note, with_kwargs=True)
    output(model)
    routed = isqtorch.plan(model, "q8_0", organization="moqe")
    assert not any("shared_experts" in layer.name for layer in routed.quantized)
    report = quantize_(model, "q8_0")
    for name in owners:
        module = model.get_submodule(name)
        assert isinstance(module, QuantExperts) and set(module.formats) == {"gate_proj", "up_proj", "down_proj"}
        args, kwargs, want = calls[name]
        with torch.no_grad():
            got = module(*args, **kwargs)
        assert got.shape == want.shape and 0 < float((got - want).norm() / want.norm()) < 0.02
    shared = [layer for layer in report.quantized if "shared_experts" in layer.name]
    assert len(owners) == 2 and len(shared) == 6 and {layer.kind for layer in shared} == {"experts"}


def test_experts_of_older_versions_lack_a_flag() -> None:
    """Before 5.23, transformers does not set it; vLLM still brings such a version."""
    model, other = build("qwen3_moe"), build("qwen3_moe")
    other.load_state_dict(model.state_dict())
    for module in other.modules():
        vars(module).pop("has_post_expert_norm", None)
    for each in (model, other):
        quantize_(each, "q8_0")
    assert packed(model) and packed(model).keys() == packed(other).keys()
    assert torch.equal(output(model), output(other))
