"""Merging adapters into packed layers from the checkpoint, and the model around the merged layers."""

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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from isqtorch import IsqConfig
from isqtorch.inplace.quantize import quantize_
from isqtorch.inplace.requantize import requantize_
from isqtorch.modules import QuantLinear

peft = pytest.importorskip("peft", "0.21")

from adapters import IDS, logits, quantized, relative, shake, silent, tuned, warned, with_lora  # noqa: E402

from isqtorch.integrations.peft import merging  # noqa: E402
from isqtorch.integrations.peft.record import record_of  # noqa: E402
from isqtorch.integrations.peft.session import Session  # noqa: E402

pytestmark = pytest.mark.usefixtures("enabled")
TARGETS = ["q_proj", "up_proj"]


# ---- from the checkpoint -------------------------------------------------------------------------------------------------

CONFIGS = {
    "lora": peft.LoraConfig(r=4, target_modules="all-linear"),
    "rslora": peft.LoraConfig(r=4, use_rslora=True, target_modules=TARGETS),
    "embedding": peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]),
    "head": peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "ia3": peft.IA3Config(target_modules=TARGETS, feedforward_modules=["up_proj"]),
    "oft": peft.OFTConfig(oft_block_size=8, target_modules=TARGETS),
    "vera": peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "road": peft.RoadConfig(target_modules=TARGETS),
}


def moved(source: Any, target: Any) -> Any:
    """`target` with the adapters of `source`. PEFT rounds new ones to the type of a float layer, so they would differ."""
    values = {**dict(source.named_parameters()), **dict(source.named_buffers())}
    for name, own in [*target.named_parameters(), *target.named_buffers()]:
        if own.is_floating_point():
            own.data.copy_(values[name].data)
            values[name].data = values[name].data.to(own.dtype)
    return target


def both(llama: Path, made: Callable[[Any], Any], fmt: str = "q4k") -> tuple[Any, Any]:
    """A float model and a packed one, which was loaded from the same checkpoint, with the same adapters."""
    reference = made(load(llama))
    return reference, moved(reference, made(load(llama, quantization_config=IsqConfig(fmt))))


@pytest.mark.parametrize("safe", [False, True], ids=["", "safe"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_it_is_the_merged_float_model_quantized(kind: str, safe: bool, llama: Path) -> None:
    """Bit for bit, in bfloat16, with the bytes that `quantize_` makes of the float model with the adapter."""
    reference, packed = both(llama, lambda model: tuned(model, CONFIGS[kind]))
    merged = silent(lambda: packed.merge_and_unload(safe_merge=safe))
    reference = reference.merge_and_unload(safe_merge=safe)
    quantize_(reference, "q4k")
    assert state_bytes(merged) == state_bytes(reference)


@pytest.mark.parametrize("fmt", ["q2k", "q3k", "q8_0", "afq4", "hqq4", "fp8"])
@pytest.mark.parametrize("name", ["llama", "tied", "gpt2"])
def test_in_every_family(fmt: str, name: str, checkpoints: Callable[[str], Path]) -> None:
    config = peft.LoraConfig(r=4, target_modules="all-linear", fan_in_fan_out=name == "gpt2")
    reference = tuned(load(checkpoints(name)), config)
    model = load(checkpoints(name))
    quantize_(model, fmt)
    merged = silent(moved(reference, tuned(model, config)).merge_and_unload)
    reference = reference.merge_and_unload()
    quantize_(reference, fmt)
    assert state_bytes(merged) == state_bytes(reference)


@pytest.mark.parametrize(("fmt", "rule"), [("afq4", "search"), ("afq4", "mlx"), ("hqq4", "search")])
def test_the_rule_is_that_of_the_layer(fmt: str, rule: Any, llama: Path) -> None:
    """No record of it exists: a few packed rows tell."""
    reference, model = tuned(load(llama), CONFIGS["lora"]), load(llama)
    quantize_(model, fmt, rule=rule)
    merged = silent(moved(reference, tuned(model, CONFIGS["lora"])).merge_and_unload)
    reference = reference.merge_and_unload()
    quantize_(reference, fmt, rule=rule)
    assert state_bytes(merged) == state_bytes(reference)


def test_several_adapters_and_selected_ones(llama: Path) -> None:
    def made(model: Any) -> Any:
        model = tuned(model, CONFIGS["lora"])
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["up_proj"]))
        model.add_adapter("third", peft.LoraConfig(r=2, target_modules=["q_proj"]))
        shake(model, 0.02)
        return model

    for names in (["default", "second"], ["second"], ["second", "third", "default"]):
        reference, model = both(llama, made)
        reference = reference.merge_and_unload(adapter_names=names)
        quantize_(reference, "q4k")
        first = state_bytes(model)
        model.merge_adapter(names[:1])
        model.merge_adapter(names[1:])
        model.unmerge_adapter()
        assert state_bytes(model) == first
        merged = silent(lambda model=model, names=names: model.merge_and_unload(adapter_names=names))
        assert state_bytes(merged) == state_bytes(reference)


@pytest.mark.parametrize("combination", ["linear", "cat", "svd"])
def test_weighted_adapters(combination: str, llama: Path) -> None:
    def made(model: Any) -> Any:
        model = tuned(model, peft.LoraConfig(r=4, target_modules=TARGETS))
        model.add_adapter("second", peft.LoraConfig(r=4, target_modules=TARGETS))
        shake(model, 0.02)
        return model

    merged = []
    for model in both(llama, made):
        model.add_weighted_adapter(["default", "second"], [0.7, 0.5], "both", combination_type=combination)
        model.set_adapter("both")
        merged.append(model)
    moved(*merged)
    merged = [silent(model.merge_and_unload) for model in merged]
    quantize_(merged[0], "q4k")
    assert state_bytes(merged[0]) == state_bytes(merged[1])


@pytest.mark.parametrize("order", ["lora first", "oft first"])
def test_adapters_around_adapters(order: str, llama: Path) -> None:
    """A mixed model: PEFT merges the inner layer, takes it out, and merges the outer one."""
    configs = [peft.LoraConfig(r=4, target_modules=TARGETS), peft.OFTConfig(oft_block_size=8, target_modules=TARGETS)]
    configs = configs if order == "lora first" else configs[::-1]

    def made(model: Any) -> Any:
        model = peft.get_peft_model(model, copy.deepcopy(configs[0]), mixed=True)
        model.add_adapter("second", copy.deepcopy(configs[1]))
        model.set_adapter(["default", "second"])
        torch.manual_seed(2)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape) * 0.02)
        return model

    reference, model = both(llama, made)
    before = state_bytes(model)
    model.base_model.merge_adapter()
    assert state_bytes(model) != before
    model.base_model.unmerge_adapter()
    assert state_bytes(model) == before
    merged, reference = silent(model.merge_and_unload), reference.merge_and_unload()
    quantize_(reference, "q4k")
    assert state_bytes(merged) == state_bytes(reference)


def test_a_plain_module_with_its_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 64), nn.Linear(64, 32, bias=False))
    save_file(model.state_dict(), tmp_path / "floats.safetensors")
    reference = tuned(copy.deepcopy(model), peft.LoraConfig(target_modules=["0"], lora_bias=True)).merge_and_unload()
    quantize_(model, "q4_0")
    model = tuned(model, peft.LoraConfig(target_modules=["0"], lora_bias=True))
    with merging(source=tmp_path / "floats.safetensors"):
        merged = silent(model.merge_and_unload)
    quantize_(reference, "q4_0")
    assert state_bytes(merged) == state_bytes(reference)


def test_the_file_that_is_named_must_have_the_weights(tmp_path: Path) -> None:
    model = quantized("q4k")
    save_file({"something": torch.zeros(1)}, tmp_path / "other.safetensors")
    model = tuned(model, CONFIGS["lora"])
    before = state_bytes(model)
    with (
        merging(source=tmp_path / "other.safetensors"),
        pytest.raises(ValueError, match="merge: .* has no model.layers"),
    ):
        model.merge_adapter()
    assert state_bytes(model) == before


def test_importance_is_not_recorded_and_that_is_said(llama: Path) -> None:
    torch.manual_seed(0)
    model = load(llama)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    widths = {name: model.get_submodule(name).in_features for name in names}
    quantize_(model, "q4k", imatrix={name: torch.rand(width) * 10 for name, width in widths.items()})
    reference = tuned(load(llama), CONFIGS["lora"])
    merged, message = warned(moved(reference, tuned(model, CONFIGS["lora"])).merge_and_unload)
    assert "14 of 14 layers" in message and "importance" in message and "imatrix=" in message
    reference = reference.merge_and_unload()
    quantize_(reference, "q4k")
    name = "model.layers.0.mlp.up_proj.weight"
    assert state_bytes(merged)[name] == state_bytes(reference)[name]


# ---- where the checkpoint does not stand for the weights -----------------------------------------------------------------


def weight_in(folder: Path, layer: str) -> Tensor:
    return load_file(folder / "model.safetensors")[f"{layer}.weight"].float()


def test_a_second_adapter_is_added_to_the_first(llama: Path) -> None:
    """The checkpoint does not hold the first adapter: nothing may start from it again."""
    config = peft.LoraConfig(r=4, target_modules=TARGETS)
    once = silent(tuned(load(llama, quantization_config=IsqConfig("q4k")), config).merge_and_unload)
    with pytest.raises(ValueError, match="adapters were merged into the model's layers"):
        requantize_(once, "q8_0")
    first = once.model.layers[0].mlp.up_proj.dequantize().float()
    model = tuned(once, config, 0.002)
    delta = model.base_model.model.model.layers[0].mlp.up_proj.get_delta_weight("default").float()
    merged, message = warned(model.merge_and_unload)
    assert "adapters were merged" in message
    after = merged.model.layers[0].mlp.up_proj.dequantize().float()
    assert relative(after, first + delta) < 0.03 < relative(first, weight_in(llama, "model.layers.0.mlp.up_proj")) - 0.1


@pytest.mark.parametrize("merge", ["merge_adapter", "layer by layer"])
def test_unload_keeps_what_is_merged_and_says_so_to_requantize(merge: str, llama: Path) -> None:
    model = tuned(load(llama, quantization_config=IsqConfig("q8_0")), CONFIGS["lora"])
    if merge == "merge_adapter":
        model.merge_adapter()
    else:
        for module in model.modules():
            if hasattr(module, "get_delta_weight"):
                module.merge()
    merged = state_bytes(model.base_model.model.model.layers[0].mlp.up_proj.base_layer)
    plain = model.unload()
    assert state_bytes(plain.model.layers[0].mlp.up_proj) == merged
    with pytest.raises(ValueError, match="adapters were merged"):
        requantize_(plain, "q4k")


def test_unload_without_a_merge_changes_nothing(llama: Path) -> None:
    model = load(llama, quantization_config=IsqConfig("q8_0"))
    before = state_bytes(model)
    plain = silent(tuned(model, CONFIGS["lora"]).unload)
    assert state_bytes(plain) == before
    requantize_(plain, "q4k")  # from the checkpoint, still


@pytest.mark.parametrize("change", ["trained before", "file is gone", "other weights"])
def test_otherwise_the_decoded_weights_are_used(change: str, llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in llama.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    if change == "trained before":
        model = load(folder)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(2)
        quantize_(model, "q4k")
    else:
        model = load(folder, quantization_config=IsqConfig("q4k"))
    file = folder / "model.safetensors"
    if change == "file is gone":
        file.unlink()
    elif change == "other weights":
        state = {name: weight if weight.dim() == 1 else weight.flip(0) for name, weight in load_file(file).items()}
        state["model.embed_tokens.weight"] = load_file(file)["model.embed_tokens.weight"]
        save_file(state, file, metadata={"format": "pt"})
    up = model.model.layers[0].mlp.up_proj
    model = tuned(model, peft.LoraConfig(r=4, target_modules=["up_proj"]), 0.002)
    delta = model.base_model.model.model.layers[0].mlp.up_proj.get_delta_weight("default").float()
    want = up.dequantize().float() + delta
    merged, message = warned(model.merge_and_unload)
    assert relative(merged.model.layers[0].mlp.up_proj.dequantize().float(), want) < 0.15
    reason = {"trained before": "was not what", "file is gone": "no such file", "other weights": "was not packed from"}
    assert reason[change] in message


def test_a_model_loaded_from_packed_weights(llama: Path, tmp_path: Path) -> None:
    """Their floats are not known. They may be named, and then the result is as ever."""
    load(llama, quantization_config=IsqConfig("q4k")).save_pretrained(tmp_path)
    config = peft.LoraConfig(r=4, target_modules=TARGETS)
    reference = tuned(load(llama), config, 0.002)
    _, message = warned(moved(reference, tuned(load(tmp_path), config)).merge_and_unload)
    assert "where they came from is not known here" in message
    with merging(source=llama):
        merged = silent(moved(reference, tuned(load(tmp_path), config)).merge_and_unload)
    reference = reference.merge_and_unload()
    quantize_(reference, "q4k")
    assert state_bytes(merged) == state_bytes(reference)


# ---- the model around it -------------------------------------------------------------------------------------------------


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
    model = tuned(load(llama, quantization_config=IsqConfig("q4k")), CONFIGS["lora"])
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
