"""Every way to use it wrongly ends in an exception that says what, where and what to do instead."""

# ruff: noqa: E501  (a table: one row, one line)

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import mlp
from torch import nn

import isqtorch
from isqtorch import dequantize_, plan, quantize, quantize_, requantize_
from isqtorch.modules import QuantEmbedding, QuantLinear

W = torch.linspace(-1, 1, 8 * 256).view(8, 256)


def quantized(fmt: str = "q4k") -> nn.Sequential:
    model = mlp()
    quantize_(model, fmt)
    return model


def spoiled(value: float) -> nn.Sequential:
    model = mlp()
    with torch.no_grad():
        model[1].weight[3, 17] = value
    return model


def with_value(value: float) -> torch.Tensor:
    weight = W.clone()
    weight[2, 5] = value
    return weight


def file(name: str, content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(content)
        return path

    return write


def truncated_checkpoint(folder: Path) -> Path:
    path = folder / "x.safetensors"
    isqtorch.checkpoint.save(quantized(), path)
    path.write_bytes(path.read_bytes()[:-100])
    return path


def meta_model() -> nn.Module:
    with torch.device("meta"):
        return mlp()


def linear_op(
    x: torch.Tensor, weight: torch.Tensor | None = None, fmt: str = "q4k", bias: torch.Tensor | None = None
) -> Any:
    packed = torch.ops.isqtorch.quantize(W, fmt) if weight is None else weight
    return torch.ops.isqtorch.linear(x, packed, fmt, bias)


TRUNCATED_IMATRIX = file(
    "x.cimatrix", (1).to_bytes(8, "little") + (1).to_bytes(8, "little") + b"0" + (256).to_bytes(8, "little") + bytes(40)
)

# id, what is done (given a folder), exception, message
MISUSES: list[tuple[str, Callable[[Path], Any], type[Exception], str]] = [
    # formats
    ("unknown format", lambda d: quantize_(mlp(), "q7z"), ValueError, r"unknown format 'q7z'\. Known formats: .*q4_0"),
    ("7 bits", lambda d: quantize_(mlp(), 7), ValueError, r"no format has 7 bits\. Use one of 2, 3, 4, 5, 6, 8"),
    ("7 bits as text", lambda d: quantize_(mlp(), "7"), ValueError, r"no format has 7 bits"),
    ("bool as format", lambda d: quantize_(mlp(), True), ValueError, r"format must be a name or a number of bits, got True"),
    ("float as format", lambda d: quantize_(mlp(), 4.5), ValueError, r"format must be a name or a number of bits, got 4.5"),
    ("nothing to do", lambda d: quantize_(mlp(), None), ValueError, r"neither a format nor a topology"),
    # weights, one at a time
    ("1-D weight", lambda d: quantize(W[0], "q4k"), ValueError, r"at least 2 dimensions \[N, K\], got shape \[256\]"),
    ("K = 0", lambda d: quantize(torch.zeros(4, 0), "q4k"), ValueError, r"in_features must be a positive multiple of 256, got 0"),
    ("K = 100", lambda d: quantize(torch.zeros(4, 100), "q4_0"), ValueError, r"positive multiple of 32, got 100"),
    ("NaN weight", lambda d: quantize(with_value(float("nan")), "q4k"), ValueError, r"weight\[2, 5\] is nan"),
    ("infinite weight", lambda d: quantize(with_value(float("inf")), "afq4"), ValueError, r"weight\[2, 5\] is inf"),
    ("integer weight", lambda d: quantize(W.int(), "q4k"), ValueError, r"weight must be one of float32.*got int32"),
    ("list as weight", lambda d: quantize([[1.0]], "q4k"), TypeError, r"weight must be a torch\.Tensor, got list"),
    ("wrong rule", lambda d: quantize(W, "afq4", rule="best"), ValueError, r"rule"),
    ("short importance", lambda d: quantize(W, "q4k", torch.ones(255)), ValueError, r"importance must have shape \[256\].*got \[255\]"),
    ("negative importance", lambda d: quantize(W, "q4k", -torch.ones(256)), ValueError, r"importance\[0\] is -1.*not negative"),
    # models
    ("not a model", lambda d: quantize_({}, 4), TypeError, r"model must be an nn\.Module, got dict"),
    ("bare layer", lambda d: quantize_(nn.Linear(256, 8), 4), ValueError, r"a bare Linear cannot be replaced in place\. Wrap it, as in nn\.Sequential"),
    ("bare quantized layer", lambda d: dequantize_(quantized()[0]), ValueError, r"a bare QuantLinear cannot be replaced"),
    ("calling twice", lambda d: quantize_(quantized(), 4), ValueError, r"0 is quantized already \(3 layers are\)\. Use requantize_"),
    ("requantize first", lambda d: requantize_(mlp(), 4), ValueError, r"holds no quantized layer\. Use quantize_"),
    ("dequantize first", lambda d: dequantize_(mlp()), ValueError, r"dequantize_: the model holds no quantized layer"),
    ("dequantize to integers", lambda d: dequantize_(quantized(), torch.int8), ValueError, r"dtype must be a float type, got torch\.int8"),
    ("NaN in a model", lambda d: quantize_(spoiled(float("nan")), 4), ValueError, r"quantize_: 1\.weight\[3, 17\] is nan; weights must be finite"),
    ("too large for auto", lambda d: quantize_(spoiled(3e38), "auto", target_bpw=5), ValueError, r"^quantize_: 1: the block of q2k"),
    ("too large", lambda d: quantize_(spoiled(3e38), "q4k"), ValueError, r"^quantize_: 1: the block of q4k"),
    ("infinity in a model", lambda d: quantize_(spoiled(float("-inf")), 4), ValueError, r"1\.weight\[3, 17\] is -inf"),
    ("meta weights", lambda d: quantize_(meta_model(), 4), ValueError, r"0\.weight is on the meta device .* isqtorch\.plan works without"),
    # options
    ("wrong organization", lambda d: quantize_(mlp(), 4, organization="moe"), ValueError, r"organization must be one of default, moqe; got 'moe'"),
    ("moqe without experts", lambda d: quantize_(mlp(), 4, organization="moqe"), ValueError, r"organization='moqe' quantizes routed experts only"),
    ("wrong fallback", lambda d: quantize_(mlp(), 4, fallback="down"), ValueError, r"fallback must be one of up, skip, error; got 'down'"),
    ("fallback error", lambda d: quantize_(mlp(width=96), "q4k", fallback="error"), ValueError, r"3 layers do not fit as asked: 0: 96 columns"),
    ("bad include", lambda d: quantize_(mlp(), 4, include=["("]), ValueError, r"include pattern '\(': bad regex"),
    ("exclude a number", lambda d: quantize_(mlp(), 4, exclude=[3]), ValueError, r"exclude: must be a string or a list of strings, got 3 in the list"),
    ("missing device", lambda d: quantize_(mlp(), 4, device="cuda:99"), ValueError, r"device 'cuda:99' is not available"),
    ("meta device", lambda d: quantize_(mlp(), 4, device="meta"), ValueError, r"'meta' holds no weights"),
    ("lazy layers", lambda d: quantize_(nn.Sequential(nn.LazyLinear(4)), "q4k"), ValueError, r"0\.weight has no shape yet"),
    ("rule of another family", lambda d: quantize_(mlp(), "q4k", rule="mlx"), ValueError, r"quantize_: .*rule"),
    # topology
    ("unknown topology key", lambda d: quantize_(mlp(), 4, topology={"lm_head": 4}), ValueError, r"topology: unknown key 'lm_head'"),
    ("bad range", lambda d: quantize_(mlp(), 4, topology={"8-3": 4}), ValueError, r"entry '8-3': the end of a range is exclusive"),
    ("bad regex", lambda d: quantize_(mlp(), 4, topology={"/[/": 4}), ValueError, r"entry '/\[/': bad regex"),
    ("bad format in a topology", lambda d: quantize_(mlp(), 4, topology={"1": "q0"}), ValueError, r"entry '1': unknown format 'q0'"),
    ("unknown subkey", lambda d: quantize_(mlp(), 4, topology={"1": {"bits": 4}}), ValueError, r"entry '1': unknown subkey 'bits'"),
    ("missing topology file", lambda d: quantize_(mlp(), 4, topology=d / "no.yaml"), FileNotFoundError, r"no\.yaml"),
    ("absent topology device", lambda d: quantize_(mlp(), 4, topology={"/1/": {"device": "cuda:99"}}), ValueError, r"entry '/1/': device 'cuda:99' is not available"),
    # importance matrices
    ("wrong imatrix length", lambda d: quantize_(mlp(), 4, imatrix={"1": torch.ones(128)}), ValueError, r"layer '1' needs 256 importance values, entry '1' has 128"),
    ("NaN in an imatrix", lambda d: quantize_(mlp(), 4, imatrix={"1": torch.full((256,), float("nan"))}), ValueError, r"entry '1': value 0 is nan"),
    ("imatrix of another model", lambda d: quantize_(mlp(), 4, imatrix={"x.y": torch.ones(256)}), ValueError, r"It was made for another model"),
    ("imatrix of another type", lambda d: quantize_(mlp(), 4, imatrix=3), ValueError, r"imatrix must be a dict of layer names, a path or an Imatrix, got int"),
    ("truncated imatrix", lambda d: quantize_(mlp(), 4, imatrix=TRUNCATED_IMATRIX(d)), ValueError, r"x\.cimatrix: byte \d+: .* are left"),
    ("missing imatrix", lambda d: quantize_(mlp(), 4, imatrix=d / "no.gguf"), FileNotFoundError, r"no\.gguf"),
    # checkpoints and plans
    ("truncated checkpoint", lambda d: isqtorch.checkpoint.load_(mlp(), truncated_checkpoint(d)), ValueError, r"not a complete safetensors file"),
    ("checkpoint of text", lambda d: isqtorch.checkpoint.load_(mlp(), file("x.safetensors", b"hello world")(d)), ValueError, r"not a complete safetensors file"),
    ("missing checkpoint", lambda d: isqtorch.checkpoint.load_(mlp(), d / "no"), FileNotFoundError, r"no such file"),
    ("plan of nothing", lambda d: plan(d / "no", 4), FileNotFoundError, r"not a file or folder"),
    # modules and ops
    ("linear with wrong K", lambda d: quantized()[0](torch.zeros(1, 128)), ValueError, r"linear: .*256"),
    ("linear with integer x", lambda d: quantized()[0](torch.zeros(1, 256, dtype=torch.long)), ValueError, r"linear: x must be"),
    ("linear with float weight", lambda d: linear_op(torch.zeros(1, 256), W), ValueError, r"linear: .*uint8"),
    ("linear with wrong bias", lambda d: linear_op(torch.zeros(1, 256), bias=torch.zeros(7)), ValueError, r"linear: bias"),
    ("embedding index", lambda d: QuantEmbedding.from_float(nn.Embedding(4, 32), "q8_0")(torch.tensor([0, 4])), IndexError, r"4"),
    ("negative embedding index", lambda d: QuantEmbedding.from_float(nn.Embedding(4, 32), "q8_0")(torch.tensor([-1])), IndexError, r"-1"),
    ("embedding with float ids", lambda d: QuantEmbedding(4, 32, format="q8_0")(torch.zeros(2)), ValueError, r"embedding: .*int"),
    ("layer that does not fit", lambda d: QuantLinear(100, 8, format="q4k"), ValueError, r"in_features must be a positive multiple of 256, got 100"),
    ("layer of integers", lambda d: QuantLinear(256, 8, format="q4k", dtype=torch.int8), ValueError, r"QuantLinear: dtype must be a float type"),
    ("packed weight cut inside a block", lambda d: QuantLinear.from_packed(torch.zeros(2, 100, dtype=torch.uint8), "q4k"), ValueError, r"positive multiple of 144 bytes, got 100"),
    ("packed weight of floats", lambda d: QuantLinear.from_packed(W, "q4k"), ValueError, r"must be uint8 \[N, row_bytes\], got torch.float32"),
]  # fmt: skip


def test_there_are_enough_rows() -> None:
    assert len(MISUSES) >= 25 and len({row[0] for row in MISUSES}) == len(MISUSES)


@pytest.mark.parametrize(("do", "error", "message"), [pytest.param(*row[1:], id=row[0]) for row in MISUSES])
def test_misuse(tmp_path: Path, do: Callable[[Path], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        do(tmp_path)
    assert type(caught.value) is error  # exactly: not a subclass that happens to fit
