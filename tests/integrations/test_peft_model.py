"""Merging adapters into packed layers: the model around them, its ties, copies, hooks, records and memory."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf import load
from models import state_bytes, tiny_llama
from torch import nn

from isqtorch import IsqConfig
from isqtorch.inplace.quantize import quantize_
from isqtorch.modules import QuantLinear

peft = pytest.importorskip("peft", "0.21")

from adapters import IDS, logits, moved, quantized, relative, shake, silent, tuned, with_lora  # noqa: E402

from isqtorch.integrations.peft import merging  # noqa: E402
from isqtorch.integrations.peft.record import record_of  # noqa: E402
from isqtorch.integrations.peft.session import Session  # noqa: E402

pytestmark = pytest.mark.usefixtures("enabled")
TARGETS = ["q_proj", "up_proj"]


def test_config_tells_the_new_formats(llama: Path, tmp_path: Path) -> None:
    model = tuned(load(llama, quantization_config=IsqConfig("q4k")), peft.LoraConfig(r=4, target_modules=TARGETS))
    with merging(merge_format="q8_0"):
        merged = model.merge_and_unload()
    assert merged.isq_report["model.layers.0.mlp.up_proj"].stored == "q8_0"
    assert merged.isq_report["model.layers.0.mlp.down_proj"].stored == "q4k"
    merged.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert state_bytes(again) == state_bytes(merged) and torch.equal(logits(again), logits(merged))


def test_a_tied_table_is_not_changed_with_the_head(checkpoints: Callable[[str], Path]) -> None:
    """As computed unmerged. PEFT adds to the shared float weight, and so to the table as well."""
    model = load(checkpoints("tied"), quantization_config=IsqConfig("q8_0"))
    table = model.model.embed_tokens.weight.clone()
    model = tuned(model, peft.LoraConfig(r=4, target_modules=["lm_head"]))
    want = logits(model)
    with pytest.warns(UserWarning, match="no longer tied"):
        merged = model.merge_and_unload()
    assert torch.equal(merged.model.embed_tokens.weight, table) and relative(logits(merged), want) < 0.03


def test_tied_layers_with_tied_adapters_stay_tied() -> None:
    model = tiny_llama(tied=True, dtype=torch.float32)
    quantize_(model, "q8_0")
    config = peft.LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)
    model = tuned(model, config)
    want = logits(model)
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight and relative(logits(merged), want) < 0.03


def test_tied_layers_are_both_merged_from_the_checkpoint(checkpoints: Callable[[str], Path]) -> None:
    """The checkpoint has the shared weight under one of its names, and both adapters add to it."""
    config = peft.LoraConfig(r=4, target_modules=["embed_tokens", "lm_head", "up_proj"])
    reference = load(checkpoints("tied"))
    reference.lm_head.weight = nn.Parameter(reference.lm_head.weight.detach().clone())
    reference = tuned(reference, config, 0.002)
    model = moved(reference, tuned(load(checkpoints("tied"), quantization_config=IsqConfig("q2k")), config))
    merged, reference = silent(model.merge_and_unload), reference.merge_and_unload()
    for layer, floats in (
        (merged.model.embed_tokens, reference.model.embed_tokens),
        (merged.lm_head, reference.lm_head),
    ):
        packed = torch.ops.isqtorch.quantize(floats.weight.detach(), layer.format)
        assert state_bytes(layer)["weight"] == packed.numpy().tobytes()


@pytest.mark.parametrize("how", ["copy", "pickle", "torch.save"])
def test_copies_merge_by_themselves(how: str) -> None:
    model = with_lora(quantized("q8_0"))
    shake(model)
    before = state_bytes(model)
    for merged in (False, True):
        if merged:
            model.merge_adapter()
        if how == "copy":
            other = copy.deepcopy(model)
        elif how == "pickle":
            other = pickle.loads(pickle.dumps(model))
        else:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
        assert state_bytes(other) == state_bytes(model)
        if merged:
            other.unmerge_adapter()
            assert state_bytes(other) == before != state_bytes(model)
        other.merge_adapter()
        assert (state_bytes(model) == before) is not merged
        model.unmerge_adapter() if merged else None


def test_nothing_of_the_merge_stays_after_it() -> None:
    model = with_lora(quantized("q8_0"))
    shake(model)
    model.merge_adapter()
    merged = model.merge_and_unload()
    assert all(record_of(module) is None for module in merged.modules())


def test_casts_and_modes_while_merged_are_kept() -> None:
    model = with_lora(quantized("q8_0"))
    shake(model)
    packed = state_bytes(model.base_model.model.model.layers[0].mlp.up_proj.base_layer)
    model.merge_adapter()
    model.train().to(torch.bfloat16)
    model.unmerge_adapter()
    layer = model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    assert layer.dtype == torch.bfloat16 and layer.training and state_bytes(layer) == packed
    assert model(IDS).logits.dtype == torch.bfloat16


def test_dequantized_after_the_adapter_was_added() -> None:
    from isqtorch.inplace.dequantize import dequantize_

    model = with_lora(quantized("q8_0"))
    shake(model, 0.02)
    dequantize_(model)
    want = logits(model)
    assert relative(logits(model.merge_and_unload()), want) < 1e-4


def test_a_hook_moves_with_the_layer() -> None:
    model = tiny_llama(layers=1, dtype=torch.float32)
    quantize_(model, "q8_0")
    calls: list[int] = []
    handle = model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
    model = with_lora(model)
    model.merge_adapter()
    logits(model)
    assert len(calls) == 1
    handle.remove()
    logits(model)
    assert len(calls) == 1


def test_layers_are_freed_one_by_one(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge that keeps nothing to unmerge does not hold two packed models at a time."""
    model = tuned(load(llama, quantization_config=IsqConfig("q4k")), peft.LoraConfig(r=4, target_modules="all-linear"))
    old = [weakref.ref(m) for m in model.modules() if isinstance(m, QuantLinear)]
    alive: list[int] = []
    merged = Session.merged

    def count(self: Session, *layers: Any) -> None:
        merged(self, *layers)
        gc.collect()
        alive.append(sum(layer() is not None for layer in old))

    monkeypatch.setattr(Session, "merged", count)
    model.merge_and_unload()
    assert len(old) == 15 and alive == list(range(15, 1, -1))  # all but the head are merged


def test_layers_that_were_packed_after_the_adapter_was_made() -> None:
    model = with_lora(tiny_llama(layers=1, dtype=torch.float32))
    shake(model, 0.02)
    want = logits(model)
    quantize_(model, "q8_0", exclude=["lora_"])
    assert isinstance(model.base_model.model.model.layers[0].mlp.up_proj.base_layer, QuantLinear)
    assert relative(logits(model), want) < 0.03
    model.merge_adapter()
    model.unmerge_adapter()
    assert relative(logits(model.merge_and_unload()), want) < 0.03


def test_in_inference_mode() -> None:
    model = with_lora(quantized("q8_0"))
    shake(model)
    with torch.inference_mode():
        merged = model.merge_and_unload()
    again = with_lora(merged)
    again(IDS, labels=IDS).loss.backward()
    assert any(p.grad is not None for p in again.parameters())


def test_a_hook_of_accelerate_moves_with_the_layer() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = with_lora(quantized("q8_0"))
    shake(model)
    adapted = model.base_model.model.model.layers[0].mlp.up_proj
    original = adapted.base_layer
    hooks.add_hook_to_module(original, hooks.AlignDevicesHook(execution_device="cpu"))
    model.merge_adapter()
    assert adapted.base_layer is not original and adapted.base_layer._hf_hook is not original._hf_hook
    assert adapted.base_layer.forward is not original.forward and logits(model).isfinite().all()
    model.unmerge_adapter()
    assert adapted.base_layer is original


@pytest.mark.parametrize("where", ["meta", "sharded"])
def test_a_layer_that_cannot_be_replaced_is_named(where: str) -> None:
    model = with_lora(quantized("q8_0"))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    if where == "meta":
        layer.to("meta")
        message = "model.layers.0.self_attn.q_proj is on the meta device"
        with pytest.raises(ValueError, match=message):
            model.merge_adapter()
        return
    tensor, mesh = pytest.importorskip("torch.distributed.tensor"), pytest.importorskip("torch.distributed.device_mesh")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        devices = mesh.init_device_mesh("cpu", (1,))
        packed = torch.frombuffer(bytearray(state_bytes(layer)["weight"]), dtype=torch.uint8).view(
            layer.out_features, -1
        )
        sharded = tensor.DTensor.from_local(packed, devices, [tensor.Shard(0)])
        layer._parameters["weight"] = nn.Parameter(sharded, requires_grad=False)
        with pytest.raises(ValueError, match=r"model.layers.0.self_attn.q_proj is sharded \(DTensor\)"):
            model.merge_adapter()
    finally:
        torch.distributed.destroy_process_group()
