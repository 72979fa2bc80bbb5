"""Metal on the emulator: right shaders come out right, with arguments as torch.mps takes them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from emulator.metal import races, runner
from helpers import GPU_ORDERS
from metal_selftest import group_sum, nan, needs_compiler, needs_tsan, numbers, selftest

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def library() -> runner.Library:
    return selftest()


def reverse_twice(library: runner.Library, variant: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    x, y = numbers(64), nan(64)
    getattr(library, f"reverse_twice{variant}")(x, y, threads=64, group_size=64)
    return y, x + 1


def neighbour(library: runner.Library, variant: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    x, y = numbers(32), nan(32)
    getattr(library, f"neighbour{variant}")(x, y, threads=32, group_size=32)
    return y, x.roll(-1) + x.roll(1)


EXCHANGES = [group_sum, reverse_twice, neighbour]
Case = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@pytest.mark.parametrize("case", EXCHANGES)
def test_threads_exchange_through_memory(library: runner.Library, case: Case, metal_order: str) -> None:
    got, expected = case(library)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("case", EXCHANGES)
def test_a_missing_barrier_shows_in_some_order(library: runner.Library, case: Case) -> None:
    wrong = 0
    for name in GPU_ORDERS:
        with runner.schedule(name):
            got, expected = case(library, "_without_barrier")
            wrong += not torch.equal(got, expected)
    assert wrong


@needs_tsan
@pytest.mark.parametrize("case", EXCHANGES)
def test_thread_sanitizer_finds_a_missing_barrier(library: runner.Library, case: Case) -> None:
    with runner.recording() as launches:
        case(library)
    assert races.find(launches) == ""
    with runner.recording() as launches:
        case(library, "_without_barrier")
    assert "data race" in races.find(launches)


def test_simd_and_quad_functions(library: runner.Library, metal_order: str) -> None:
    x, y = numbers(32), nan(18, 32)
    library.simd_functions(x, y, threads=32, group_size=32)
    quads = x.reshape(8, 4)
    down, up = x.clone(), x.clone()
    down[:28], up[4:] = x[4:], x[:28]
    ballot = sum(1 << i for i in range(32) if x[i] > 0)
    expected = [
        x.sum().expand(32),
        x.min().expand(32),
        x.max().expand(32),
        x.cumsum(0) - x,
        x.cumsum(0),
        x[5].expand(32),
        x[torch.arange(32) ^ 3],
        down,
        up,
        x.roll(-4),
        x[0].expand(32),
        torch.tensor(float(ballot)).expand(32),
        torch.ones(32),
        torch.zeros(32),
        quads.sum(1).repeat_interleave(4),
        quads.max(1).values.repeat_interleave(4),
        x[torch.arange(32) ^ 1],
        quads[:, 2].repeat_interleave(4),
    ]
    for row, (got, wanted) in enumerate(zip(y, expected, strict=True)):
        assert torch.equal(got, wanted), row


def test_quads_meet_without_the_others(library: runner.Library, metal_order: str) -> None:
    x, y = numbers(40), nan(40)
    library.some_quads(x, y, threads=40, group_size=40)
    quads = x.reshape(10, 4)
    expected = torch.where(torch.arange(10).unsqueeze(1) % 2 == 0, quads.sum(1, keepdim=True), quads)
    assert torch.equal(y, expected.flatten())


def test_threads_know_their_place_where_the_grid_cuts_groups(library: runner.Library, metal_order: str) -> None:
    width, height = 37, 5
    y = torch.full((height, width, 19), -1, dtype=torch.int32)
    library.places(y, width, threads=[width, height], group_size=[16, 4])
    for row in range(height):
        for column in range(width):
            group, inside = (column // 16, row // 4), (column % 16, row % 4)
            size = min(16, width - 16 * group[0]), min(4, height - 4 * group[1])
            index = inside[1] * size[0] + inside[0]
            told = [column, row, *inside, *group, *size, 16, 4, width, height, 3, 2]
            told += [index % 32, index // 32, -(-size[0] * size[1] // 32), 32, index]
            assert y[row, column].tolist() == told


def test_arithmetic_of_half_bfloat_and_vectors(library: runner.Library) -> None:
    x, y = torch.tensor([0.1, 8.0, 2.0, 1.00390625]), nan(14)
    h = torch.tensor([1.5, 2.25, 1000.5, 60000.0], dtype=torch.float16)
    b = torch.tensor([1.0, 0.00390625], dtype=torch.bfloat16)
    library.arithmetic(x, y, h, b, threads=1, group_size=1)
    half = x[0].half() * torch.tensor(2.5).half()
    expected = [5.0, 4.5 + x[3].item(), 2002.0, float("inf"), half.item(), 1.0, 1.00390625]
    expected += [8 * 1 + x[0].item() * 2 + 2 * 3 + x[3].item() * 4, 130.0, 0xBC, 200.0, 1.0, 1.0, 2.0]
    assert torch.equal(y, torch.tensor(expected))


def test_matrix_products(library: runner.Library, metal_order: str) -> None:
    a, b, c = numbers(256).half().reshape(8, 32), numbers(256).flip(0).half().reshape(8, 32), nan(8, 8)
    library.product(a, b, c, threads=32, group_size=32)
    assert torch.equal(c, a.float() @ b.float().T)


def test_a_lane_holds_the_elements_that_it_holds_on_apple_gpus(library: runner.Library) -> None:
    y = nan(8, 8)
    library.matrix_lanes(y, threads=32, group_size=32)
    assert y[0].tolist() == [0, 1, 2, 3, 16, 17, 18, 19]
    assert y[1].tolist() == [4, 5, 6, 7, 20, 21, 22, 23]
    assert y[4].tolist() == [32, 33, 34, 35, 48, 49, 50, 51]
    assert sorted(y.flatten().tolist()) == list(range(64))


def test_atomics(library: runner.Library, metal_order: str) -> None:
    y = torch.zeros(3, dtype=torch.int32)
    library.count(y, threads=1000, group_size=64)
    assert y.tolist() == [334, 333, 333]


def test_lists_views_and_numbers(library: runner.Library) -> None:
    y = nan(4)
    library.gather([torch.arange(4.0), torch.arange(4.0) + 10], y, [0, 1, 1, 0], threads=4, arg_casts={2: "int32"})
    assert y.tolist() == [0, 11, 12, 3]
    x = torch.arange(12.0).reshape(3, 4)
    library.scale(x[1:, ::2], 10.0, threads=3)  # strides are not looked at
    assert x.tolist() == [[0, 1, 2, 3], [40, 50, 60, 7], [8, 9, 10, 11]]
    with pytest.raises(runner.MetalError, match=r"byte 28 of 'argument 0' \(28 bytes\)"):
        library.scale(x[1:, ::2], 10.0, threads=8)  # the last element that the view reaches is its seventh
    library.scale(x, 0.5)  # threads: as many as x has elements
    assert x.flatten()[:6].tolist() == [0, 0.5, 1, 1.5, 20, 25]
    whole = torch.arange(8.0)
    library.group_sum_without_barrier  # a kernel is found by name
    library.neighbour(whole.new_zeros(32), whole.new_zeros(32), threads=32, group_size=32)


def test_tensors_that_share_memory_still_do(library: runner.Library) -> None:
    both = numbers(64).clone()
    expected = both + 1
    library.reverse_twice(both, both, threads=64, group_size=64)
    assert torch.equal(both, expected)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda lib: lib.scale(nan(4), None), TypeError, "a tensor, a number, or a list"),
        (lambda lib: lib.scale(nan(4)), runner.MetalError, "its buffers are [0, 1]"),
        (lambda lib: lib.scale(nan(4), 1.0, 2), runner.MetalError, "the call has 3 arguments"),
        (lambda lib: lib.scale(nan(4), 1.0, threads=4, group_size=[2, 2]), ValueError, "as many each"),
        (lambda lib: lib.scale(nan(4), 1.0, threads=[2, 2]), ValueError, "group_size must be given"),
        (lambda lib: lib.scale(nan(4), 1.0, threads=2048, group_size=1025), ValueError, "at most 1024"),
        (lambda lib: lib.scale(nan(4), 1.0, arg_casts={1: "fp16"}), runner.MetalError, "has 2 bytes, of 4"),
        (lambda lib: lib.scale(nan(4), [1] * 513), ValueError, "4104 bytes by value"),
        (lambda lib: lib.scale(nan(4, 4).to("meta"), 1.0), TypeError, "the emulator has CPU tensors"),
        (lambda lib: lib.small_groups(nan(128), threads=128, group_size=128), ValueError, "at most 64"),
        (lambda lib: lib.missing, RuntimeError, "no kernel 'missing'"),
    ],
)
def test_arguments_that_are_refused(library: runner.Library, call: Case, error: type, message: str) -> None:
    with pytest.raises(error) as caught:
        call(library)
    assert message in str(caught.value)
