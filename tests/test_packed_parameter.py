"""Code that reads a packed weight: floats if it computes, bytes if it moves them, an error if it writes."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error
from models import tiny_gpt2
from torch import Tensor, nn

from isqtorch.inplace.dequantize import dequantize_
from isqtorch.inplace.quantize import quantize_
from isqtorch.modules import QuantEmbedding, QuantLinear
from isqtorch.modules.parameter import DecodedView, PackedParameter


def packed_linear(fmt: str = "q8_0") -> tuple[Any, Tensor]:
    """(a packed layer [64, 256], its decoded weight)."""
    torch.manual_seed(0)
    layer = QuantLinear.from_float(nn.Linear(256, 64), fmt)
    return layer, layer.dequantize()


# ---- models that read weights ----------------------------------------------------------------------------------------


def by_a_loop(model: Any, x: Tensor) -> Tensor:
    for layer in model.layers:
        x = torch.tanh(x @ layer.weight.T)
    return x


def by_another_name(model: Any, x: Tensor) -> Tensor:
    weight = model.layers[0].weight
    return F.linear(x, weight)


def by_a_helper(model: Any, x: Tensor) -> Tensor:
    def helper(weight: Tensor, x: Tensor) -> Tensor:
        return torch.einsum("nk,bk->bn", weight, x)

    return helper(model.layers[1].weight, x)


def by_the_dictionary(model: Any, x: Tensor) -> Tensor:
    return x @ dict(model.named_parameters())["layers.0.weight"].mT


def by_views(model: Any, x: Tensor) -> Tensor:
    weight = model.layers[0].weight
    heads = weight.view(4, -1, weight.shape[1]).flatten(0, 1).contiguous()
    return x @ heads.transpose(0, 1) + weight.detach().mean() + weight.data.abs().sum(0)


def by_rows(model: Any, x: Tensor) -> Tensor:
    weight = model.layers[0].weight
    return x * weight[3] + weight[torch.tensor([1, 2])].sum(0) + weight[5:9, :].mean(0) + weight[:, 7]


def in_its_type(model: Any, x: Tensor) -> Tensor:
    x = x.to(next(model.parameters()).dtype)
    buffer = torch.zeros(x.shape, dtype=model.layers[0].weight.dtype)
    buffer[:] = model.layers[0](x)
    return buffer + torch.ones_like(model.layers[1].weight)[0]


def in_its_size(model: Any, x: Tensor) -> Tensor:
    rows, columns = model.layers[0].weight.shape
    return model.layers[0](x) * columns / model.layers[0].weight.size(1) + model.layers[0].weight.numel() / (rows * 256)


def several_together(model: Any, x: Tensor) -> Tensor:
    fused = torch.cat([layer.weight for layer in model.layers])
    return (x @ fused.t()).chunk(2, -1)[1] + torch.stack([layer.weight for layer in model.layers]).mean()


READERS = [
    by_a_loop,
    by_another_name,
    by_a_helper,
    by_the_dictionary,
    by_views,
    by_rows,
    in_its_type,
    in_its_size,
    several_together,
]


class Reader(nn.Module):
    def __init__(self, read: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(256, 256) for _ in range(2))
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self, x)


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
@pytest.mark.parametrize("fmt", ["q8_0", "afq8", "fp8"])
def test_whatever_a_forward_does_with_a_weight_it_gets_floats(read: Callable[[Any, Tensor], Tensor], fmt: str) -> None:
    model, x = Reader(read).eval(), torch.rand(4, 256)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        before = model(x)
        report = quantize_(model, fmt, progress=False)
        assert [layer.stored for layer in report.layers] == [fmt, fmt]
        after = model(x)
    assert after.dtype == before.dtype and type(after) is Tensor
    assert relative_error(after, before) < 0.05
    dequantize_(model)
    assert relative_error(model(x).detach(), after) < 0.02


def test_a_weight_that_was_stored_transposed_is_read_so() -> None:
    model = tiny_gpt2()
    before = model.transformer.h[0].mlp.c_fc.weight.detach().clone()  # Conv1D: [K, N]
    quantize_(model, "q8_0", progress=False)
    weight = model.transformer.h[0].mlp.c_fc.weight
    assert relative_error(torch.ones(before.shape[0]) @ weight, torch.ones(before.shape[0]) @ before) < 0.02
    assert relative_error(weight[2:5], before[2:5]) < 0.02


def test_rows_of_a_table_are_decoded_without_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = QuantEmbedding.from_float(nn.Embedding(1000, 256), "q4k")
    whole = layer.dequantize()
    monkeypatch.setattr(PackedParameter, "floats", lambda self: pytest.fail("the whole table was decoded"))
    for index in (
        7,
        slice(3, 9),
        torch.tensor([[4, 5], [999, 0]]),
        (slice(2, 4), slice(0, 10)),
        (torch.tensor([1, 2]), 5),
    ):
        assert torch.equal(layer.weight[index], whole[index])


# ---- code that writes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.div_(2),
        lambda w: w.__imul__(2),
        lambda w: w.__setitem__(0, 1.0),
        lambda w: w.copy_(torch.zeros(64, 256)),
        lambda w: w.fill_(0.5),
        lambda w: w.fill_(1),
        lambda w: w.copy_(torch.ones(64, 272, dtype=torch.int64)),
        lambda w: nn.init.normal_(w),
        lambda w: setattr(w, "data", torch.zeros(64, 256)),
        lambda w: torch.nn.init.xavier_uniform_(w),
    ],
    ids=["div_", "imul", "setitem", "copy_", "fill_", "fill_ 1", "copy_ integers", "normal_", "set data", "xavier"],
)
def test_writing_is_refused_with_the_name_of_the_layer(write: Callable[[Any], object]) -> None:
    model = nn.Sequential(nn.Linear(256, 64))
    quantize_(model, "q8_0", progress=False)
    before = model.state_dict()["0.weight"].clone()
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match=r"would change 0\.weight, which is packed.*exclude=.*dequantize_"),
    ):
        write(model[0].weight)
    assert torch.equal(model.state_dict()["0.weight"], before)


def test_writing_to_what_would_be_a_view_is_refused_too() -> None:
    """Decoded floats are a copy: what is written to it would be lost without a word."""

    class Merging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(256, 64)

        def merge(self) -> None:
            self.layer.weight.data += 1.0

        def halve(self) -> None:
            self.layer.weight.detach().view(-1).mul_(0.5)

    model = Merging()
    quantize_(model, "q8_0", progress=False)
    for method in (model.merge, model.halve):
        with pytest.raises(RuntimeError, match=r"layer\.weight, which is packed"):
            method()


def test_gradients_are_refused_with_the_name_of_the_layer() -> None:
    model = nn.Sequential(nn.Linear(256, 64))
    quantize_(model, "q8_0", progress=False)
    with pytest.raises(RuntimeError, match=r"0\.weight is packed.*no gradients.*adapters.*exclude="):
        model.requires_grad_(True)
    model.requires_grad_(False)
    assert not model[0].weight.requires_grad


# ---- code that moves -------------------------------------------------------------------------------------------------


def test_bytes_are_what_is_moved_copied_and_saved() -> None:
    layer, decoded = packed_linear()
    plain = layer.weight.data
    assert type(plain) is Tensor and plain.dtype == torch.uint8 and plain.shape == layer.weight.shape == (64, 272)
    assert layer.weight.to("cpu").dtype == layer.weight.clone().dtype == torch.uint8
    assert all(tensor.dtype == torch.uint8 and type(tensor) is Tensor for tensor in [layer.state_dict()["weight"]])
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(copied.weight) is PackedParameter and torch.equal(copied.weight.data, plain)
        assert copied.weight.data_ptr() != layer.weight.data_ptr()
        assert torch.equal(copied.weight.float(), decoded)  # it knows its own layer
    assert layer.to("meta").weight.is_meta


def test_new_bytes_take_effect_at_once() -> None:
    layer, _ = packed_linear()
    other = QuantLinear.from_float(nn.Linear(256, 64), "q8_0")
    x = torch.randn(3, 256)
    layer.bias = other.bias
    layer.weight.data = other.weight.data.clone()
    assert torch.equal(layer(x), other(x)) and torch.equal(layer.weight.float(), other.dequantize())
    with torch.no_grad():
        layer.weight.data.zero_()
        assert torch.equal(layer(x), layer.bias.expand(3, 64))
        layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))


def test_a_plain_parameter_of_bytes_becomes_a_packed_one_and_stays_shared() -> None:
    first, second = packed_linear()[0], packed_linear()[0]
    parameter = nn.Parameter(first.weight.data.clone(), requires_grad=False)
    first.weight = parameter
    second.weight = parameter
    assert first.weight is second.weight and type(first.weight) is PackedParameter
    del first
    assert second.weight.float().shape == (64, 256)


def test_a_weight_without_its_layer_says_so() -> None:
    layer, _ = packed_linear()
    weight = layer.weight
    del layer
    with pytest.raises(RuntimeError, match="its layer is gone"):
        weight.float()
    assert weight.data.dtype == torch.uint8


def test_after_casts_the_type_is_that_of_the_layer() -> None:
    layer, decoded = packed_linear()
    assert layer.half().weight.float().dtype == torch.float32
    assert (layer.weight + 0).dtype == torch.float16
    x = torch.randn(2, 256, dtype=torch.float64)
    y = layer.double()(x)
    assert y.dtype == torch.float64 and relative_error(y - layer.bias, x @ decoded.double().t()) < 1e-7
    table = QuantEmbedding.from_float(nn.Embedding(10, 256), "q8_0").double()
    assert torch.equal(table(torch.arange(3)), table.weight[:3])


def test_decoded_views_read_like_tensors() -> None:
    layer, decoded = packed_linear()

    class Asking(nn.Module):
        def forward(self) -> Tensor:
            return layer.weight.data

    view = Asking()()
    assert isinstance(view, DecodedView) and torch.equal(view, decoded)
    assert type(view * 2) is Tensor and type(view.sum()) is Tensor and torch.equal(view.clone().mul_(2), decoded * 2)


def test_a_view_has_the_marks_of_its_weight() -> None:
    """transformers marks weights that were loaded, and then does not write first values to them."""
    layer, _ = packed_linear()
    layer.weight.loaded = True

    class Asking(nn.Module):
        def forward(self) -> list[Any]:
            return [layer.weight[1], layer.weight[1:3, 5], layer.weight.data[2], layer.weight.t()[0].view(-1)]

    for view in Asking()():
        assert view.loaded and not hasattr(view, "plain") and not hasattr(view, "owners")
        with pytest.raises(RuntimeError, match="zero_ would change"):
            view.zero_()


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_compiled_code_gets_floats_too(read: Callable[[Any, Tensor], Tensor]) -> None:
    model, x = Reader(read).eval(), torch.rand(4, 256)
    with torch.no_grad():
        quantize_(model, "q8_0", progress=False)
        want = model(x)
        torch.compiler.reset()
        got = torch.compile(model, backend="eager", fullgraph=True)(x)
    assert got.dtype == want.dtype and relative_error(got, want) < 1e-6
