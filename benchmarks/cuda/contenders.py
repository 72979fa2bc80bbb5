"""What multiplies in the benchmark for GPUs: we, torch, and other libraries where they are installed.

A contender prepares a product: some copies of a weight, and a call for each that multiplies x with it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear

from isqtorch import get_format, ops
from isqtorch.ops.native import no_fp8_products

from ..ours import ROUNDING
from .clock import Call

linear_w8a8 = torch.ops.isqtorch.linear_w8a8_frozen


class Unavailable(Exception):
    """Why a contender takes no part, or not in this product."""


@dataclass
class Product:
    """x times a weight.

    Attributes:
        calls: one for each copy of the weight.
        nbytes: of one packed weight.
        at_once: products in one call.
        captured: whether a CUDA graph can have it; otherwise the clock on the wall counts.
    """

    calls: list[Call]
    nbytes: int
    at_once: int = 1
    captured: bool = True


class Contender(Protocol):
    """Someone who multiplies."""

    @property
    def name(self) -> str: ...

    @property
    def formats(self) -> Sequence[str]: ...

    def product(self, format: str, weight: Tensor, x: Tensor, copies: Callable[[int], int]) -> Product:
        """Prepare x `[M, K]`, bf16, times weight `[N, K]`, bf16.

        Args:
            copies: how many of a weight of so many bytes.

        Raises:
            Unavailable: not this product.
        """


def _rotating(multiply: Callable[[Any], object], weight: Any, nbytes: int, copies: Callable[[int], int]) -> Product:
    """Calls for `weight`, a tensor or a tuple of tensors, and its copies."""

    def copy() -> Any:
        return tuple(part.clone() for part in weight) if isinstance(weight, tuple) else weight.clone()

    weights = [weight, *(copy() for _ in range(copies(nbytes) - 1))]
    return Product([lambda w=w: multiply(w) for w in weights], nbytes)  # type: ignore[misc]


class Ours:
    """isqtorch, checked before it is timed."""

    name = "isqtorch"

    def __init__(self, formats: Sequence[str]) -> None:
        self.formats = formats
        self._packed: tuple[tuple[str, int], Tensor] | None = None  # the last weight: all M take it

    def product(self, format: str, weight: Tensor, x: Tensor, copies: Callable[[int], int]) -> Product:
        key = (format, weight.data_ptr())
        if self._packed is None or self._packed[0] != key:
            self._packed = None
            self._packed = (key, ops.quantize(weight, format))
        packed = self._packed[1]
        check(x, packed, format)
        return _rotating(lambda w: ops.linear(x, w, format), packed, packed.nbytes, copies)


class OursRounded:
    """isqtorch's linear_w8a8, which quantizes x in every call; only for rows of x that it rounds."""

    name = "isqtorch W8A8"
    formats = ("fp8",)

    def __init__(self, most: int) -> None:
        self._most = most  # rows of x that are not rounded
        reason = no_fp8_products("cuda")
        if reason is not None:
            raise Unavailable(reason)

    def product(self, format: str, weight: Tensor, x: Tensor, copies: Callable[[int], int]) -> Product:
        if len(x) <= self._most:
            raise Unavailable("the same as isqtorch's fp8")
        packed = ops.quantize(weight, format)
        rounded = ops.dequantize(ops.quantize(x, format), format, torch.float32)
        compare(linear_w8a8(x, packed, format), rounded, packed, format, SUMS_OF_FP8)
        return _rotating(lambda w: linear_w8a8(x, w, format), packed, packed.nbytes, copies)


SUMS_OF_FP8 = 2**-9
"""Error of sums in the matrix unit, which keeps some 14 bits of the products that it aligns."""


def check(x: Tensor, packed: Tensor, format: str) -> None:
    """A kernel that computes something else is not worth timing; AssertionError with the error."""
    compare(ops.linear(x, packed, format), x, packed, format)


def compare(y: Tensor, x: Tensor, packed: Tensor, format: str, more: float = 0.0) -> None:
    """AssertionError unless y is x times the weight, but for what the format allows and `more`."""
    rows = slice(0, 128)  # of the weight; each is computed as all others are
    there = x.device if x.is_cuda else torch.device("cpu")  # where torch has f64
    w = ops.reference.dequantize(packed[rows].cpu(), format, torch.float32).to(there)
    exact = x.to(there).double() @ w.double().t()
    error = float((y[..., rows].to(there).double() - exact).norm() / exact.norm())
    allowed = get_format(format).linear_error + ROUNDING + more
    assert error < allowed, f"linear of {format}, {len(x)} rows, is off by {error:.2g}; {allowed:.2g} is allowed"


class Bf16:
    """torch's own F.linear: cuBLAS."""

    name = "bf16"
    formats = ("bf16",)

    def product(self, format: str, weight: Tensor, x: Tensor, copies: Callable[[int], int]) -> Product:
        return _rotating(lambda w: torch_linear(x, w), weight, weight.nbytes, copies)


class TinyGemm:
    """torch's int4 kernel, groups of 64."""

    name = "tinygemm"
    formats = ("int4g64",)
    _group = 64

    def product(self, format: str, weight: Tensor, x: Tensor, copies: Callable[[int], int]) -> Product:
        n, k = weight.shape
        groups = weight.float().view(n, k // self._group, self._group)
        low, high = groups.amin(-1), groups.amax(-1)
        scale = ((high - low) / 15).clamp(min=1e-6)
        codes = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15).to(torch.uint8).view(n, k)
        zero = low + 8 * scale
        scales = torch.stack([scale.t(), zero.t()], -1).contiguous().bfloat16()  # [K/64, N, 2]
        packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
        nbytes = n * k // 2 + scales.nbytes
        return _rotating(
            lambda w: torch.ops.aten._weight_int4pack_mm(x, w[0], self._group, w[1]), (packed, scales), nbytes, copies
        )


class ScaledMM:
    """torch's FP8 product, with a scale for each tensor or for 128 columns of each row; x is FP8 already, which is not counted."""

    name = "_scaled_mm"
    formats = ("fp8", "fp8g128")
    _group = 128

    def product(self, format: str, weight: Tensor, x: Tensor, copies: Callable[[int], int]) -> Product:
        if format == "fp8g128":
            return self._by_groups(weight, x, copies)
        one = torch.ones((), device=x.device)
        codes, w = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)

        def multiply(w: Tensor) -> Tensor:
            return torch._scaled_mm(codes, w.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

        return _rotating(multiply, w, w.nbytes, copies)

    def _by_groups(self, weight: Tensor, x: Tensor, copies: Callable[[int], int]) -> Product:
        def quantized(t: Tensor) -> tuple[Tensor, Tensor]:
            groups = t.float().view(len(t), -1, self._group)
            scales = groups.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
            codes = (groups / scales).to(torch.float8_e4m3fn).view(t.shape)
            return codes, scales[..., 0].t().contiguous()  # [rows, k], [k / 128, rows]

        codes, scales = quantized(x)

        def multiply(w: tuple[Tensor, Tensor]) -> Tensor:
            return torch._scaled_mm(codes, w[0].t(), scale_a=scales.t(), scale_b=w[1], out_dtype=torch.bfloat16)

        packed = quantized(weight)
        return _rotating(multiply, packed, sum(part.nbytes for part in packed), copies)


class BitsAndBytes:
    """NF4 with bf16 computation."""

    name = "bitsandbytes"
    formats = ("nf4",)

    def __init__(self) -> None:
        self._library: Any = importlib.import_module("bitsandbytes")

    def product(self, format: str, weight: Tensor, x: Tensor, copies: Callable[[int], int]) -> Product:
        functional = self._library.functional
        packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        matmul = self._library.matmul_4bit
        nbytes = packed.nbytes + state.absmax.nbytes
        return _rotating(lambda w: matmul(x, w.t(), quant_state=state), packed, nbytes, copies)


class MLX:
    """MLX's affine formats on its own CUDA backend: the numbers of our afq."""

    name = "mlx"
    formats = ("afq2", "afq3", "afq4", "afq6", "afq8")
    _group = 64

    def __init__(self) -> None:
        self._mx: Any = importlib.import_module("mlx.core")
        try:
            self._mx.set_default_device(self._mx.gpu)
            self._mx.eval(self._mx.zeros(1) + 1)
        except (RuntimeError, ValueError) as error:
            raise Unavailable(f"mlx has no CUDA backend here: {error}") from error

    def product(self, format: str, weight: Tensor, x: Tensor, copies: Callable[[int], int]) -> Product:
        mx, bits = self._mx, int(format.removeprefix("afq"))
        parts = mx.quantize(
            mx.array(weight.float().cpu().numpy()).astype(mx.bfloat16), group_size=self._group, bits=bits
        )
        nbytes = sum(part.nbytes for part in parts)
        weights = [parts, *([mx.array(part) for part in parts] for _ in range(copies(nbytes) - 1))]
        own_x = mx.array(x.float().cpu().numpy()).astype(mx.bfloat16)
        mx.eval(weights, own_x)

        def call() -> None:  # one call for all copies: MLX starts them together
            mx.eval(
                [mx.quantized_matmul(own_x, *w, transpose=True, group_size=self._group, bits=bits) for w in weights]
            )

        return Product([call], nbytes, at_once=len(weights), captured=False)


class GemLite:
    """Triton kernels for weights of whole numbers with a zero, groups of 64; tunes itself at first."""

    name = "gemlite"
    formats = ("int4g64", "int8g64", "int2g64")
    _group = 64

    def __init__(self) -> None:
        self._core: Any = importlib.import_module("gemlite.core")

    def product(self, format: str, weight: Tensor, x: Tensor, copies: Callable[[int], int]) -> Product:
        (n, k), bits, dtype = weight.shape, int(format[3]), self._core.DType.BF16
        groups = weight.float().view(n, k // self._group, self._group)
        low, high = groups.amin(-1), groups.amax(-1)
        scale = ((high - low) / (2**bits - 1)).clamp(min=1e-6)
        zero = -low / scale
        codes = (groups / scale[..., None] + zero[..., None]).round().clamp(0, 2**bits - 1).to(torch.uint8).view(n, k)
        nbytes = n * k * bits // 8 + 4 * scale.numel()

        def layer() -> Any:
            made = self._core.GemLiteLinear(
                bits, group_size=self._group, in_features=k, out_features=n, input_dtype=dtype, output_dtype=dtype
            )
            made.pack(codes, scale.bfloat16(), zero.bfloat16(), None)
            return made

        return Product([partial(layer(), x) for _ in range(copies(nbytes))], nbytes)


class Humming:
    """CUDA kernels compiled when they are needed; symmetric whole numbers, its own default groups."""

    name = "humming"
    formats = ("int4", "int8")

    def __init__(self) -> None:
        self._layer: Any = importlib.import_module("humming.layer").HummingLayer

    def product(self, format: str, weight: Tensor, x: Tensor, copies: Callable[[int], int]) -> Product:
        def layer() -> Any:
            shape = {"shape_n": weight.shape[0], "shape_k": weight.shape[1]}
            made = self._layer(**shape, weight_config={"dtype": format}, torch_dtype=torch.bfloat16).to(weight.device)
            made.load_from_unquantized(weight)
            made.transform()
            made.prepare_default_kernel_configs()
            return made

        first = layer()
        nbytes = sum(part.nbytes for part in [*first.parameters(), *first.buffers()])
        return Product([partial(made, x) for made in [first, *(layer() for _ in range(copies(nbytes) - 1))]], nbytes)


PEERS: tuple[Callable[[], Contender], ...] = (Bf16, TinyGemm, ScaledMM, BitsAndBytes, MLX, GemLite, Humming)


def peers(skipped: list[str]) -> list[Contender]:
    """Those that are here; why others are not is added to `skipped`."""
    found: list[Contender] = []
    for peer in PEERS:
        name = getattr(peer, "name", str(peer))
        try:
            found.append(peer())
        except ImportError:
            skipped.append(f"{name}: not installed")
        except Unavailable as reason:
            skipped.append(f"{name}: {reason}")
    return found
