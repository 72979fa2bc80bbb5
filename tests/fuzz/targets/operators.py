"""All operators with several tensors: what native kernels, the reference and tracing refuse, and the shapes they return.

Tracing knows no values, so it may accept what the others refuse for a value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fuzz import mutate
from fuzz.targets import Target
from isqtorch import ops
from isqtorch.formats import formats, get_format
from isqtorch.ops.attention import attention as reference_attention

FLOATS = ("float32", "float16", "bfloat16")
DTYPES = (*FLOATS, "float64", "uint8", "int8", "int16", "int32", "int64", "bool", "complex64", "float8_e4m3fn")
VALUES = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, 1e-8, 65504.0, 1e30, 3e38, float("nan"), float("inf"), float("-inf"))
SIZES = (0, 1, 2, 3, 5, 31, 33, 255, 257)
HUGE = (2**40, 2**45, 2**56, 2**62, 84 << 56)
LAYOUTS = ("plain", "plain", "expanded", "turned", "shifted", "gradient", "strided")
OF_VALUES = (
    "IndexError",
    "quantize: weight[",
    "quantize: importance[",
    "quantize: the block",
    "quantize_feedback: factor[",
    "quantize_feedback: the errors",
)
NAMES = formats(variants=True)
PACKING = {"quantize", "quantize_feedback"}  # these take an importance on the CPU beside a weight on the meta device
REFERENCES = {"attention": reference_attention}  # the others are in ops.reference
_HEAD = 32  # numbers in a row of keys or values come in runs of so many
WORDS = tuple(word for word in mutate.TEXTS if word.isprintable()) + ("\0",)


@dataclass(frozen=True)
class Spec:
    """A tensor: how to make it.

    `values`: "bytes", "floats", "ids <most>", "factor" (of moments: upper triangular), or a number that some elements have.
    """

    shape: tuple[int, ...]
    dtype: str
    values: str | float = "floats"
    layout: str = "plain"
    device: str = "cpu"
    seed: int = 0

    def tensor(self) -> Tensor:
        dtype = getattr(torch, self.dtype)
        if 0 in self.shape or self.device == "meta":
            return torch.empty(self.shape, dtype=dtype, device=self.device)
        generator = torch.Generator().manual_seed(self.seed)
        if self.values == "bytes":
            made = torch.randint(0, 256, self.shape, generator=generator)
        elif isinstance(self.values, str) and self.values.startswith("ids"):
            made = torch.randint(0, int(self.values.split()[1]) + 1, self.shape, generator=generator)
        else:
            made = torch.randn(self.shape, generator=generator)
            if not isinstance(self.values, str):
                made.view(-1)[:: max(1, made.numel() // 3)] = self.values
            elif self.values == "factor" and made.ndim == 2:
                made = (made / 8).triu(1) + torch.eye(*self.shape) * (made.abs() + 0.1)
        made = made.to(dtype)
        if self.layout == "expanded" and made.ndim:
            return made[:1].expand(self.shape)
        if self.layout == "turned" and made.ndim > 1:
            return made.transpose(0, -1).contiguous().transpose(0, -1)
        if self.layout == "strided" and made.ndim:
            return torch.stack([made, made], -1)[..., 0]
        if self.layout == "shifted":
            flat = torch.cat([made.reshape(-1)[:1], made.reshape(-1)])
            return flat[1:].view(self.shape)
        if self.layout == "gradient" and (dtype.is_floating_point and dtype.itemsize > 1):
            return made.requires_grad_()
        return made


def valid(rng: Random) -> tuple[str, list[Any]]:
    """A call that is right."""
    fmt = get_format(rng.choice(NAMES))
    k, n, m = fmt.block * rng.choice((1, 1, 2)), rng.choice((1, 3)), rng.choice((1, 2, 9, 20))
    x, dtype = rng.choice(FLOATS), getattr(torch, rng.choice(FLOATS))
    packed = Spec((n, fmt.row_bytes(k)), "uint8", "bytes")
    experts, slots = 3, 2
    stack = replace(packed, shape=(experts, *packed.shape))
    ids = Spec((m, slots), rng.choice(("int64", "int32")), f"ids {experts}")
    bias = rng.choice((None, Spec((n,), rng.choice(FLOATS))))
    op = rng.choice(
        (
            "quantize",
            "quantize_feedback",
            "dequantize",
            "linear",
            "embedding",
            "experts_linear",
            "experts_linear_dx",
            "attention",
            "square_sums",
        )
    )
    if op == "quantize":
        importance = rng.choice((None, Spec((k,), "float32", 1.0)))
        return op, [
            Spec((*rng.choice(((), (2,))), n, k), x),
            fmt.name,
            importance,
            rng.choice((None, None, "search", "mlx")),
        ]
    if op == "quantize_feedback":
        importance, factor = Spec((k,), "float32", 1.0), Spec((k, k), "float32", rng.choice(("factor", "factor", 1.0)))
        return op, [Spec((n, k), x), fmt.name, factor, importance, rng.choice((None, None, "search", "mlx"))]
    if op == "dequantize":
        return op, [packed, fmt.name, dtype]
    if op == "linear":
        return op, [Spec((*rng.choice(((), (2,))), m, k), x), packed, fmt.name, bias]
    if op == "embedding":
        return op, [replace(ids, values=f"ids {n - 1}"), packed, fmt.name, dtype]
    if op == "experts_linear":
        shape = rng.choice(((m, k), (m, slots, k)))
        return op, [Spec(shape, x), stack, fmt.name, ids, bias and replace(bias, shape=(experts, n))]
    if op == "experts_linear_dx":
        return op, [Spec((m, slots, n), x), stack, fmt.name, ids]
    if op == "attention":
        other = get_format(rng.choice(NAMES))
        dim, value_dim = math.lcm(fmt.block, _HEAD), math.lcm(other.block, _HEAD)
        states = (rng.choice((1, 2)), rng.choice((1, 2)), rng.choice((1, 5, 70, 300)))
        q = (states[0], states[1] * rng.choice((1, 2)), rng.choice((1, 3, 9)))
        shape = tuple(rng.choice((1, size)) for size in q) + (states[2],)
        mask = rng.choice((None, Spec(shape, "bool"), Spec(shape, x)))
        keys, values = (Spec((*states, f.row_bytes(d)), "uint8", "bytes") for f, d in ((fmt, dim), (other, value_dim)))
        return op, [Spec((*q, dim), x), keys, values, fmt.name, other.name, rng.choice((0.0, 0.125, -1.0, 1e30)), mask]
    return op, [Spec((m, k), x), rng.choice((None, ids)), rng.choice((1, 3))]


def changed(rng: Random, spec: Spec) -> Spec:
    """A tensor that differs in one respect."""
    kind, shape = rng.randrange(10), list(spec.shape)
    at = rng.randrange(len(shape)) if shape else 0
    if kind < 2:
        return replace(spec, layout=rng.choice(LAYOUTS))
    if kind == 2 and shape:
        shape[at] = rng.choice(SIZES)
    elif kind == 3 and shape:
        shape[at] = max(0, shape[at] + rng.choice((-1, 1)))
    elif kind == 4:
        shape.insert(at, rng.choice((0, 1, 2)))
        shape = [1] * rng.choice((0, 0, 3)) + shape
    elif kind == 5 and shape:
        del shape[at]
    elif kind == 6 and len(shape) > 1:
        shape[at], shape[at - 1] = 0, rng.choice(HUGE)
    elif kind == 7:
        return replace(spec, dtype=rng.choice(DTYPES))
    elif kind == 8 and isinstance(spec.values, str) and spec.values.startswith("ids"):
        return replace(spec, values=f"ids {rng.choice((0, 1, 9, 10**6))}")
    elif kind == 8 and spec.values != "bytes":
        return replace(spec, values=rng.choice(VALUES))
    elif kind == 9:
        return replace(spec, device="meta")
    return replace(spec, shape=tuple(shape))


def make(rng: Random) -> tuple[str, list[Any]]:
    op, arguments = valid(rng)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        at = rng.randrange(len(arguments))
        argument = arguments[at]
        if isinstance(argument, Spec):
            arguments[at] = changed(rng, argument)
        elif isinstance(argument, str):
            arguments[at] = rng.choice((*NAMES, mutate.text(rng, argument, WORDS)))
        elif isinstance(argument, int):
            arguments[at] = rng.choice((0, -1, 2**45, 2**60, 2**62, 2**63 - 1, -(2**63)))
        elif isinstance(argument, torch.dtype):
            arguments[at] = getattr(torch, rng.choice(DTYPES))
    return op, [replace(a, seed=rng.randrange(1000)) if isinstance(a, Spec) else a for a in arguments]


def outcome(call: Callable[..., Tensor], arguments: list[Any]) -> tuple[str, Tensor | None]:
    """The name of the exception with the beginning of its message, or "", and the result."""
    try:
        return "", call(*arguments)
    except (ValueError, IndexError, MemoryError) as error:
        return f"{type(error).__name__} {error}", None
    except RuntimeError as error:  # how torch says on the CPU that there is no memory
        if "can't allocate memory" not in str(error):
            raise
        return f"MemoryError {error}", None


def run(source: tuple[str, list[Any]]) -> bool:
    op, specs = source
    try:
        arguments = [spec.tensor() if isinstance(spec, Spec) else spec for spec in specs]
    except RuntimeError:  # torch has no such tensor
        return False
    native = getattr(torch.ops.isqtorch, op)
    fault, y = outcome(native, arguments)
    devices = {argument.device.type for argument in arguments if isinstance(argument, Tensor)}
    traced_fault, traced = outcome(native, tree_map_only(Tensor, lambda t: t.to("meta"), arguments))
    if y is not None:
        assert traced is not None, f"only tracing refuses it: {traced_fault}"
        assert (traced.shape, traced.dtype) == (y.shape, y.dtype), (
            f"{y.shape} {y.dtype}, traced {traced.shape} {traced.dtype}"
        )
    elif devices == {"cpu"} and not any(part in fault for part in OF_VALUES) and "MemoryError" not in fault:
        assert traced is None, f"only the kernel refuses it: {fault}"
    if devices != {"cpu"}:
        assert fault or devices == {"meta"} or (op in PACKING and y is not None and y.is_meta), (
            "memory that nobody wrote"
        )
        return not fault
    want_fault, want = outcome(REFERENCES.get(op) or getattr(ops.reference, op), arguments)
    assert bool(fault) == bool(want_fault), f"native: {fault or 'accepted'}; reference: {want_fault or 'accepted'}"
    if y is not None and want is not None:
        assert (want.shape, want.dtype) == (y.shape, y.dtype), (
            f"{y.shape} {y.dtype}, reference {want.shape} {want.dtype}"
        )
        if op in ("dequantize", "embedding"):
            assert torch.equal(torch.nan_to_num(y), torch.nan_to_num(want)), "other numbers than the reference"
    elif "MemoryError" not in fault + want_fault:
        assert fault.split()[0] == want_fault.split()[0], f"native: {fault}; reference: {want_fault}"
    return not fault


TARGET = Target(make, run, promised=())
