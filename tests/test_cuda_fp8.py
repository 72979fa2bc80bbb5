"""FP8 weights with FP8 activations: `linear_w8a8` with the kernels in the emulator, and torch's FP8 product replaced by one that
checks its arguments as torch does on CUDA and multiplies in float64.

Where there is a GPU, `-m cuda` runs the operator's tests on it, with torch's own product where it has one."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emulator.ops import emulated
from helpers import DTYPES, ROUNDING, check_scaled_mm, fp8_parts, linear_error, relative_error, shifted, uneven
from torch import Tensor

import isqtorch
from isqtorch import ops
from isqtorch.formats import get_format
from isqtorch.ops.native import no_fp8_products

FP8 = get_format("fp8")
RUN = 128
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])


class Product:
    """Stands for aten::_scaled_mm.out on the CPU, where torch has none with such scales."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []  # (m, n, k) of each call

    def __call__(
        self,
        x: Tensor,
        w: Tensor,
        scale_x: Tensor,
        scale_w: Tensor,
        bias: Tensor | None = None,
        scale_result: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        use_fast_accum: bool = False,
        *,
        out: Tensor,
    ) -> Tensor:
        (m, k), n = x.shape, w.shape[1]
        assert bias is None and scale_result is None and out_dtype == out.dtype and not use_fast_accum
        assert out.shape == (m, n) and out.stride(1) == 1 and out.dtype in DTYPES
        check_scaled_mm(x, w, scale_x, scale_w, out.dtype)
        # what only C++ checks: scales of whole rows would be preferred, were there one run; and cuBLAS's alignment
        assert k > RUN and scale_x.stride() == (1, m) and scale_w.t().stride() == (1, n)
        assert m % 16 == 0 and n % 16 == 0 and out.stride(0) * out.element_size() % 16 == 0
        assert all(t.data_ptr() % 16 == 0 for t in (x, w, scale_x, scale_w, out))
        self.shapes.append((m, n, k))
        exact = decoded(x, scale_x) @ decoded(w.t(), scale_w.t()).t()
        return out.copy_(exact)


def decoded(codes: Tensor, scales: Tensor) -> Tensor:
    """float64 `[rows, k]` from codes and scales `[rows, k / 128]`."""
    return codes.to(torch.float32).double() * scales.double().repeat_interleave(RUN, dim=1)


def test_the_checks_check() -> None:
    x, w = (torch.zeros(rows, 256).to(torch.float8_e4m3fn) for rows in (32, 48))
    scale_x, scale_w = torch.ones(2, 32).t(), torch.ones(2, 48)
    check_scaled_mm(x, w.t(), scale_x, scale_w, torch.float32)
    for wrong in (
        (x, w.t().contiguous(), scale_x, scale_w),
        (x.t().contiguous().t(), w.t(), scale_x, scale_w),
        (x, w[:40].t(), scale_x, scale_w[:, :40].contiguous()),
        (x, w.t(), scale_x.contiguous(), scale_w),
        (x, w.t(), scale_x, scale_w.t().contiguous().t()),
        (x, w.t(), scale_x.half(), scale_w.half()),
        (x, w.t(), scale_x[:, :1], scale_w[:1]),
    ):
        with pytest.raises(RuntimeError):
            check_scaled_mm(*wrong, torch.float32)


@pytest.fixture
def product() -> Iterator[Product]:
    made = Product()
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own is overridden, on purpose
        library.impl("_scaled_mm.out", made, "CPU")
    emulated().allow_fp8_products(True)
    yield made
    emulated().allow_fp8_products(False)
    library._destroy()


@pytest.fixture(autouse=True)
def _poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fills what is allocated with NaN; not on a GPU, where cuBLAS would want settings for this mode."""
    torch.use_deterministic_algorithms(request.node.get_closest_marker("cuda") is None)
    yield
    torch.use_deterministic_algorithms(False)


MOST = 128  # rows that the weight's own kernels take if x may be rounded


def weights(packed: Tensor) -> Tensor:
    """float64 `[n, k]`, without the rounding of `dequantize`."""
    codes, scales = fp8_parts(packed.contiguous())
    return decoded(codes.view(torch.float8_e4m3fn), scales.t())


def rounded(x: Tensor) -> Tensor:
    """What x is multiplied as, float64."""
    return weights(ops.quantize(x.reshape(-1, x.shape[-1]), "fp8")).view(x.shape)


@pytest.fixture(scope="module")
def packed() -> Tensor:
    return ops.quantize(torch.randn(48, 384) / 20, "fp8")


def test_the_border_is_known() -> None:
    assert json.loads(emulated().cuda_info())["formats"]["fp8"]["w8a8_rows"] == MOST


@every_dtype
@pytest.mark.parametrize("m", [MOST + 1, 160])
def test_x_is_rounded_where_there_are_many_rows(product: Product, packed: Tensor, m: int, dtype: torch.dtype) -> None:
    x = uneven(m, 384, dtype)
    y = emulated().linear_w8a8(x, packed, "fp8")
    assert product.shapes == [((m + 15) // 16 * 16, 48, 384)]
    assert y.dtype == dtype and y.shape == (m, 48) and y.is_contiguous()
    assert torch.equal(y, (rounded(x) @ weights(packed).t()).to(dtype))
    assert torch.equal(emulated().linear_w8a8_frozen(x, packed, "fp8"), y)


def test_any_shape_stride_and_bias(product: Product, packed: Tensor) -> None:
    x = torch.randn(10, 15, 2 * 384).bfloat16()
    for bias in (None, torch.randn(48), torch.randn(96).half()[::2]):
        for view in (x[..., :384], x[..., ::2], x[..., 384:].transpose(0, 1), shifted(x[..., :384], 2)):
            y = emulated().linear_w8a8(view, packed, "fp8", bias)
            want = (rounded(view) @ weights(packed).t()).bfloat16()
            want = want if bias is None else (want.float() + bias.bfloat16().float()).bfloat16()
            assert torch.equal(y, want)
    y = emulated().linear_w8a8(x[..., :384], shifted(packed, 1), "fp8")
    assert torch.equal(y, emulated().linear_w8a8(x[..., :384], packed, "fp8"))
    part = packed[:, : 2 * FP8.block_bytes]  # a strided weight
    assert torch.equal(
        emulated().linear_w8a8(x[..., :256], part, "fp8"), (rounded(x[..., :256]) @ weights(part).t()).bfloat16()
    )


def test_slices_of_a_large_weight(product: Product) -> None:
    """Of about the same size, each with its codes, its scales and its outputs."""
    k, n, m = 8192, 4096 + 272, 5 * 128
    table = ops.quantize(torch.randn(37, k) / 64, "fp8")
    rows = torch.arange(n) % 37
    x = torch.randn(m, k)
    y = emulated().linear_w8a8(x, table[rows], "fp8")
    assert product.shapes == [(m, 2304, k), (m, n - 2304, k)]
    want = rounded(x) @ weights(table).t()
    assert relative_error(y, want[:, rows]) < 1e-7


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_stay_visible(product: Product, packed: Tensor, value: float) -> None:
    x = torch.randn(MOST + 7, 384).bfloat16()
    clean = emulated().linear_w8a8(x, packed, "fp8")
    x[3, 17] = x[MOST + 6, 383] = value
    y = emulated().linear_w8a8(x, packed, "fp8")
    hit = torch.zeros(len(x), dtype=torch.bool)
    hit[3] = hit[MOST + 6] = True
    assert bool(y[hit].isnan().all()) and torch.equal(y[~hit], clean[~hit])


def test_elsewhere_it_is_linear(product: Product, packed: Tensor) -> None:
    """Few rows, outputs that cuBLAS does not take, a single run, and a torch without such products."""
    bias = torch.randn(48)
    x = torch.randn(MOST + 1, 384)
    cases: list[tuple[Tensor, Tensor, Tensor | None]] = [
        (x[:MOST], packed, bias),
        (x[:0], packed, bias),
        (x, packed[:40], None),
        (x, packed[:0], None),
        (x[:, :RUN], packed[:, : FP8.block_bytes], bias),
    ]
    for case in cases:
        few, w, b = case
        assert torch.equal(emulated().linear_w8a8(few, w, "fp8", b), emulated().linear(few, w, "fp8", b))
    emulated().allow_fp8_products(False)
    assert torch.equal(emulated().linear_w8a8(x, packed, "fp8"), emulated().linear(x, packed, "fp8"))
    assert not product.shapes


def test_the_error_is_that_of_rounding(product: Product, packed: Tensor) -> None:
    """Each x is off by half a step of e4m3: 2^-4 of itself, or below 2^-6 of the scale 2^-10 of it. No output is further off
    than the weights make of that, and for numbers of random signs the whole is off by as much as quantized weights are."""
    x = uneven(200, 384)
    y = emulated().linear_w8a8(x, packed, "fp8").double()
    w = weights(packed)
    runs = x.double().abs().view(200, -1, RUN)
    step = (runs / 16).maximum(runs.amax(-1, keepdim=True) / 448 / 1024).view(200, -1)
    bound = step @ w.abs().t() * (1 + 2**-20) + 2**-24 * (x.double().abs() @ w.abs().t())
    assert bool(((y - x.double() @ w.t()).abs() <= bound).all())
    ordinary = slice(6, None)
    error = linear_error(y[ordinary], x[ordinary], packed, FP8)
    assert 0.5 * FP8.weight_error < error < 1.1 * FP8.weight_error


MISUSES = {
    "another format": lambda o: o.linear_w8a8(torch.zeros(200, 256), torch.zeros(4, 144, dtype=torch.uint8), "q4k"),
    "other columns": lambda o: o.linear_w8a8(torch.zeros(200, 256), torch.zeros(16, 3 * 132, dtype=torch.uint8), "fp8"),
    "another bias": lambda o: o.linear_w8a8(
        torch.zeros(200, 256), torch.zeros(16, 264, dtype=torch.uint8), "fp8", torch.zeros(15)
    ),
    "integer x": lambda o: o.linear_w8a8(torch.zeros(200, 256).long(), torch.zeros(16, 264, dtype=torch.uint8), "fp8"),
    "half a block": lambda o: o.linear_w8a8(torch.zeros(200, 256), torch.zeros(16, 140, dtype=torch.uint8), "fp8"),
}


@pytest.mark.parametrize("misuse", MISUSES.values(), ids=list(MISUSES))
def test_faults_are_those_of_the_cpu(product: Product, misuse: Any) -> None:
    said = []
    for namespace in (torch.ops.isqtorch, emulated()):
        with pytest.raises(ValueError) as caught:
            misuse(namespace)
        said.append(str(caught.value))
    assert said[0] == said[1]


# ---- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@every_dtype
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), [(129, 48, 384), (300, 1040, 1024), (2048, 9216, 8192)])
def test_on_a_gpu(m: int, n: int, k: int, with_bias: bool, dtype: torch.dtype) -> None:
    """With torch's product x is rounded, and nothing else beyond the sums in the matrix unit, which keep some 14 bits of the
    products that they align; without, it is `linear` itself."""
    x, w = torch.randn(m, k, device="cuda").to(dtype), torch.randn(n, k, device="cuda") / k**0.5
    packed, bias = ops.quantize(w, "fp8"), torch.randn(n, device="cuda").to(dtype) if with_bias else None
    y = torch.ops.isqtorch.linear_w8a8(x, packed, "fp8", bias)
    assert y.dtype == dtype and y.shape == (m, n) and y.is_contiguous()
    if no_fp8_products("cuda") is not None:
        assert torch.equal(y, ops.linear(x, packed, "fp8", bias))
        return
    xr, wr = (ops.dequantize(t, "fp8", torch.float32) for t in (ops.quantize(x, "fp8"), packed))
    want = xr.double() @ wr.double().t() + (0 if bias is None else bias.double())
    assert relative_error(y, want) < 2**-9 + 2 * ROUNDING[dtype]
    assert not torch.equal(y, ops.linear(x, packed, "fp8", bias))
    x[5, 7] = float("nan")
    again = torch.ops.isqtorch.linear_w8a8(x, packed, "fp8", bias)
    assert bool(again[5].isnan().all()) and bool(again[6:].isfinite().all()) and bool(again[:5].isfinite().all())


@pytest.mark.cuda
def test_a_graph_captures_it() -> None:
    x, packed = torch.randn(256, 1024, device="cuda").bfloat16(), ops.quantize(torch.randn(512, 1024).cuda(), "fp8")
    torch.ops.isqtorch.linear_w8a8_frozen(x, packed, "fp8")  # cuBLAS allocates its workspace
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = torch.ops.isqtorch.linear_w8a8_frozen(x, packed, "fp8")
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, torch.ops.isqtorch.linear_w8a8_frozen(x, packed, "fp8"))


@pytest.mark.cuda
def test_a_layer_on_a_gpu() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1024, 512, dtype=torch.bfloat16)).cuda()
    isqtorch.quantize_(model, "fp8", activations="fp8")
    x = torch.randn(2, 200, 1024, device="cuda", dtype=torch.bfloat16)
    y = model(x)
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), y)
    assert torch.equal(
        model(x[0, :8]), ops.linear(x[0, :8], model[0].weight, "fp8", model[0].bias)
    )  # few rows: as it is
    product = "_scaled_mm" in str(isqtorch.explain(model))
    assert product == (no_fp8_products("cuda") is None)
    assert torch.equal(y, ops.linear(x, model[0].weight, "fp8", model[0].bias)) != product
