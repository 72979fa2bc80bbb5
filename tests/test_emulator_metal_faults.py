"""Metal on the emulator: every planted fault is reported, and what Metal refuses is refused."""

from __future__ import annotations

import pytest
import torch
from emulator.metal import runner
from metal_selftest import group_sum, needs_compiler, selftest

pytestmark = needs_compiler

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


@pytest.fixture(scope="module")
def library() -> runner.Library:
    return selftest()


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_reported(library: runner.Library, fault: str, metal_order: str) -> None:
    threads, rest, expected = FAULTS[fault]
    with pytest.raises(runner.MetalError) as caught:
        getattr(library, fault)(torch.full((64,), -1e9), *rest, threads=threads, group_size=threads)
    assert any(part in str(caught.value) for part in expected.split("|")), caught.value
    assert str(caught.value).startswith(f"{fault}: ") and "thread (" in str(caught.value)
    got, right = group_sum(library)
    assert torch.equal(got, right)


def test_what_nobody_wrote_is_nan(library: runner.Library, metal_order: str) -> None:
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
