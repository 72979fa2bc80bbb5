"""The reference ops: properties of the quantizers, and what they do with unusual and wrong arguments."""

from __future__ import annotations

import pytest
import torch
from helpers import FORMATS, every_variant, relative_error, run_flushing_denormals, same_bits, weight
from torch import Tensor

from isqtorch.formats import QuantFormat, get_format
from isqtorch.ops.reference import dequantize, embedding, linear, quantize
from isqtorch.quantizers.hqq import hqq_solve, store_f16
from isqtorch.quantizers.rounding import nearest_int, ordered_sum, round_half_away

WEIGHTED = [fmt for fmt in FORMATS if fmt.takes_importance]
weighted = pytest.mark.parametrize("fmt", WEIGHTED, ids=lambda fmt: fmt.name)


def round_trip(w: Tensor, fmt: QuantFormat, **options: object) -> Tensor:
    return dequantize(quantize(w, fmt.name, **options), fmt.name, torch.float32)


# ---- quality ---------------------------------------------------------------------------------------------------------


@every_variant
def test_error_on_normal_weights(fmt: QuantFormat) -> None:
    w = weight(fmt, rows=64, blocks=1024 // fmt.block)
    error = relative_error(round_trip(w, fmt), w)
    assert 0.85 * fmt.weight_error < error <= fmt.weight_error


def hard_weights(fmt: QuantFormat) -> dict[str, tuple[Tensor, float]]:
    """Weights, and how much larger than on normal ones the relative error may be."""
    w = weight(fmt, rows=8)
    outliers = w.clone()
    outliers[:, ::37] *= 50
    mixed = w.clone()
    mixed[3] = 0
    mixed[:, : fmt.block] = 0
    return {
        "negative": (-w.abs() - 0.1, 1.3),
        "positive": (w.abs() + 0.1, 1.3),
        "outliers": (outliers, 4.0),
        "zero blocks": (mixed, 1.1),
        "small": (w * 1e-2, 1.1),
    }


@every_variant
def test_error_on_hard_weights(fmt: QuantFormat) -> None:
    for name, (w, factor) in hard_weights(fmt).items():
        decoded = round_trip(w, fmt)
        assert bool(decoded.isfinite().all()), name
        assert relative_error(decoded, w) <= factor * fmt.weight_error, name


@every_variant
def test_zero_rows_stay_zero(fmt: QuantFormat) -> None:
    w = weight(fmt, rows=3)
    w[1] = 0
    decoded = round_trip(w, fmt)
    assert not bool(decoded[1].any())
    assert not bool(round_trip(-torch.zeros(2, fmt.block), fmt).any())


@every_variant
@pytest.mark.parametrize("scale", [1e-44, 1e-39, 1e-30, 1e-7])
def test_tiny_weights_never_give_garbage(fmt: QuantFormat, scale: float) -> None:
    w = weight(fmt, rows=4) * scale
    decoded = round_trip(w, fmt)
    assert bool(decoded.isfinite().all())
    assert float((decoded - w).abs().max()) <= max(2 * float(w.abs().max()), 2e-7)


@every_variant
@pytest.mark.parametrize("scale", [1e5, 1e7, 1e9, 1e15, 1e19, 1e37])
def test_huge_weights_are_right_or_refused(fmt: QuantFormat, scale: float) -> None:
    w = weight(fmt, rows=4) * scale
    for importance in (None, torch.rand(w.shape[1])) if fmt.takes_importance else (None,):
        try:
            decoded = round_trip(w, fmt, importance=importance)
        except ValueError as error:
            assert f"block of {fmt.name} from weight[" in str(error)
        else:
            assert relative_error(decoded, w) <= 1.3 * fmt.weight_error


@weighted
def test_importance_lowers_the_weighted_error(fmt: QuantFormat) -> None:
    w = weight(fmt, rows=32, blocks=1024 // fmt.block)
    importance = torch.rand(w.shape[1], generator=torch.Generator().manual_seed(1)) ** 4 * 10 + 0.01

    def weighted_error(decoded: Tensor) -> float:
        return float((importance * (decoded - w).square()).sum())

    assert weighted_error(round_trip(w, fmt, importance=importance)) < 0.93 * weighted_error(round_trip(w, fmt))


def test_affine_codes_from_rounded_scales_are_better_at_8_bits() -> None:
    fmt = get_format("afq8")
    w = weight(fmt, rows=64, blocks=16)
    assert relative_error(round_trip(w, fmt), w) < 0.85 * relative_error(round_trip(w, fmt, rule="mlx"), w)


def test_affine_scales_in_the_subnormal_range_of_f16() -> None:
    fmt = get_format("afq8.f16")
    w = weight(fmt, rows=64, blocks=16) * 1e-5
    assert relative_error(round_trip(w, fmt), w) < 0.007
    assert relative_error(round_trip(w, fmt, rule="mlx"), w) > 0.1  # MLX's codes do not belong to such scales


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("offset", [0.25, -3.0, 40.0, -1000.0])
def test_hqq_groups_far_from_zero(bits: int, offset: float) -> None:
    """Their zero point may exceed f16; it is never stored as infinity, and values keep the precision of f16."""
    fmt = get_format(f"hqq{bits}")
    for width in (0.0, 1e-5, 1e-3):
        w = offset + width * weight(fmt, rows=4)
        step = 8 * width / (2**bits - 1)
        # half a step, or a part in 2048 of the value; and groups narrower than 1e-4 become constants
        assert float((round_trip(w, fmt) - w).abs().max()) <= step + abs(offset) / 2000 + 1e-4


def test_hqq_codes_belong_to_the_stored_zero() -> None:
    fmt = get_format("hqq8")
    w = 1.0 + 0.01 * weight(fmt, rows=64)
    groups = w.view(-1, 64)
    solution = hqq_solve(groups, 8, round_zero=False)
    stored = store_f16(groups, solution, 8)
    chosen, solved = fmt.decode(stored), fmt.decode({**stored, "q": solution.codes})
    assert relative_error(chosen, groups) < 0.8 * relative_error(solved, groups)


# ---- shapes, strides, types ------------------------------------------------------------------------------------------


@every_variant
def test_matrices_are_independent(fmt: QuantFormat) -> None:
    w = weight(fmt, rows=6).view(2, 3, -1)
    packed = quantize(w, fmt.name)
    assert packed.shape == (2, 3, fmt.row_bytes(w.shape[-1])) and packed.dtype == torch.uint8
    for e in range(2):
        assert torch.equal(packed[e], quantize(w[e], fmt.name))
    assert torch.equal(quantize(w[None], fmt.name)[0], packed)
    assert torch.equal(dequantize(packed, fmt.name, torch.float32)[1], dequantize(packed[1], fmt.name, torch.float32))


@weighted
def test_importance_per_matrix(fmt: QuantFormat) -> None:
    w = weight(fmt, rows=6).view(2, 3, -1)
    importance = torch.rand(2, w.shape[-1])
    packed = quantize(w, fmt.name, importance)
    for e in range(2):
        assert torch.equal(packed[e], quantize(w[e], fmt.name, importance[e]))
    shared = quantize(w, fmt.name, importance[0])
    assert torch.equal(shared[1], quantize(w[1], fmt.name, importance[0]))


def test_importance_is_ignored_where_there_is_no_search() -> None:
    for name in ("q8_0", "q8k", "afq4", "hqq4", "fp8"):
        w = weight(get_format(name))
        assert torch.equal(quantize(w, name, torch.rand(w.shape[1])), quantize(w, name))


@every_variant
def test_no_rows(fmt: QuantFormat) -> None:
    for shape in ((0, fmt.block), (0, 4, fmt.block), (3, 0, fmt.block)):
        packed = quantize(torch.empty(shape), fmt.name, torch.ones(fmt.block))
        assert packed.shape == (*shape[:-1], fmt.block_bytes)
        assert dequantize(packed, fmt.name, torch.float16).shape == shape


@every_variant
def test_strides_do_not_matter(fmt: QuantFormat) -> None:
    w = weight(fmt, rows=4)
    packed = quantize(w, fmt.name)
    assert torch.equal(quantize(w.t().contiguous().t(), fmt.name), packed)
    padded = torch.randn(8, w.shape[1] + 3)
    padded[::2, 1:-2] = w
    assert torch.equal(quantize(padded[::2, 1:-2], fmt.name), packed)
    shifted = torch.cat([torch.zeros(4, 5, dtype=torch.uint8), packed], dim=1)[:, 5:]
    assert same_bits(dequantize(shifted, fmt.name, torch.float32), dequantize(packed, fmt.name, torch.float32))


@every_variant
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weight_types(fmt: QuantFormat, dtype: torch.dtype) -> None:
    w = weight(fmt).to(dtype)
    packed = quantize(w, fmt.name)
    assert torch.equal(packed, quantize(w.float(), fmt.name))
    exact = dequantize(packed, fmt.name, torch.float32)
    if dtype != torch.float64:
        assert torch.equal(dequantize(packed, fmt.name, dtype), exact.to(dtype))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_bytes_do_not_depend_on_flushed_denormals(fmt: QuantFormat) -> None:
    w = torch.cat([weight(fmt, rows=12, blocks=1024 // fmt.block) * scale for scale in (1.0, 1e-7, 1e-19, 1e-30)])
    importance = torch.rand(w.shape[1]) * 1e-6
    packed = quantize(w, fmt.name, importance)
    decoded = dequantize(packed, fmt.name, torch.float32)

    def check() -> None:
        assert torch.equal(quantize(w, fmt.name, importance), packed)
        assert torch.equal(dequantize(packed, fmt.name, torch.float32).view(torch.int32), decoded.view(torch.int32))

    run_flushing_denormals(check)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_linear_and_embedding(fmt: QuantFormat) -> None:
    w = weight(fmt, rows=7)
    packed = quantize(w, fmt.name)
    exact = dequantize(packed, fmt.name, torch.float32)
    bias = torch.randn(7, dtype=torch.bfloat16)
    for shape in ((w.shape[1],), (0, w.shape[1]), (2, 3, w.shape[1])):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            x = torch.randn(shape).to(dtype)
            want = (x.float() @ exact.t() + bias.float()).to(dtype)
            torch.testing.assert_close(linear(x, packed, fmt.name, bias), want)
            assert linear(x, packed, fmt.name).shape == (*shape[:-1], 7)
    ids = torch.tensor([[6, 0], [3, 3]], dtype=torch.int32)
    assert torch.equal(embedding(ids, packed, fmt.name, torch.bfloat16), exact[ids.long()].bfloat16())
    assert embedding(ids[:0], packed, fmt.name, torch.float32).shape == (0, 2, w.shape[1])


# ---- wrong arguments -------------------------------------------------------------------------------------------------

W = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
BAD = W.clone()


BAD[3, 17] = float("nan")


BAD[3, 200] = float("inf")
HUGE = W.double()


HUGE[1, 2] = 1e300
NEGATIVE = torch.ones(256)


NEGATIVE[5] = -1.0


QUANTIZE_FAULTS = [
    ("unknown format", (W, "q4_x"), 'no kernels for the format "q4_x"'),
    ("integer weight", (W.int(), "q4k"), "weight must be one of float32, float16, bfloat16, float64, got int32"),
    ("vector", (W[0], "q4k"), r"at least 2 dimensions \[N, K\], got shape \[256\]"),
    ("no columns", (W[:, :0], "q4k"), "in_features must be a positive multiple of 256, got 0"),
    ("part of a block", (W[:, :100], "q8_0"), "in_features must be a positive multiple of 32, got 100"),
    ("way out", (W[:, :96], "q4k"), r"Use a format with a smaller block \(q5_0\)"),
    ("nan", (BAD, "q4k"), r"weight\[3, 17\] is nan; q4k needs finite values"),
    ("inf", (BAD[:, 18:].repeat(1, 128)[None], "hqq4"), r"weight\[0, 3, 182\] is inf"),
    ("too large for f32", (HUGE, "q8_0"), r"weight\[1, 2\] is 1e\+300, which float32 cannot hold"),
    ("importance length", (W, "q4k", torch.ones(255)), r"shape \[256\], one value per column.*got \[255\]"),
    (
        "importance of experts",
        (W[None], "q4k", torch.ones(2, 256)),
        r"or \[1, 256\], one vector per matrix; got \[2, 256\]",
    ),
    ("negative importance", (W, "q4k", NEGATIVE), r"importance\[5\] is -1"),
    ("infinite importance", (W, "q8_0", torch.full((256,), float("inf"))), r"importance\[0\] is inf"),
    (
        "integer importance",
        (W, "q4k", torch.ones(256, dtype=torch.int64)),
        "importance must be a float tensor, got int64",
    ),
    ("unknown rule", (W, "afq4", None, "fast"), "afq4 has no rule 'fast'. Use rule=None or 'mlx'"),
    ("rule of another family", (W, "q4k", None, "mlx"), "q4k has no rule 'mlx'. Use rule=None."),
    (
        "f16 scales",
        (W * 1e6, "afq4.f16"),
        r"block of afq4.f16 from weight\[0, 0\] on holds values too large.*Use afq4, which has bf16",
    ),
    ("f16 scales, mlx", (W * 1e6, "afq4.f16", None, "mlx"), "too large for its 16-bit scale. Use afq4, which"),
    (
        "bf16 scales",
        (W.clamp(-3, 3) * 1.1e38, "afq4"),
        "block of afq4 from .* Scale the weight down, or use a format with a wider scale",
    ),
    ("q4_1 minimum", (1e5 - W.abs(), "q4_1"), "block of q4_1 from weight.0, 0. on holds values too large"),
    ("hqq scale", (W * 1e7, "hqq4"), "block of hqq4 from .* too large for its 16-bit scale"),
]


@pytest.mark.parametrize(("arguments", "message"), [pytest.param(*fault[1:], id=fault[0]) for fault in QUANTIZE_FAULTS])
def test_wrong_arguments_of_quantize(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(*arguments)  # type: ignore[arg-type]


def test_wrong_arguments_of_the_other_ops() -> None:
    packed = quantize(W, "q4k")
    with pytest.raises(ValueError, match=r"dequantize: a packed weight is uint8, got float32"):
        dequantize(W, "q4k", torch.float32)
    with pytest.raises(ValueError, match=r"q4k: a packed row must be a positive multiple of 144 bytes, got 143"):
        dequantize(packed[:, 1:], "q4k", torch.float32)
    with pytest.raises(ValueError, match=r"dequantize: dtype must be one of float32, float16, bfloat16, got int32"):
        dequantize(packed, "q4k", torch.int32)
    with pytest.raises(
        ValueError, match=r"linear: the last dimension of x must be 256, the in_features of this q4k weight"
    ):
        linear(torch.randn(2, 128), packed, "q4k")
    with pytest.raises(ValueError, match=r"linear: x must be one of float32, float16, bfloat16, got float64"):
        linear(W.double(), packed, "q4k")
    with pytest.raises(ValueError, match=r"linear: bias must have shape \[4\], got \[5\]"):
        linear(W, packed, "q4k", torch.zeros(5))
    with pytest.raises(ValueError, match=r"linear: a packed weight must have 2 dimensions"):
        linear(W, packed[None], "q4k")
    with pytest.raises(ValueError, match=r"embedding: ids must be int64 or int32, got float32"):
        embedding(torch.zeros(2), packed, "q4k", torch.float32)
    with pytest.raises(IndexError, match=r"embedding: ids\[1, 0\] is 4, but the table has 4 rows"):
        embedding(torch.tensor([[0], [4]]), packed, "q4k", torch.float32)


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def test_rounding_helpers() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 0.49999997, -0.49999997, 126.5, 4194303.0, 0.0])
    assert nearest_int(x).tolist() == [0, 2, 2, 0, -2, 0, 0, 126, 4194303, 0]
    assert round_half_away(x).tolist() == [1, 2, 3, -1, -2, 0, 0, 127, 4194303, 0]
    assert nearest_int(torch.tensor([4194304.0, 1e10, float("inf"), float("nan")])).tolist()[:1] == [-4194304]


def test_ordered_sum() -> None:
    terms = torch.randn(100, 3) * 10 ** torch.randn(100, 3)
    want = torch.zeros(3)
    for term in terms:
        want = want + term
    assert same_bits(ordered_sum(terms), want)
    zeros = torch.full((2, 1), -0.0)
    assert same_bits(ordered_sum(zeros), torch.zeros(1))
    assert same_bits(ordered_sum(zeros, start=None), -torch.zeros(1))
