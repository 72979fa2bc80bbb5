"""Models that hold layers of other quantizers. The stand-ins store their weights as the real packages do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import isqtorch
from isqtorch import QuantLinear, plan, quantize_, requantize_
from isqtorch.modules.foreign import find_foreign


class Int8Linear(nn.Module):
    """A class of its own, with buffers: as in quantizers that users write themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randint(-127, 127, (256, 256), dtype=torch.int8))
        self.register_buffer("scale", torch.ones(256))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.scale[:, None])


class Linear4bit(nn.Linear):
    """As bitsandbytes: a subclass of nn.Linear with flat bytes as parameter."""

    def __init__(self) -> None:
        super().__init__(256, 256)
        self.weight = nn.Parameter(torch.zeros(32768, 1, dtype=torch.uint8), requires_grad=False)


class GptqLinear(nn.Module):
    """As GPTQ and AWQ: eight codes in an int32."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(32, 256, dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros(2, 32, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(2, 256, dtype=torch.float16))
        self.register_buffer("g_idx", torch.zeros(256, dtype=torch.int32))


class Fp8Linear(nn.Linear):
    """As FP8Linear of transformers."""

    def __init__(self) -> None:
        super().__init__(256, 256, bias=False)
        self.weight = nn.Parameter(torch.zeros(256, 256).to(torch.float8_e4m3fn), requires_grad=False)
        self.weight_scale_inv = nn.Parameter(torch.ones(2, 2))


class HqqLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W_q = nn.Parameter(torch.zeros(128, 256, dtype=torch.uint8), requires_grad=False)


class Composed(torch.Tensor):
    """As torchao: a tensor that looks like floats and is made of integers."""

    inside: Tensor

    @staticmethod
    def __new__(cls, inside: Tensor) -> Composed:
        return torch.Tensor._make_wrapper_subclass(cls, inside.shape, dtype=torch.float32)

    def __init__(self, inside: Tensor) -> None:
        self.inside = inside

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inside"], None

    def __repr__(self) -> str:  # type: ignore[override]
        return "Composed"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Composed(args[0].inside)
        raise NotImplementedError(func)


def composed() -> nn.Module:
    layer = nn.Linear(256, 256)
    layer.weight = nn.Parameter(Composed(torch.zeros(256, 256, dtype=torch.int8)), requires_grad=False)
    return layer


def marked() -> nn.Module:
    """As compressed-tensors: an ordinary layer with other tensors, and a mark."""
    layer = nn.Linear(256, 256)
    layer.quantization_scheme = "W8A16"
    return layer


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "int8": Int8Linear,
    "4 bits": Linear4bit,
    "gptq": GptqLinear,
    "fp8": Fp8Linear,
    "hqq": HqqLinear,
    "tensor subclass": composed,
    "marked": marked,
}


def mixed(kind: str) -> nn.Module:
    return nn.Sequential(nn.Linear(256, 256), LAYERS[kind](), nn.Linear(256, 256))


@pytest.mark.parametrize("kind", LAYERS)
def test_refused_before_anything_is_packed(kind: str) -> None:
    model = mixed(kind)
    before = list(model)
    for function in (quantize_, requantize_, plan):
        with pytest.raises(ValueError, match=rf"{function.__name__}: .* holds 1 layer \(.*: 1\)\. .*floats first"):
            function(model, "q4k")
    assert list(model) == before


def test_the_message_names_quantizer_and_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Linear4bit, "__module__", "bitsandbytes.nn.modules")
    with pytest.raises(ValueError, match=r"bitsandbytes holds 1 layer \(Linear4bit: 1\)"):
        quantize_(mixed("4 bits"), "q4k")
    monkeypatch.setattr(Fp8Linear, "__module__", "transformers.integrations.finegrained_fp8")
    with pytest.raises(ValueError, match=r"finegrained_fp8 holds 1 layer \(Fp8Linear: 1\)"):
        quantize_(mixed("fp8"), "q4k")


@pytest.mark.parametrize("options", [{"exclude": r"^1$"}, {"include": [r"^0$", r"^2$"]}], ids=["exclude", "include"])
def test_both_in_one_model_by_choice(options: dict[str, Any], tmp_path: Path) -> None:
    model, x = mixed("int8"), torch.randn(2, 256)
    report = quantize_(model, "q4k", progress=False, **options)
    assert type(model[1]) is Int8Linear and isinstance(model[0], QuantLinear) and isinstance(model[2], QuantLinear)
    assert [(layer.name, layer.stored) for layer in report.layers] == [("0", "q4k"), ("1", None), ("2", "q4k")]
    assert not [note for note in report.notes if "matches no layer" in note]
    wanted = model(x)
    isqtorch.checkpoint.save(model, tmp_path / "both.safetensors")
    again = mixed("int8")
    isqtorch.checkpoint.load_(again, tmp_path / "both.safetensors")
    assert torch.equal(again(x), wanted)
    explanation = isqtorch.explain(model)
    assert (
        len(explanation.layers) == 2 and "holds 1 layer (Int8Linear: 1), which are not listed" in explanation.notes[0]
    )
    requantize_(model, "q8_0", source="stored", progress=False)  # the choice lasts
    assert model[0].format == model[2].format == "q8_0" and type(model[1]) is Int8Linear


def test_special_tensors_are_refused_in_any_case() -> None:
    with pytest.raises(ValueError, match="cannot store"):
        quantize_(mixed("tensor subclass"), "q4k", exclude=r"^1$")


def test_a_part_without_such_layers_is_packed() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(256, 256)), Int8Linear())
    quantize_(model[0], "q4k", progress=False)
    assert isinstance(model[0][0], QuantLinear)


def test_explain_says_whose_the_layers_are() -> None:
    assert isqtorch.explain(mixed("int8")).notes == [
        "another quantizer holds 1 layer (Int8Linear: 1). isqtorch runs none of them."
    ]


class Ordinary(nn.Module):
    """Integers that are no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("relative_position_index", torch.zeros(16, 16, dtype=torch.int64))
        self.register_buffer("mask", torch.ones(1, 1, 16, 16, dtype=torch.bool))
        self.register_buffer("num_batches", torch.zeros((), dtype=torch.int32))
        self.logit_scale = nn.Parameter(torch.ones(()))
        self.proj = nn.Linear(256, 256)


@pytest.mark.parametrize(
    "module",
    [
        lambda: nn.TransformerEncoderLayer(256, 4),
        lambda: nn.LSTM(256, 256),
        lambda: nn.Sequential(nn.BatchNorm1d(256), nn.LazyLinear(3)),
        lambda: nn.Sequential(nn.Linear(8, 8).to(torch.float8_e4m3fn)),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
    ],
    ids=["transformer", "lstm", "lazy", "cast", "weight norm"],
)
def test_ordinary_models_hold_none(module: Callable[[], nn.Module]) -> None:
    assert find_foreign(module()) is None


def test_masks_and_indices_are_no_weights() -> None:
    assert find_foreign(Ordinary()) is None


def test_our_own_layers_are_not_foreign() -> None:
    model = nn.Sequential(nn.Embedding(64, 256), nn.Linear(256, 256))
    quantize_(model, "q4k", progress=False)
    assert find_foreign(model) is None


# ---- the packages themselves, where they are installed ---------------------------------------------------------------


def test_bitsandbytes() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bnb.nn.Linear4bit(256, 256).to("cpu"), bnb.nn.Linear8bitLt(256, 256), nn.Linear(256, 256))
    with pytest.raises(ValueError, match=r"bitsandbytes holds 2 layers \(Linear4bit, Linear8bitLt: 0, 1\)"):
        quantize_(model, "q4k")


def test_torchao() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), filter_fn=lambda _, name: name == "0")
    with pytest.raises(ValueError, match=r"torchao holds 1 layer \(Int8Tensor: 0\)"):
        quantize_(model, "q4k")


def test_compressed_tensors() -> None:
    compressed = pytest.importorskip("compressed_tensors.quantization")
    groups = {"all": compressed.preset_name_to_scheme("W8A16", ["Linear"])}
    model = nn.Sequential(nn.Linear(256, 256))
    compressed.apply_quantization_config(model, compressed.QuantizationConfig(config_groups=groups))
    with pytest.raises(ValueError, match=r"compressed-tensors holds 1 layer \(Linear: 0\)"):
        quantize_(model, "q4k")
