"""What several test files need."""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from isqtorch import ops
from isqtorch.formats import QuantFormat, formats, get_format
from isqtorch.report.report import QuantReport

GOLDEN = Path(__file__).resolve().parent / "golden"
FORMATS = [get_format(name) for name in formats()]
ALL_FORMATS = [get_format(name) for name in formats(variants=True)]
IMPLEMENTATIONS = ["reference", *(f"native-{isa}" for isa in ops.cpu_info().isa_with_formats)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROUNDING = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}
"""Rounding of an output of this type."""

GPU_ORDERS = ["forward", "reverse", "shuffled"]
"""In which an emulated GPU gives threads their turns."""

every_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
every_variant = pytest.mark.parametrize("fmt", ALL_FORMATS, ids=lambda fmt: fmt.name)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@cache
def golden(name: str) -> dict[str, Tensor]:
    """The tensors of `golden/<name>.safetensors`."""
    return load_file(GOLDEN / f"{name}.safetensors")


def implementation(name: str) -> Any:
    """The ops, in plain torch ("reference") or compiled ("native")."""
    return ops.reference if name == "reference" else ops


def run_flushing_denormals(work: Callable[[], None]) -> None:
    """Run `work` where subnormal numbers count as zero, as after `torch.set_flush_denormal(True)` at the start of a process.

    The mode belongs to a thread and is inherited by those it starts, so this is a fresh thread, with fresh workers.
    """
    raised: list[BaseException] = []

    def target() -> None:
        torch.set_flush_denormal(True)
        assert float(torch.tensor(1e-30) * 1e-10) == 0.0
        try:
            work()
            assert float(torch.tensor(1e-30) * 1e-10) == 0.0, "the mode was not restored"
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def relative_error(got: Tensor, want: Tensor) -> float:
    """RMS of the difference over RMS of `want`."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def formats_of(report: QuantReport) -> dict[str, str | None]:
    """What each layer has now."""
    return {layer.name: layer.stored for layer in report.layers}


def weight(fmt: QuantFormat, rows: int = 16, blocks: int = 4, seed: int = 0) -> Tensor:
    """Normally distributed f32 `[rows, blocks * fmt.block]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, blocks * fmt.block, generator=generator)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal including the sign of zero; for f32."""
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def before_a_guard_page(t: Tensor, gap: int = 0) -> Tensor:
    """A copy in memory that ends `gap` bytes before a page nobody may read: one byte further is a crash."""
    size = -(-(t.nbytes + gap) // mmap.PAGESIZE) * mmap.PAGESIZE
    area = mmap.mmap(-1, size + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    no_access = 0
    if mprotect(ctypes.c_void_p(address + size), ctypes.c_size_t(mmap.PAGESIZE), no_access) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    copy = torch.frombuffer(area, dtype=torch.uint8, count=t.nbytes, offset=size - t.nbytes - gap)
    copy.copy_(t.contiguous().view(-1).view(torch.uint8))
    return copy.view(t.dtype).view(t.shape)


def shifted(t: Tensor, by: int) -> Tensor:
    """The same elements, `by` bytes further from where an allocation begins."""
    raw = torch.zeros(t.nbytes + by, dtype=torch.uint8)
    raw[by:] = t.contiguous().view(-1).view(torch.uint8)
    view = torch.frombuffer(memoryview(raw.numpy())[by:], dtype=t.dtype).view(t.shape)
    assert view.data_ptr() == raw.data_ptr() + by and torch.equal(view, t)
    return view


def fp8_parts(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Codes `[rows, k]` and scales `[k / 128, rows]` of a weight packed in fp8, by the registry."""
    fp8 = get_format("fp8")
    fields = fp8.unpack(packed.reshape(-1, fp8.block_bytes))
    return fields["q"].view(len(packed), -1), fields["scale"].view(len(packed), -1).t().contiguous()


def uneven(m: int, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Activations `[m, k]` with rows of every kind: zeros, one huge number, subnormal ones, ties."""
    x = torch.randn(m, k)
    x[0] = 0
    if m > 5:
        x[1, 5] = 3e4
        x[2] *= 2e-7
        x[3] = (x[3] * 16).round() / 16
        x[4, : k // 2] = -x[4, : k // 2].abs()
        x[5] *= torch.linspace(-20, 3, k).exp()
    return x.to(dtype)


def check_scaled_mm(x: Tensor, w: Tensor, scale_x: Tensor, scale_w: Tensor, out_dtype: torch.dtype) -> None:
    """torch's own checks of the arguments of `_scaled_mm`, of its old and its new interface, as for tensors on CUDA.

    Args:
        x, w: FP8 `[M, K]` and `[K, N]`.
        scale_x, scale_w: f32 `[M, K / 128]` and `[K / 128, N]`.
    """
    from torch._meta_registrations import _check_scaled_mm_sizes, _check_scaled_mm_sizes_v2
    from torch.nn.functional import ScalingType

    recipe = [ScalingType.BlockWise1x128.value]
    with mock.patch("torch._meta_registrations.device_hint", return_value="cuda"):
        _check_scaled_mm_sizes(x, w, scale_x, scale_w, out_dtype=out_dtype)
        _check_scaled_mm_sizes_v2(x, w, [scale_x], recipe, [scale_w.t()], recipe, out_dtype=out_dtype)


def linear_error(y: Tensor, x: Tensor, packed: Tensor, fmt: QuantFormat) -> float:
    """RMS error of y, relative to the size that outputs have for weights and activations of random signs.

    Not to y itself: the few outputs of a small case may happen to be near zero.
    """
    return LinearCase.of(x, packed, fmt).error(y)


def rounded_weights(packed: Tensor, fmt: QuantFormat, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The weights that `dequantize` to `dtype` gives, as f64, and by how much each may differ for a kernel that works them out
    in another way: where it lies half-way between two numbers of `dtype`, the last digit of an f32 decides."""
    w = ops.reference.dequantize(packed, fmt.name, torch.float32)
    if dtype == torch.float32:
        return w.double(), torch.zeros_like(w).double()
    digits = 2.0**-16 * w.abs().amax(-1, keepdim=True)
    return w.to(dtype).double(), ((w + digits).to(dtype) - (w - digits).to(dtype)).double()


@dataclass(frozen=True)
class LinearCase:
    """Arguments of `linear` with the exact product, for several kernels to be measured by."""

    x: Tensor
    packed: Tensor
    exact: Tensor  # x @ W^T in float64, from the weights that the bytes stand for
    typical: float  # see linear_error

    @classmethod
    def of(cls, x: Tensor, packed: Tensor, fmt: QuantFormat) -> LinearCase:
        w = ops.reference.dequantize(packed, fmt.name, torch.float32).double()
        typical = x.double().norm(dim=-1, keepdim=True) * w.norm(dim=-1) / w.shape[1] ** 0.5
        return cls(x, packed, x.double() @ w.t(), float(typical.norm()))

    def error(self, y: Tensor) -> float:
        return float((y.double() - self.exact).norm()) / self.typical


def allowed(fmt: QuantFormat, y: Tensor) -> float:
    """The format's bound is for the RMS of many outputs; few may lie three deviations off."""
    return fmt.linear_error * (1 + 3 / y.numel() ** 0.5) + ROUNDING[y.dtype]


def int8_activations(rows: int, k: int) -> Tensor:
    """Rows that rounding to int8 per 32 does not change: integers up to 127, times a power of two per 32."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(-127, 128, (rows, k), generator=generator).float()
    x[:, ::32] = 127
    return x * 2.0 ** torch.randint(-9, 9, (rows, k // 32), generator=generator).repeat_interleave(32, 1)


def wide_activations(rows: int, k: int) -> Tensor:
    """Rows that rounding to 15 bits per 32 does not change: integers up to 127 * 128, times a power of two per 32."""
    generator = torch.Generator().manual_seed(3)
    largest = 127 * 128
    x = torch.randint(-largest, largest + 1, (rows, k), generator=generator).float()
    x[:, ::32] = largest
    x[:, 1::32] = -largest
    return x * 2.0 ** torch.randint(-9, 9, (rows, k // 32), generator=generator).repeat_interleave(32, 1)


WIDE_FORMATS = ("q8_0", "q8_1", "q8k", "afq8", "hqq8")
"""Formats whose CPU kernels round x to 15 bits, because their codes have 8."""


def squares(x: Tensor) -> Tensor:
    """What calibration sums, in float64: `[K]`."""
    return x.detach().double().reshape(-1, x.shape[-1]).square().sum(0)


def close(got: Tensor, want: Tensor) -> None:
    """f32 sums against float64."""
    torch.testing.assert_close(got.double().flatten(), want.double().flatten(), rtol=2e-5, atol=1e-6)
