"""Merging adapters into packed layers from the checkpoint, or from decoded weights where it does not stand for them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf import load
from models import state_bytes
from safetensors.torch import load_file, save_file
from torch import nn

from isqtorch import IsqConfig
from isqtorch.inplace.quantize import quantize_
from isqtorch.inplace.requantize import requantize_

peft = pytest.importorskip("peft", "0.21")

from adapters import moved, quantized, relative, shake, silent, tuned, warned, weight_in  # noqa: E402

from isqtorch.integrations.peft import merging  # noqa: E402

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
    reason = {
        "trained before": "was not what",
        "file is gone": "no such file",
        "other weights": "packed rows have a correlation of",
    }
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
