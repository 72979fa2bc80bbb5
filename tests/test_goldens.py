"""Every array of the golden files, byte for byte where the format promises it. golden/README.md describes the keys."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import golden, same_bits
from torch import Tensor

from isqtorch.formats import get_format
from isqtorch.formats.fp8 import e4m3_table
from isqtorch.ops import reference
from isqtorch.quantizers.affine import affine_mlx
from isqtorch.quantizers.fp8 import encode_e4m3
from isqtorch.quantizers.hqq import HqqSolution, hqq_solve, store_f16
from isqtorch.tensor import QuantizedTensor

Mode = Callable[[Callable[[], None]], None]

# ---- ggml ------------------------------------------------------------------------------------------------------------

GGML = golden("ggml_public") | golden("ggml_levels")
SETS: dict[tuple[str, str], list[str]] = defaultdict(list)  # (type, variant) -> cases
for _key in GGML:
    if _key.startswith("q/"):
        _, _type, _case, _variant = _key.split("/")
        SETS[_type, _variant].append(_case)

ggml_sets = pytest.mark.parametrize(
    ("kind", "variant"), [pytest.param(*key, id="-".join(key).lower().replace("_k", "k")) for key in SETS]
)


def by_width(cases: list[str]) -> list[list[str]]:
    """Cases whose rows can be stacked."""
    groups: dict[int, list[str]] = defaultdict(list)
    for case in cases:
        groups[GGML[f"x/{case}"].shape[1]].append(case)
    return list(groups.values())


def assert_cases(got: Tensor, want: list[Tensor], cases: list[str]) -> None:
    """`got` must be the rows of `want`, one after the other, byte for byte."""
    wrong = []
    for case, part, expected in zip(cases, got.split([len(rows) for rows in want]), want, strict=True):
        different = int((part.contiguous().view(torch.uint8) != expected.view(torch.uint8)).sum())
        if different:
            wrong.append(f"{case}: {different} of {expected.nbytes} bytes")
    assert not wrong, "; ".join(wrong)


def test_golden_ggml_is_complete() -> None:
    assert sum(map(len, SETS.values())) == 1664 + 253


@ggml_sets
def test_golden_ggml_quantize(kind: str, variant: str, impl: Any, float_mode: Mode) -> None:
    fmt = get_format(kind)

    def check() -> None:
        for cases in by_width(SETS[kind, variant]):
            rows = [GGML[f"x/{case}"] for case in cases]
            w = torch.cat(rows)[:, None]  # [R, 1, K]: a matrix per row, so that each can have its own importance
            importance = None
            if variant != "none":
                vectors = [GGML[f"imx/{case}/{variant}"] for case in cases]
                importance = torch.cat([v.expand(len(x), -1) for v, x in zip(vectors, rows, strict=True)])  # [R, K]
            packed = impl.quantize(w, fmt.name, importance, None)
            assert_cases(packed[:, 0], [GGML[f"q/{kind}/{case}/{variant}"] for case in cases], cases)

    float_mode(check)


@ggml_sets
def test_golden_ggml_dequantize(kind: str, variant: str, impl: Any, float_mode: Mode) -> None:
    fmt = get_format(kind)

    def check() -> None:
        for cases in by_width(SETS[kind, variant]):
            packed = torch.cat([GGML[f"q/{kind}/{case}/{variant}"] for case in cases])
            decoded = impl.dequantize(packed, fmt.name, torch.float32)
            assert_cases(decoded, [GGML[f"dq/{kind}/{case}/{variant}"] for case in cases], cases)

    float_mode(check)


@pytest.mark.parametrize("kind", ["q4_0", "q5_1", "q3_K", "q4_K", "q6_K", "iq4_nl", "iq4_xs"])
def test_golden_ggml_matrix_with_one_importance_vector(kind: str, impl: Any) -> None:
    cases = ("normal_3x512", "normal_3x64", "levels-normal_3x64", "levels-normal_2x512")
    case = next(case for case in cases if f"q/{kind}/{case}/pos" in GGML)
    packed = impl.quantize(GGML[f"x/{case}"], get_format(kind).name, GGML[f"imx/{case}/pos"], None)
    assert torch.equal(packed, GGML[f"q/{kind}/{case}/pos"])


# ---- AFQ -------------------------------------------------------------------------------------------------------------

AFFINE = golden("affine")
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_golden_afq_rule(bits: int, dtype: str, float_mode: Mode) -> None:
    def check() -> None:
        w = AFFINE[f"afq/{dtype}/W"].float()
        for group in GROUPS:
            at = f"afq/{dtype}/b{bits}_g{group}/"
            codes, scale, bias = affine_mlx(w.reshape(-1, group), bits)
            assert torch.equal(codes.view_as(w), AFFINE[at + "codes"]), at
            scales, biases = AFFINE[at + "scales"], AFFINE[at + "biases"]
            assert torch.equal(scale.to(scales.dtype).view_as(scales), scales), at
            assert torch.equal(bias.to(biases.dtype).view_as(biases), biases), at

    float_mode(check)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("bits", BITS)
def test_golden_afq_packed(bits: int, dtype: str, impl: Any, float_mode: Mode) -> None:
    def check() -> None:
        w = AFFINE[f"afq/{dtype}/W"]
        for group in GROUPS:
            at = f"afq/{dtype}/b{bits}_g{group}/"
            fmt = get_format(f"afq{bits}g{group}.{dtype}")
            packed = QuantizedTensor(impl.quantize(w, fmt.name, None, "mlx"), fmt, w.shape, w.dtype)
            mlx = [AFFINE[at + part] for part in ("wq", "scales", "biases")]
            for got, want in zip(packed.to_mlx(), mlx, strict=True):
                assert got.dtype == want.dtype
                assert torch.equal(got.view(torch.uint8), want.view(torch.uint8)), at
            back = QuantizedTensor.from_mlx(*mlx, bits=bits)
            assert back.format is fmt and back.shape == w.shape and torch.equal(back.data, packed.data)

            codes = AFFINE[at + "codes"].view(*w.shape[:1], -1, group).float()
            scale, bias = mlx[1].float()[..., None], mlx[2].float()[..., None]
            exact = (scale * codes + bias).view_as(w)
            assert torch.equal(impl.dequantize(packed.data, fmt.name, torch.float32), exact)
            room = torch.finfo(w.dtype).eps * ((scale * codes).abs() + bias.abs()).view_as(w)  # MLX rounds twice
            assert bool(((AFFINE[at + "deq"].float() - exact).abs() <= room).all())

    float_mode(check)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("bits", BITS)
def test_golden_afq_linear(bits: int, dtype: str) -> None:
    x = AFFINE[f"afq/{dtype}/x"].float()
    for group in GROUPS:
        at = f"afq/{dtype}/b{bits}_g{group}/"
        packed = QuantizedTensor.from_mlx(*(AFFINE[at + part] for part in ("wq", "scales", "biases")), bits=bits)
        y = reference.linear(x, packed.data, packed.format.name)
        size = x.abs() @ reference.dequantize(packed.data, packed.format.name, torch.float32).abs().t()
        assert bool(((y - AFFINE[at + "y_ref64"]).abs() <= 2e-6 * size).all()), at


# ---- HQQ -------------------------------------------------------------------------------------------------------------

KINDS = ("normal_64x128", "heavy_32x128", "outliers_64x64", "edge_40x64")


def groups_of(kind: str, axis: int) -> Tensor:
    """The groups of W as rows: axis 1 cuts runs of 64 values, axis 0 takes every R-th value."""
    w = AFFINE[f"hqq/{kind}/W"]
    return w.reshape(-1, 64) if axis else w.reshape(64, -1).t().contiguous()


@pytest.mark.parametrize("variant", ["b8", "b4_rz", "b4", "b3", "b2"])
@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("kind", KINDS)
def test_golden_hqq_solver(kind: str, axis: int, variant: str) -> None:
    bits, _, rounded = variant.partition("_")
    at = f"hqq/{kind}/{bits}_g64_ax{axis}{'_rz' if rounded else ''}/"
    got = hqq_solve(groups_of(kind, axis), int(bits[1]), round_zero=bool(rounded))
    codes = AFFINE[at + "W_q"] if axis else AFFINE[at + "W_q"].t()
    zero, trace = AFFINE[at + "zero"].reshape(-1), AFFINE[at + "err_trace"]
    assert (got.codes == codes).double().mean() >= 0.9999
    assert ((got.zero - zero).abs() / zero.abs().clamp(min=1)).max() <= 1e-5
    torch.testing.assert_close(got.scale, AFFINE[at + "scale"].reshape(-1), rtol=1e-6, atol=0)
    # the package stops when its f32 mean stands still, an iteration before or after the exact one; not where it matters
    assert abs(len(got.errors) - len(trace)) <= (0 if axis else 1)
    assert abs(got.errors[-1] / float(trace[-1]) - 1) <= 1e-4


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_golden_hqq_packed(kind: str, bits: int, impl: Any, float_mode: Mode) -> None:
    fmt = get_format(f"hqq{bits}")
    at = f"hqq/{kind}/b{bits}_g64_ax1{'_rz' if bits == 4 else ''}/"
    w = AFFINE[f"hqq/{kind}/W"]
    scale, zero = AFFINE[at + "scale"], AFFINE[at + "zero"]

    def check() -> None:
        package = HqqSolution(AFFINE[at + "W_q"], scale[:, 0], zero[:, 0], ())
        want = store_f16(groups_of(kind, 1), package, bits)
        got = fmt.unpack(impl.quantize(w, fmt.name, None, None).view(-1, fmt.block_bytes))
        assert torch.equal(got["scale"], want["scale"])
        torch.testing.assert_close(got["zero"], want["zero"], rtol=2**-10, atol=1e-4)
        assert (got["q"] == want["q"]).double().mean() >= 0.999

        theirs = QuantizedTensor.from_hqq(AFFINE[at + "W_q_packed"], scale, zero, shape=w.shape)
        assert theirs.format is fmt
        codes, half_scale, half_zero = theirs.to_hqq()
        assert torch.equal(codes, AFFINE[at + "W_q_packed"])
        assert torch.equal(half_scale, scale.half()) and torch.equal(half_zero, zero.half())
        decoded = impl.dequantize(theirs.data, fmt.name, torch.float32)
        exact = (AFFINE[at + "W_q"].float() - half_zero.float()) * half_scale.float()
        assert torch.equal(decoded, exact.view_as(w))
        # f16 keeps scale and zero to 1 part in 2048
        room = 1.01 * 2**-11 * (zero.abs() + (AFFINE[at + "W_q"].float() - zero).abs()) * scale
        assert bool(((decoded - AFFINE[at + "deq_f32"]).abs().view(-1, 64) <= room + 1e-7).all())

    float_mode(check)


# ---- FP8 -------------------------------------------------------------------------------------------------------------


def fp8_tables() -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs as f32 and the codes they must get."""
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    return {
        "f32": (AFFINE["fp8/f32_in"], AFFINE["fp8/f32_out"]),
        "f16_all": (patterns.view(torch.float16).float(), AFFINE["fp8/f16_all_out"]),
        "bf16_all": (patterns.view(torch.bfloat16).float(), AFFINE["fp8/bf16_all_out"]),
    }


def test_golden_fp8_decode(impl: Any, float_mode: Mode) -> None:
    def check() -> None:
        table = AFFINE["fp8/decode_table"]
        assert torch.equal(e4m3_table().nan_to_num(nan=1e9), table.nan_to_num(nan=1e9))
        codes = torch.arange(256, dtype=torch.uint8).view(2, 128)
        packed = get_format("fp8").pack({"scale": torch.ones(2), "q": codes})
        decoded = impl.dequantize(packed, "fp8", torch.float32).view(256)
        assert same_bits(decoded.nan_to_num(nan=1e9), table.nan_to_num(nan=1e9))

    float_mode(check)


@pytest.mark.parametrize("name", ["f32", "f16_all", "bf16_all"])
def test_golden_fp8_encode(name: str, float_mode: Mode) -> None:
    def check() -> None:
        values, want = fp8_tables()[name]
        got = encode_e4m3(values)
        nan = (want & 0x7F) == 0x7F  # torch does not define the sign of a NaN
        assert torch.equal(nan, values.isnan())
        assert torch.equal(got[~nan], want[~nan]) and bool((got[nan] & 0x7F == 0x7F).all())

    float_mode(check)


@pytest.mark.parametrize("name", ["f32", "f16_all", "bf16_all"])
def test_golden_fp8_quantize(name: str, impl: Any, float_mode: Mode) -> None:
    fmt = get_format("fp8")
    values, want = fp8_tables()[name]
    usable = values.abs() <= 448  # in a block with 448 the scale is 1
    values, want = values[usable], want[usable]
    padding = -len(values) % 127
    values = torch.cat([values, torch.zeros(padding)]).view(-1, 127)
    w = torch.cat([values, torch.full((len(values), 1), 448.0)], dim=1)  # [blocks, 128]

    def check() -> None:
        fields = fmt.unpack(impl.quantize(w, "fp8", None, None))
        assert bool((fields["scale"] == 1).all())
        assert torch.equal(fields["q"][:, :127].reshape(-1)[: len(want)], want)

    float_mode(check)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("recipe", ["tensor", "row", "block128"])
def test_golden_fp8_matrices(recipe: str, dtype: str) -> None:
    """Scales per tensor, row or square are not a format here, but the codes under them follow the same rule."""
    w, scale = AFFINE[f"fp8/{dtype}/W"].float(), AFFINE[f"fp8/{dtype}/{recipe}/scale"]
    for dim in (0, 1):
        scale = scale.repeat_interleave(w.shape[dim] // scale.shape[dim], dim=dim)
    assert torch.equal(encode_e4m3(w / scale), AFFINE[f"fp8/{dtype}/{recipe}/q"])
