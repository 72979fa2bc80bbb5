"""Where the time of a token goes, beside the time in which memory could be read: `isqtorch bench --roofline`.

A token needs every weight once, so a token cannot be faster than its weights are read. What is read is counted, operator
by operator, in one step of the model; how fast memory is read is measured in the same run. The parts of a step are what
torch's profiler sees.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

_BUFFER = 256 << 20  # bytes: more than caches hold
_ROUNDS = 5  # of reading the buffer, before and after the steps
_STEPS = 8  # of the model, timed, and as many with the profiler
_MOST_SEEING = 3e-6  # seconds that the profiler may take for an operator; more is noise of the machine
_FORWARD, _CACHE = "isqtorch: forward", "isqtorch: cache"

PARTS = {
    "products": "linear layers and experts; after optimize_, norms and activations beside them",
    "attention": "of the token to all others",
    "keys and values": "adding those of the token to the cache",
    "other operators": "norms, rotary, activations, the token table",
    "Python": "of the model, and whatever else waits",
    "generate": "around the model: choosing the token, stopping, the text",
}
"""The parts of a token, and what is in them."""

_PRODUCTS = {"linear", "linear_frozen", "linear_w8a8", "linear_w8a8_frozen", "experts_linear"}
_PRODUCTS |= {"matmul", "mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "addmv", "mv"}
_STEP_PRODUCTS = {"step_linears", "step_linear_add"}
_ATTENTION = {"attention", "scaled_dot_product_attention", "step_attend"}
_READERS = {"_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math"}


@dataclass(frozen=True)
class Roofline:
    """One token of greedy `generate`, batch 1.

    Attributes:
        threads: that computed, and read memory.
        bandwidth: bytes per second that they read from memory, in the same run.
        weight_bytes: of weights that a token reads.
        cache_bytes: of keys and values that its attention reads.
        token_seconds: of a token.
        parts: seconds of each of `PARTS`; together they are the token.
    """

    threads: int
    bandwidth: float
    weight_bytes: int
    cache_bytes: int
    token_seconds: float
    parts: dict[str, float]

    @property
    def token_share(self) -> float:
        """Of the token's time, what reading its weights, keys and values takes at full speed."""
        return (self.weight_bytes + self.cache_bytes) / self.bandwidth / self.token_seconds

    @property
    def product_share(self) -> float:
        """Of the products' time, what reading their weights takes at full speed."""
        seconds = self.parts["products"]
        return self.weight_bytes / self.bandwidth / seconds if seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "token_share": self.token_share, "product_share": self.product_share}


def measure_roofline(model: Any, ids: Tensor, token_seconds: float, cache: Callable[[], Mapping[str, Any]]) -> Roofline:
    """Measure the parts of a token and the speed of memory.

    Args:
        model: the model, on the CPU.
        ids: the tokens before, `[1, T]`.
        token_seconds: of a token of `generate`, measured before.
        cache: makes the argument of a forward with an empty cache.

    Raises:
        ValueError: the model is not on the CPU.
    """
    if model.device.type != "cpu":
        raise ValueError(f"--roofline: it knows CPUs, not {model.device.type}. Leave --device out.")
    speeds = [_read_speed() for _ in range(_ROUNDS)]
    stepping = _Steps(model, ids, cache())
    seconds = [stepping.timed() for _ in range(_STEPS)]
    weights, states = stepping.reads()
    forward = statistics.median(seconds)
    parts = _profiled(stepping, forward)
    speeds += [_read_speed() for _ in range(_ROUNDS)]
    parts["generate"] = max(token_seconds - forward, 0.0)
    whole = sum(parts.values())
    scaled = {name: parts[name] * token_seconds / whole for name in PARTS}
    return Roofline(torch.get_num_threads(), statistics.median(speeds), weights, states, token_seconds, scaled)


def lines(found: Mapping[str, Any]) -> list[str]:
    """A table for people, of `Roofline.to_dict()`."""
    token, bandwidth = found["token_seconds"], found["bandwidth"]
    reads = f"{found['weight_bytes'] / 1e6:.1f} MB of weights"
    if found["cache_bytes"]:
        reads += f" and {found['cache_bytes'] / 1e6:.1f} MB of keys and values"
    threads = f"{found['threads']} thread{'s' * (found['threads'] > 1)}"
    shown = [
        f"    a token takes {1e3 * token:.2f} ms and reads {reads}; memory gives {bandwidth / 1e9:.1f} GB/s to {threads}:",
        f"    {100 * found['token_share']:.0f} % of the speed of memory; the products alone {100 * found['product_share']:.0f} %",
    ]
    for name, seconds in found["parts"].items():
        shown.append(f"    {name:<16}{1e3 * seconds:9.2f} ms {100 * seconds / token:5.1f} %  {PARTS[name]}")
    return shown


_buffer: list[Tensor] = []


def _read_speed() -> float:
    """Bytes per second of a sum over a buffer that no cache holds. torch adds with vectors, on all its threads."""
    if not _buffer:
        _buffer.append(torch.zeros(_BUFFER // 4))
        _buffer[0].sum()
    began = time.perf_counter()
    _buffer[0].sum()
    return _BUFFER / (time.perf_counter() - began)


def bytes_of_token(model: Any, ids: Tensor, cache: Mapping[str, Any] = MappingProxyType({})) -> tuple[int, int]:
    """Count the bytes of weights, and of keys and values, that the token after `ids`, `[1, T]`, reads; `cache`: its argument."""
    return _Steps(model, ids, cache).reads()


class _Steps:
    """Steps of a model with a cache, each with one more token."""

    def __init__(self, model: Any, ids: Tensor, cache: Mapping[str, Any]) -> None:
        self._model = model
        with torch.inference_mode():
            out = model(ids, use_cache=True, **cache)
        self._name = next(name for name in ("cache", "past_key_values") if getattr(out, name, None) is not None)
        self.cache = getattr(out, self._name)
        self._next = out.logits[:, -1:].argmax(-1)

    def __call__(self) -> None:
        with torch.inference_mode():
            out = self._model(self._next, use_cache=True, **{self._name: self.cache})
            self._next = out.logits[:, -1:].argmax(-1)

    def timed(self) -> float:
        """Seconds of a step."""
        began = time.perf_counter()
        self()
        return time.perf_counter() - began

    def reads(self) -> tuple[int, int]:
        """Bytes of weights, and of keys and values, that a step reads."""
        counter = _Counter(self._model)
        with _parts_alone(), counter:
            self()
        return counter.weights, counter.states


class _Counter(TorchDispatchMode):
    """Counts what products and attention read."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.weights = self.states = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.partition("::")[2]
        tensors = [value for value in args if isinstance(value, Tensor)]
        if name == "experts_linear":
            weight, ids = args[1], args[3]
            self.weights += weight[0].nbytes * len(ids.unique())
        elif name in _STEP_PRODUCTS:
            weights, biases = args[1], args[3]  # a list of each, or one
            self.weights += _nbytes(weights) + _nbytes(biases)
        elif name in _PRODUCTS:
            self.weights += sum(t.nbytes for t in tensors if t.untyped_storage().data_ptr() in self._parameters)
        elif name == "step_attend":
            _, keys, values, first, last = args[:5]
            self.states += _nbytes([part[:, :, first:last] for part in (keys, values)])
        elif name in _READERS or name in _ATTENTION:
            self.states += sum(t.nbytes for t in tensors[1:3])
        return func(*args, **(kwargs or {}))


def _nbytes(values: Any) -> int:
    """Bytes of a tensor or of those in a list."""
    tensors = values if isinstance(values, list) else [values]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _profiled(step: _Steps, forward: float) -> dict[str, float]:
    """Seconds of a step, by part; `forward` are those without the profiler.

    The profiler takes time for each operator that it sees. What it adds to a step is taken off again: for an operator
    inside of another one from the outer one, for the others from the time between them.
    """
    with _parts_alone(), _marked(step.cache), profile(use_kineto=False) as profiler:
        for _ in range(_STEPS):
            with record_function(_FORWARD):
                step()
    parts = dict.fromkeys(("products", "attention", "keys and values", "other operators", "Python"), 0.0)
    inner, outer, whole = dict.fromkeys(parts, 0), 0, 0.0
    for event in profiler.function_events:
        if event.name == _FORWARD:
            whole += event.cpu_time_total / 1e6 / _STEPS
        elif event.cpu_parent is not None and event.cpu_parent.name == _FORWARD:
            part = _part(event.name)
            parts[part] += event.cpu_time_total / 1e6 / _STEPS
            inner[part] += _descendants(event)
            outer += 1
    count = outer + sum(inner.values())
    parts["Python"] = whole - sum(parts.values())
    inner["Python"] = outer
    each = min(max(whole - forward, 0.0) / max(count, 1), _MOST_SEEING)
    return {name: max(seconds - each * inner[name], seconds / 2) for name, seconds in parts.items()}


def _descendants(event: Any) -> int:
    return sum(1 + _descendants(child) for child in event.cpu_children)


def _part(name: str) -> str:
    operator = name.partition("::")[2]
    if name == _CACHE or operator == "step_heads":  # which turns queries and keys, too
        return "keys and values"
    if operator in _PRODUCTS or operator in _STEP_PRODUCTS:
        return "products"
    return "attention" if operator in _ATTENTION else "other operators"


@contextmanager
def _parts_alone() -> Iterator[None]:
    """Each part of a token is an operator, also after `optimize_`, which would join them. The bits are the same."""
    from isqtorch.integrations.transformers.layer_plan import LayerPlan

    LayerPlan.in_parts = True
    try:
        yield
    finally:
        LayerPlan.in_parts = False


@contextmanager
def _marked(cache: Any) -> Any:
    """The profiler sees the updates of a cache as one operator."""
    update = getattr(cache, "update", None)
    if update is None:
        yield
        return

    def marked(*args: Any, **kwargs: Any) -> Any:
        with record_function(_CACHE):
            return update(*args, **kwargs)

    cache.update = marked
    try:
        yield
    finally:
        del cache.update
