"""Metal on the emulator: right shaders come out right, and every planted fault is reported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from emulator.metal import compiler, mutants, races, runner

from isqtorch.ops.metal import source as package_source

pytestmark = pytest.mark.skipif(
    compiler.compiler_command() is None,
    reason="Metal shaders are not tested: no clang++ >= 19 (Debian's clang-19, PyPI's ziglang, or ISQTORCH_CLANG)",
)
FOLDER = Path(__file__).resolve().parent / "emulator" / "metal"
ORDERS = ["forward", "reverse", "shuffled"]
needs_tsan = pytest.mark.skipif(
    compiler.compiler_command() is not None and not races.available(), reason="no ThreadSanitizer for this clang++"
)


@pytest.fixture(params=ORDERS)
def order(request: pytest.FixtureRequest):
    with runner.schedule(request.param, seed=7):
        yield request.param


@pytest.fixture(scope="module")
def library() -> runner.Library:
    return runner.compile_shader((FOLDER / "selftest.metal").read_text())


def numbers(count: int) -> torch.Tensor:
    return torch.tensor([((i * 7 % 31) - 15) / 4 for i in range(count)])


def nan(*shape: int) -> torch.Tensor:
    return torch.full(shape, float("nan"))


def group_sum(library: runner.Library, variant: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    x, y = numbers(768), nan(3)
    getattr(library, f"group_sum{variant}")(x, y, threads=768, group_size=256)
    return y, x.reshape(3, 256).sum(1)


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
def test_threads_exchange_through_memory(library: runner.Library, case: Case, order: str) -> None:
    got, expected = case(library)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("case", EXCHANGES)
def test_a_missing_barrier_shows_in_some_order(library: runner.Library, case: Case) -> None:
    wrong = 0
    for name in ORDERS:
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


def test_simd_and_quad_functions(library: runner.Library, order: str) -> None:
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


def test_quads_meet_without_the_others(library: runner.Library, order: str) -> None:
    x, y = numbers(40), nan(40)
    library.some_quads(x, y, threads=40, group_size=40)
    quads = x.reshape(10, 4)
    expected = torch.where(torch.arange(10).unsqueeze(1) % 2 == 0, quads.sum(1, keepdim=True), quads)
    assert torch.equal(y, expected.flatten())


def test_threads_know_their_place_where_the_grid_cuts_groups(library: runner.Library, order: str) -> None:
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


def test_matrix_products(library: runner.Library, order: str) -> None:
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


def test_atomics(library: runner.Library, order: str) -> None:
    y = torch.zeros(3, dtype=torch.int32)
    library.count(y, threads=1000, group_size=64)
    assert y.tolist() == [334, 333, 333]


# ---- arguments, as torch.mps takes them


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


# ---- faults

FAULTS = {
    "diverge": (32, [], "warp divergence: shader:"),
    "some_lanes": (32, [], "names lanes that have ended|deadlock"),
    "leave_before_barrier": (64, [], "a thread ends while|a block barrier after"),
    "two_barriers": (64, [], "block barriers at two lines meet: shader:"),
    "past_the_end": (64, [], "stray access to byte 256 of 'argument 0' (256 bytes) at shader:"),
    "past_the_tile": (64, [], "stray access to byte 256 of 'tile' (256 bytes) at shader:"),
    "past_the_array": (1, [4], "undefined behaviour at shader:"),
    "too_much_memory": (1, [], "32772 bytes with 'b', of 32768"),
    "misaligned": (1, [torch.zeros(1, dtype=torch.int32)], "undefined behaviour at shader:"),
    "long_shift": (1, [32], "undefined behaviour at shader:"),
    "to_uchar": (1, [torch.zeros(1, dtype=torch.uint8)], "undefined behaviour at shader:"),
    "lane_addresses": (32, [torch.zeros(64)], "lanes name different addresses"),
    "half_simdgroup": (16, [], "fewer than 32 threads"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_reported(library: runner.Library, fault: str, order: str) -> None:
    threads, rest, expected = FAULTS[fault]
    with pytest.raises(runner.MetalError) as caught:
        getattr(library, fault)(torch.full((64,), -1e9), *rest, threads=threads, group_size=threads)
    assert any(part in str(caught.value) for part in expected.split("|")), caught.value
    assert str(caught.value).startswith(f"{fault}: ") and "thread (" in str(caught.value)
    got, right = group_sum(library)
    assert torch.equal(got, right)


def test_what_nobody_wrote_is_nan(library: runner.Library, order: str) -> None:
    y = torch.zeros(64)
    library.unwritten(y, threads=64, group_size=64)
    assert y.isnan().all()


BODY = "kernel void f(device float* y [[buffer(0)]], device half* h [[buffer(1)]], uint i [[thread_position_in_grid]]) {{ {} }}"
REFUSED = {
    "pointer parameter": ("float g(float* p) { return p[0]; }", "without address space: float * p"),
    "reference to an array": ("void g(int n, float (&v)[4]);", "without address space: float ( & v"),
    "reference parameter": ("void g(const float& p);", "without address space: const float & p"),
    "pointer parameter of a method": (
        "struct s { public: template <int n = 4> float g(float* p) { return p[n]; } };",
        "without address space: float * p",
    ),
    "pointer to pointers": ("void g(device float** p);", "without address space: device float * * p"),
    "local pointer": (BODY.format("float a[2] = {1, 2}; float* p = a; y[i] = p[1];"), "without address space: float * p"),
    "cast": (BODY.format("y[i] = float(((uint*)(y))[0]);"), "without address space: uint *"),
    "pointer of another space": (BODY.format("threadgroup float* p = y; p[i] = 0;"), "cannot initialize a variable"),
    "global": ("const int table[2] = {1, 2};", "outside of functions must be constant"),
    "static member": ("struct s { static constexpr int n = 4; };", "a static variable must be constant"),
    "threadgroup variable": ("void g() { threadgroup float a[4]; a[0] = 0; }", "declared in kernels, not in functions"),
    "threadgroup parameter": ("kernel void f(threadgroup float* t [[threadgroup(0)]]) { t[0] = 0; }", "declare it in the kernel"),
    "function constant": ("constant bool b [[function_constant(0)]];", "use a template"),
    "lambda": (BODY.format("const auto g = [](float a) { return a; }; y[i] = g(1);"), "lambdas do not exist"),
    "double": (BODY.format("y[i] = float(double(1));"), "'double' does not exist"),
    "standard library": (BODY.format("y[i] = std::abs(1.0f);"), "'std' does not exist"),
    "C++17": (BODY.format("if constexpr (true) y[i] = 1;"), "C++17"),
    "ambiguous": (BODY.format("y[i] = float(min(1, i));"), "ambiguous"),
    "two vector types": (BODY.format("y[i] = dot(float4(1.0), half4(1.0h));"), "no matching function"),
    "bfloat and half": (BODY.format("y[i] = float(h[0] * bfloat(1.0));"), "deleted"),
    "bfloat in SIMD functions": (BODY.format("y[i] = float(simd_sum(bfloat(1.0)));"), "do not exist for bfloat"),
    "to bfloat by itself": (BODY.format("bfloat b = y[i]; y[i] = float(b);"), "no viable conversion"),
    "unknown attribute": ("kernel void f(uint i [[somewhere]]) {}", "neither a buffer nor a known attribute"),
    "unknown function": (BODY.format("y[i] = quad_magic(1.0);"), "quad_magic"),
}  # fmt: skip


def test_products_are_not_taken_for_pointers() -> None:
    source = """
template <int a, int b>
struct shape {
  static constant constexpr const int size = (a * b) / 4;
  int rows;
  shape(int row, int column) : rows(row * column) {}
};
kernel void f(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {
  const int n = int(i) * shape<2, 2>::size, m = n & 3;
  for (int j = 0; j * n < 4; j += (n * m)) y[j] = float((n * m) + (n & m)) * (2.0 * y[j]);
  y[i] *= float(shape<4, 2>(n, m).rows);
}
"""
    assert dir(runner.compile_shader(f"using namespace metal;\n{source}")) == ["f"]


@pytest.mark.parametrize("fault", REFUSED)
def test_what_metal_refuses_is_refused(fault: str) -> None:
    source, message = REFUSED[fault]
    with pytest.raises(SyntaxError) as caught:
        runner.compile_shader(f"#include <metal_stdlib>\nusing namespace metal;\n{source}\n")
    assert message in str(caught.value) and ":3" in str(caught.value), caught.value


# ---- kernels like real ones

GROUP = 64
TYPES = {"float": torch.float32, "half": torch.float16, "bfloat": torch.bfloat16}
BITS = [2, 3, 4, 6, 8]


def afq_source(instances: list[tuple[str, int]]) -> str:
    lines = [
        package_source.instance(f"{kernel}_{name}_{bits}", f"{kernel}<{name}, {GROUP}, {bits}>")
        for kernel in ("gemv", "gemm")
        for name, bits in instances
    ]
    return (FOLDER / "selftest_afq.metal").read_text() + "\n".join(lines)


def afq_linear(
    library: runner.Library, name: str, bits: int, m: int, n: int, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The product of random numbers by gemv or gemm, and what it should be."""
    dtype = TYPES[name]
    q = torch.randint(0, 1 << bits, (n, k))
    stream = (q.unsqueeze(-1) >> torch.arange(bits) & 1).reshape(n, k * bits // 8, 8)
    codes = (stream << torch.arange(8)).sum(-1).to(torch.uint8)
    scales, biases = torch.rand(n, k // GROUP).to(dtype) / 8, torch.randn(n, k // GROUP).to(dtype)
    x = torch.randn(m, k).to(dtype)
    y = torch.full((m, n), float("nan"), dtype=dtype)
    w = q * scales.float().repeat_interleave(GROUP, 1) + biases.float().repeat_interleave(GROUP, 1)
    if m <= 4:
        grid = {"threads": [-(-n // 8) * 64, m, 1], "group_size": [64, 1, 1]}
        getattr(library, f"gemv_{name}_{bits}")(codes, scales, biases, x, y, n, k, **grid)
    else:
        grid = {"threads": [-(-n // 32) * 128, -(-m // 32), 1], "group_size": [128, 1, 1]}
        getattr(library, f"gemm_{name}_{bits}")(codes, scales, biases, x, y, n, k, m, **grid)
    return y.float(), x.float() @ w.T


@pytest.fixture(scope="module")
def afq() -> runner.Library:
    return runner.compile_shader(afq_source([(name, bits) for name in TYPES for bits in BITS]))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", TYPES)
def test_products_with_quantized_weights(afq: runner.Library, name: str, bits: int, order: str) -> None:
    tolerance = {"float": 1e-3, "half": 2e-3, "bfloat": 8e-3}[name]  # of the largest output; gemm multiplies halves
    for m, n, k in [(1, 7, 64), (3, 33, 192), (5, 1, 128), (33, 72, 192)]:
        got, expected = afq_linear(afq, name, bits, m, n, k)
        assert (got - expected).abs().max() <= tolerance * expected.abs().max(), (m, n, k)


@needs_tsan
def test_products_with_quantized_weights_do_not_race() -> None:
    library = runner.compile_shader(afq_source([("half", 4)]))
    with runner.recording() as launches:
        for m in (3, 33):
            afq_linear(library, "half", 4, m, 33, 128)
    assert races.find(launches) == ""


def test_every_mutant_of_the_products_is_found() -> None:
    """What `make mutants` does with the package's shaders."""
    library = runner.compile_shader(afq_source([("half", 4)]))
    with runner.recording() as launches:
        for m in (3, 33):
            afq_linear(library, "half", 4, m, 33, 128)
    sites = mutants.sites(launches)
    kinds = [site.what for site in sites]
    assert kinds.count("threadgroup_barrier") == 3 and kinds.count("threadgroup") == 3 and kinds.count("device") == 11
    sample = [site for site in sites if site.what == "threadgroup_barrier"] + sites[:: len(sites) // 8]
    assert [str(site) for site in sample if not mutants.killed_by(site, launches)] == []


def test_a_mutant_that_nothing_finds_is_reported() -> None:
    source = """
#include <metal_stdlib>
using namespace metal;
kernel void idle(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {
  threadgroup_barrier(mem_flags::mem_threadgroup);  // for nothing
  y[i] = 1;
}
"""
    library = runner.compile_shader(source)
    with runner.recording() as launches:
        library.idle(nan(32), threads=32)
    killed = {str(site): mutants.killed_by(site, launches) for site in mutants.sites(launches)}
    assert killed.pop("shader:5: threadgroup_barrier") == ""
    assert all(killed.values()) and len(killed) == 1


# ---- how the package puts its sources together


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources of a package: a kernel, which includes two headers, one of which includes the other."""
    (tmp_path / "metal" / "kernels").mkdir(parents=True)
    (tmp_path / "metal" / "one.h").write_text(
        "#pragma once\nstruct one {\n  static float get(device const float* x) { return x[0]; }\n};\n"
    )
    (tmp_path / "metal" / "all.h").write_text('#pragma once\n#include "metal/one.h"\n')
    (tmp_path / "metal" / "kernels" / "copy.metal").write_text(
        """#include <metal_stdlib>
#include "metal/one.h"
#include "metal/all.h"
using namespace metal;
template <typename F, typename T>
kernel void copy(device const float* x [[buffer(0)]], device T* y [[buffer(1)]], uint i [[thread_position_in_grid]]) {
  y[i] = T(F::get(x + i));
}
"""
    )
    monkeypatch.setattr(package_source, "folder", lambda: tmp_path)
    return tmp_path


def copy_source(real: str) -> str:
    return package_source.assemble("metal/kernels/copy.metal", "metal/all.h", {f"copy_{real}": f"copy<one, {real}>"})


def test_a_source_has_each_header_once(folder: Path) -> None:
    source = copy_source("half")
    assert source.count("struct one") == 1 and "metal/one.h" in source and "#pragma once" not in source
    y = torch.empty(4, dtype=torch.float16)
    runner.compile_shader(source).copy_half(torch.arange(4.0), y, threads=4, group_size=4)
    assert y.tolist() == [0, 1, 2, 3]


def test_errors_name_the_line_of_the_file(folder: Path) -> None:
    header = folder / "metal" / "one.h"
    library = runner.compile_shader(copy_source("float"))
    with pytest.raises(runner.MetalError, match=r"byte 16 of 'argument 0' \(16 bytes\) at csrc/metal/one.h:3: "):
        library.copy_float(torch.zeros(4), torch.zeros(8), threads=8, group_size=8)
    header.write_text(header.read_text().replace("device ", ""))
    with pytest.raises(SyntaxError, match=r"csrc/metal/one.h:3: a pointer"):
        runner.compile_shader(copy_source("bfloat"))
    (folder / "metal" / "all.h").unlink()
    with pytest.raises(FileNotFoundError, match=r"all.h"):
        copy_source("float")
