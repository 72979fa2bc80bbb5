"""LoRA on quantized models with stock PEFT: training, saving, merging into packed weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import state_bytes, tiny_gpt2, tiny_llama
from torch import nn

from isqtorch.formats import formats, get_format
from isqtorch.inplace.dequantize import dequantize_
from isqtorch.inplace.quantize import quantize_
from isqtorch.inplace.requantize import requantize_
from isqtorch.modules import QuantLinear

pytest.importorskip("transformers")
peft = pytest.importorskip("peft", "0.21")

from adapters import IDS, WRAPPED, logits, quantized, relative, shake, with_lora  # noqa: E402

from isqtorch.integrations import peft as isq_peft  # noqa: E402
from isqtorch.integrations.peft.layers import OnPacked  # noqa: E402

every_format = pytest.mark.parametrize("fmt", formats())


def train(model: Any, steps: int, lr: float = 0.02) -> list[float]:
    """Loss before each step and after the last."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=0.5)
    losses = []
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [*losses, model(IDS, labels=IDS).loss.item()]


# ---- training ------------------------------------------------------------------------------------------------------------


@every_format
def test_a_step_decreases_the_loss(fmt: str) -> None:
    """Stock PEFT: "all-linear" finds the packed layers, and the gradient passes through them."""
    model = with_lora(quantized(fmt))
    packed = {name: p.clone() for name, p in model.named_parameters() if p.dtype == torch.uint8}
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * 7 and all("lora_" in name for name in trainable)  # not the head
    losses = train(model, 2)
    assert losses[2] < losses[1] < losses[0]
    assert all(torch.equal(packed[name], p) for name, p in model.named_parameters() if name in packed)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    plain, saving = with_lora(quantized(layers=2)), quantized(layers=2)
    saving.gradient_checkpointing_enable({"use_reentrant": reentrant})
    saving = with_lora(saving)
    for model in (plain, saving):
        shake(model)
        model.train()
        model(IDS, labels=IDS).loss.backward()
    assert saving.base_model.model.model.gradient_checkpointing
    gradients = dict(saving.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.abs().sum() > 0
            torch.testing.assert_close(gradients[name].grad, parameter.grad)


def test_trainer_accepts_it(tmp_path: Path) -> None:
    """transformers' Trainer refuses quantized models without adapters, and those whose quantizer does not train."""
    transformers = pytest.importorskip("transformers", "5.23")
    pytest.importorskip("accelerate")
    options = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=1
    )
    data = [{"input_ids": row, "labels": row} for row in IDS]
    model = quantized()
    assert model.hf_quantizer.is_trainable
    with pytest.raises(ValueError, match="adapters"):
        transformers.Trainer(model, options, train_dataset=data)
    trainer = transformers.Trainer(with_lora(model), options, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)


def test_bfloat16_and_kbit_training() -> None:
    model = tiny_llama(layers=1)
    quantize_(model, "q8_0")
    model = with_lora(peft.prepare_model_for_kbit_training(model))
    losses = train(model, 2)
    assert losses[2] < losses[0]


def test_adapters_are_saved_and_loaded_bit_for_bit(tmp_path: Path) -> None:
    model = with_lora(quantized())
    shake(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(quantized(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    saved = peft.get_peft_model_state_dict(model)
    loaded = peft.get_peft_model_state_dict(again)
    assert saved.keys() == loaded.keys() and all(torch.equal(saved[k], loaded[k]) for k in saved)
    trainable = peft.PeftModel.from_pretrained(quantized(), tmp_path, is_trainable=True)
    assert (
        train(trainable, 1)[1] < train(trainable, 0)[0] + 1e-6 and trainable.active_peft_config.inference_mode is False
    )


# ---- merging -------------------------------------------------------------------------------------------------------------


@every_format
@pytest.mark.parametrize("safe", [False, True])
def test_merging_without_enable_is_an_error(fmt: str, safe: bool) -> None:
    model = with_lora(quantized(fmt))
    shake(model)
    before = state_bytes(model)
    with pytest.raises(RuntimeError):
        model.merge_and_unload(safe_merge=safe)
    assert state_bytes(model) == before


@every_format
def test_merge_and_unload_packs_again(fmt: str, enabled: None) -> None:
    model = with_lora(quantized(fmt))
    shake(model)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert isinstance(layer, OnPacked)
    want = layer.get_base_layer().dequantize() + layer.get_delta_weight("default")
    merged = model.merge_and_unload()
    up = merged.model.layers[0].mlp.up_proj
    assert type(up) is QuantLinear and up.format == fmt and up.weight.dtype == torch.uint8
    assert torch.equal(up.weight, torch.ops.isqtorch.quantize(want.detach(), fmt))
    assert not up.weight.requires_grad and not any("lora" in name for name in merged.state_dict())


def test_merged_model_computes_what_the_adapters_did(enabled: None, tmp_path: Path) -> None:
    model = with_lora(quantized("q8_0"))
    shake(model, 0.01)
    base, tuned = logits(quantized("q8_0")), logits(model)
    assert relative(tuned, base) > 0.1
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(quantized("q8_0"), tmp_path)
    merged = loaded.merge_and_unload(safe_merge=True)
    assert relative(logits(merged), tuned) < 0.03
    dequantize_(merged)  # and it is an ordinary quantized model
    assert type(merged.model.layers[0].mlp.up_proj) is nn.Linear


def test_unmerge_gives_back_the_bytes(enabled: None) -> None:
    model = with_lora(quantized("q4k"), lora_bias=False)
    shake(model)
    before, unmerged = state_bytes(model), logits(model)
    for _ in range(3):
        model.merge_adapter()
        assert state_bytes(model) != before and relative(logits(model), unmerged) < 0.5
        model.unmerge_adapter()
        assert state_bytes(model) == before and torch.equal(logits(model), unmerged)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(quantized("q4k")))
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


def test_several_adapters_merge_from_the_original(enabled: None) -> None:
    """One after another gives what both at once give: rounding does not accumulate."""
    models = []
    for together in (True, False):
        model = with_lora(quantized("q4_0"))
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["up_proj", "q_proj"]))
        shake(model)
        before = state_bytes(model)
        if together:
            model.merge_adapter(["default", "second"])
        else:
            model.merge_adapter(["default"])
            model.merge_adapter(["second"])
        models.append(state_bytes(model))
        model.unmerge_adapter()
        assert state_bytes(model) == before
    assert models[0] == models[1] != before


def test_bias_of_an_adapter(enabled: None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 64), nn.Linear(64, 32, bias=False))
    quantize_(model, "q8_0")
    x = torch.randn(3, 256)
    tuned = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["0"], lora_bias=True))
    shake(tuned, 0.1)
    before, want = state_bytes(tuned), tuned(x)
    tuned.merge_adapter()
    assert relative(tuned(x), want) < 0.03
    assert relative(tuned.base_model.model[0].base_layer.bias, model[0].bias) > 0.1
    tuned.unmerge_adapter()
    assert state_bytes(tuned) == before
    with pytest.warns(UserWarning, match="has no bias"):
        tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["1"], lora_bias=True))
    with pytest.raises(RuntimeError, match="base layer has no bias"):  # PEFT's own error
        tuned.merge_adapter()


@pytest.mark.parametrize("scale", [None, 8.1])
def test_embeddings(scale: float | None, enabled: None) -> None:
    gemma = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
    torch.manual_seed(0)
    table = nn.Embedding(64, 256) if scale is None else gemma.Gemma3TextScaledWordEmbedding(64, 256, 0, scale)
    model = nn.Sequential(table, nn.Linear(256, 8))
    tuned = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["0"]))
    shake(tuned, 0.2)
    want = tuned(IDS)
    quantize_(model, "q8_0")
    packed = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"]))
    peft.set_peft_model_state_dict(packed, peft.get_peft_model_state_dict(tuned))
    assert isinstance(packed.base_model.model[0], OnPacked)
    assert relative(packed(IDS), want) < 0.02
    merged = packed.merge_and_unload()
    assert merged[0].format == "q8_0" and relative(merged(IDS), want) < 0.02


def test_conv1d(enabled: None) -> None:
    model = tiny_gpt2()
    quantize_(model, "q8_0")
    model = with_lora(model, fan_in_fan_out=True)
    shake(model, 0.02)
    tuned = logits(model)
    merged = model.merge_and_unload()
    assert relative(logits(merged), tuned) < 0.03
    dequantize_(merged)
    assert type(merged.transformer.h[0].attn.c_attn).__name__ == "Conv1D" and relative(logits(merged), tuned) < 0.03


# ---- what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_what_changes_the_float_weight_is_refused(start: str, enabled: None) -> None:
    model = quantized()
    before, trainable = state_bytes(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=f"self_attn.q_proj is packed as q4k, and init_lora_weights='{start}' changes"):
        with_lora(model, init_lora_weights=start)
    assert state_bytes(model) == before and not any(isinstance(m, OnPacked) for m in model.modules())
    assert [p.requires_grad for p in model.parameters()] == trainable


def test_a_refusal_takes_back_what_was_made_before(enabled: None) -> None:
    """The first layer is float and gets its adapter; the second is packed."""
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    quantize_(model, "q4k", include=["1"])
    first, second = model
    config = peft.LoraConfig(target_modules=["0", "1"], init_lora_weights="pissa")
    with pytest.raises(ValueError, match="LoraConfig: 1 is packed as q4k"):
        peft.get_peft_model(model, config)
    assert model[0] is first and model[1] is second and first.weight.requires_grad


def test_broken_adapter_changes_nothing(enabled: None) -> None:
    model = with_lora(quantized())
    shake(model)
    before = state_bytes(model)
    last = model.base_model.model.model.layers[0].self_attn.q_proj
    last.lora_B["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"adapters default give .* a weight that cannot be packed: weight\["):
        last.merge()
    assert not last.merged
    last.lora_B["default"].weight.data[0, 0] = 0
    assert (
        state_bytes(last.base_layer).items()
        <= {
            name.rpartition("base_layer.")[2]: value for name, value in before.items() if "q_proj.base_layer" in name
        }.items()
    )


def test_requantized_while_merged(enabled: None) -> None:
    model = with_lora(quantized("q4k"))
    shake(model)
    model.merge_adapter()
    requantize_(model, "q8_0", source="stored")
    with pytest.raises(ValueError, match="adapters default are merged, but the layer .* was replaced since"):
        model.unmerge_adapter()


def test_enable_is_idempotent_and_leaves_other_layers_alone(enabled: None) -> None:
    once = {(owner, name): getattr(owner, name) for owner, names in WRAPPED.items() for name in names}
    isq_peft.enable()
    assert all(getattr(owner, name) is method for (owner, name), method in once.items())
    model = tiny_llama(layers=1, dtype=torch.float32)
    quantize_(model, "q8_0", include=["up_proj"])
    layers = with_lora(model).base_model.model.model.layers[0]
    assert isinstance(layers.mlp.up_proj, OnPacked) and isinstance(layers.mlp.up_proj, peft.tuners.lora.Linear)
    assert type(layers.mlp.down_proj) is peft.tuners.lora.Linear


def test_no_format_has_rows_of_as_many_bytes_as_weights() -> None:
    """Or stock PEFT's merge might add to the bytes instead of failing."""
    assert all(get_format(name).block_bytes != get_format(name).block for name in formats(variants=True))
