"""Metal on the emulator: kernels like real ones, their races, and mutants of them."""

from __future__ import annotations

import pytest
import torch
from emulator.metal import mutants, races, runner
from metal_selftest import FOLDER, nan, needs_compiler, needs_tsan

from isqtorch.ops.metal import source as package_source

pytestmark = needs_compiler

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
def test_products_with_quantized_weights(afq: runner.Library, name: str, bits: int, metal_order: str) -> None:
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
