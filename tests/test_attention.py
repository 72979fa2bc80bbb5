"""`attention`: a few queries over packed keys and values, natively and in plain torch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from isqtorch import ops
from isqtorch.formats.kv import KV_FORMATS, kv_format, kv_formats
from isqtorch.ops.attention import attention as reference

PAIRS = [("q8_0", "q8_0"), ("q4_0", "q4_0"), ("q8_0", "q4_0"), ("q5_1", "iq4_nl"), ("fp8", "afq4g32")]
SHAPES = [  # batch, heads of q, heads of k, queries, tokens, head_dim of keys, of values
    (1, 32, 8, 1, 700, 64, 64),
    (2, 9, 3, 1, 5, 64, 96),
    (1, 4, 4, 1, 257, 32, 32),
    (1, 4, 2, 3, 300, 128, 64),
    (2, 8, 1, 2, 1000, 256, 256),
    (1, 3, 3, 7, 65, 64, 64),
    (1, 2, 1, 1, 1, 32, 160),
]


@pytest.fixture(params=ops.cpu_info().isa_with_formats)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every level that has its own kernel and runs here."""
    if request.param not in ops.cpu_info().isa_supported:
        pytest.skip(f"no {request.param} here")
    ops.set_cpu_isa(request.param)
    yield request.param
    ops.set_cpu_isa("")


def made(shape: tuple[int, ...], k_format: str, v_format: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    batch, heads, groups, queries, tokens, dim, value_dim = shape
    generator = torch.Generator().manual_seed(sum(shape))
    q = torch.randn(batch, heads, queries, dim, generator=generator).to(dtype)
    k = ops.quantize(torch.randn(batch, groups, tokens, dim, generator=generator), k_format)
    v = ops.quantize(torch.randn(batch, groups, tokens, value_dim, generator=generator), v_format)
    return [q, k, v]


def masks(shape: tuple[int, ...]) -> list[Tensor | None]:
    batch, heads, _, queries, tokens, *_ = shape
    generator = torch.Generator().manual_seed(1)
    some = torch.rand(batch, 1, queries, tokens, generator=generator) > 0.3
    some[:, :, :, 0] = True
    added = torch.randn(1, heads, queries, tokens, generator=generator)
    return [
        None,
        some,
        added,
        torch.zeros(1, 1, 1, tokens).masked_fill(~some[:1, :, :1], torch.finfo(torch.float32).min),
    ]


def exact(q: Tensor, k: Tensor, v: Tensor, k_format: str, v_format: str, scale: float, mask: Tensor | None) -> Tensor:
    """The definition, in f64."""
    keys, values = (
        ops.dequantize(states, fmt, torch.float32).double().repeat_interleave(q.shape[1] // k.shape[1], 1)
        for states, fmt in ((k, k_format), (v, v_format))
    )
    scores = scale * q.double() @ keys.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    return torch.softmax(scores, -1) @ values


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def fits(shape: tuple[int, ...], pair: tuple[str, str]) -> bool:
    return "fp8" not in pair or shape[5] % 128 == 0


@pytest.mark.parametrize("pair", PAIRS, ids="/".join)
def test_it_is_attention_of_what_the_blocks_say(isa: str, pair: tuple[str, str]) -> None:
    for shape in SHAPES:
        if not fits(shape, pair):
            continue
        q, k, v = made(shape, *pair)
        for mask in masks(shape):
            wanted = exact(q, k, v, *pair, 0.2, mask)
            assert error(ops.attention(q, k, v, *pair, 0.2, mask), wanted) < 2e-6, (shape, mask is None)
            assert error(reference(q, k, v, *pair, 0.2, mask), wanted) < 2e-6, (shape, mask is None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_the_result_alone(isa: str, dtype: torch.dtype) -> None:
    q, k, v = made(SHAPES[0], "q8_0", "q4_0", dtype)
    found = ops.attention(q, k, v, "q8_0", "q4_0", 0.125, None)
    assert found.dtype == dtype
    precise = ops.attention(q.float(), k, v, "q8_0", "q4_0", 0.125, None)
    assert torch.equal(found, precise.to(dtype))


@pytest.mark.parametrize(
    ("pair", "bound"), [(("q8_0", "q8_0"), 1e-2), (("q8_0", "q4_0"), 0.12), (("q4_0", "q4_0"), 0.15)]
)
@pytest.mark.parametrize("dim", [64, 128])
def test_the_result_is_close_to_that_of_bf16(pair: tuple[str, str], bound: float, dim: int) -> None:
    """Keys of one head are alike, as in models: attention that looks everywhere averages all differences away."""
    generator = torch.Generator().manual_seed(dim)
    q = torch.randn(1, 32, 1, dim, generator=generator)
    k, v = torch.randn(2, 1, 8, 4096, dim, generator=generator)
    plain = torch.nn.functional.scaled_dot_product_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), enable_gqa=True)
    found = ops.attention(q.bfloat16(), ops.quantize(k, pair[0]), ops.quantize(v, pair[1]), *pair, dim**-0.5, None)
    assert error(found, plain) < bound


def test_threads_and_memory_layout_change_no_bit() -> None:
    shape = (2, 8, 2, 2, 900, 64, 64)
    q, k, v = made(shape, "q8_0", "q4_0")
    wanted = ops.attention(q, k, v, "q8_0", "q4_0", 0.1, None)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(ops.attention(q, k, v, "q8_0", "q4_0", 0.1, None), wanted)
    finally:
        torch.set_num_threads(threads)
    with_room = [torch.full((2, 2, 1000, s.shape[3]), 255, dtype=torch.uint8) for s in (k, v)]
    for room, states in zip(with_room, (k, v), strict=True):
        room[:, :, 50:950] = states
    across = q.transpose(1, 2).contiguous().transpose(1, 2)
    found = ops.attention(across, with_room[0][:, :, 50:950], with_room[1][:, :, 50:950], "q8_0", "q4_0", 0.1, None)
    assert torch.equal(found, wanted)
    turned = [s.transpose(0, 1).contiguous().transpose(0, 1) for s in (k, v)]
    assert torch.equal(ops.attention(q, *turned, "q8_0", "q4_0", 0.1, None), wanted)
    other = [torch.stack([s, s], 3)[:, :, :, 0] for s in (k, v)]  # rows apart
    assert torch.equal(ops.attention(q, *other, "q8_0", "q4_0", 0.1, None), wanted)


def test_a_query_that_sees_nothing_gets_zeros(isa: str) -> None:
    q, k, v = made((1, 2, 1, 3, 300, 32, 32), "q8_0", "q8_0")
    mask = torch.ones(1, 1, 3, 300, dtype=torch.bool)
    mask[:, :, 1] = False
    mask[:, :, 2, :270] = False  # a whole task of tokens is hidden
    for run in (ops.attention, reference):
        out = run(q, k, v, "q8_0", "q8_0", 1.0, mask)
        assert not out[:, :, 1].any()
        alone = run(q, k[:, :, 270:], v[:, :, 270:], "q8_0", "q8_0", 1.0, None)
        assert error(out[:, :, 2], alone[:, :, 2]) < 1e-6
        assert run(q[:, :, :0], k, v, "q8_0", "q8_0", 1.0, None).shape == (1, 2, 0, 32)
        assert not run(q, k[:, :, :0], v[:, :, :0], "q8_0", "q8_0", 1.0, None).any()


def test_nan_in_a_query_is_not_hidden(isa: str) -> None:
    q, k, v = made((1, 2, 1, 2, 600, 32, 32), "q8_0", "q8_0")
    q[0, 1, 1, 3] = torch.nan
    out = ops.attention(q, k, v, "q8_0", "q8_0", 1.0, None)
    assert out[0, 1, 1].isnan().all() and out.isnan().sum() == 32


def test_extreme_scores_are_no_fault(isa: str) -> None:
    q, k, v = made((1, 4, 2, 1, 600, 64, 64), "q8_0", "q8_0")
    for scale in (0.0, 1e4, -1e4, 1e-30):
        wanted = exact(q, k, v, "q8_0", "q8_0", scale, None)
        assert error(ops.attention(q, k, v, "q8_0", "q8_0", scale, None), wanted) < 1e-5


FAULTS = {
    "q must be one of": {"q": torch.zeros(1, 2, 1, 32, dtype=torch.float64)},
    "q must have 4 dimensions": {"q": torch.zeros(2, 1, 32)},
    "k must have 4 dimensions": {"k": torch.zeros(1, 5, 34, dtype=torch.uint8)},
    "a packed weight is uint8, got float32": {"v": torch.zeros(1, 1, 5, 34)},
    "must be a positive multiple of 34 bytes, got 33": {"v": torch.zeros(1, 1, 5, 33, dtype=torch.uint8)},
    "the same batch, heads and tokens": {"v": torch.zeros(1, 1, 4, 34, dtype=torch.uint8)},
    "the last dimension of q must be 32": {"q": torch.zeros(1, 2, 1, 64)},
    "a multiple of its heads": {"q": torch.zeros(2, 2, 1, 32)},
    'no .*kernels for the format "q9"': {"k_format": "q9"},
    "mask must have shape": {"mask": torch.zeros(1, 1, 1, 4)},
    "mask must be bool or one of": {"mask": torch.zeros(1, 1, 1, 5, dtype=torch.int32)},
}


@pytest.mark.parametrize("message", FAULTS)
def test_faults_are_named_alike(message: str) -> None:
    rows = torch.zeros(1, 1, 5, 34, dtype=torch.uint8)
    good = {"q": torch.zeros(1, 2, 1, 32), "k": rows, "v": rows, "k_format": "q8_0", "v_format": "q8_0", "scale": 1.0}
    arguments = {**good, "mask": None, **FAULTS[message]}
    found = []
    for run in (ops.attention, reference):
        with pytest.raises(ValueError, match=message) as fault:
            run(*arguments.values())
        found.append(re.sub("quantized CPU kernels|CPU kernels", "kernels", str(fault.value)))
    assert found[0] == found[1]
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        ops.attention(*(a.to("meta") if isinstance(a, Tensor) else a for a in arguments.values()))


def test_tracing_knows_the_shape() -> None:
    arguments = (*made((1, 4, 2, 2, 40, 64, 96), "q8_0", "q4_0"), "q8_0", "q4_0", 0.5, None)
    torch.library.opcheck(torch.ops.isqtorch.attention.default, arguments)
    compiled = torch.compile(lambda *a: ops.attention(*a) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), ops.attention(*arguments) * 2)


def test_words_for_formats() -> None:
    assert [kv_format(w) for w in (8, "8", "q8_0", 5, 4, "Q4_0")] == ["q8_0", "q8_0", "q8_0", "q5_1", "q4_0", "q4_0"]
    assert kv_formats("q8_0/4") == ("q8_0", "q4_0") == kv_formats(8, "q4_0")
    for fmt, values in itertools.product(KV_FORMATS, repeat=2):
        assert kv_formats(f"{fmt}/{values}") == (fmt, values)
    for wrong in (3, "q4k", True, "q8_0/", None, 8.0):
        with pytest.raises(ValueError, match="q8_0, q5_1"):
            kv_formats(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="twice"):
        kv_formats("q8_0/q4_0", "q4_0")
