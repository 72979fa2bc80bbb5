"""Collect an importance matrix: hooks record the inputs of the layers while a model runs.

    with isqtorch.calibrate(model) as im:                           # any forward of the model inside the block
        model(ids)
    im = isqtorch.collect_imatrix(model, "text.txt", tokenizer)     # a text, in chunks, as llama.cpp does
    im = isqtorch.collect_imatrix(model, "self", tokenizer)         # a text that the model writes

The statistic is llama.cpp's: per input column the sum of x * x over all tokens, in f32, and the number of tokens; for
routed experts, per expert. A hook reads the input of its layer once. Layers with the same input (q, k and v; gate and
up) share this pass.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from isqtorch.modules import PackedModule
from isqtorch.modules.convert import layer_kind
from isqtorch.modules.packed import ordinary_tensors
from isqtorch.policy.request import Request
from isqtorch.progress import progress_bar
from isqtorch.running import evaluating, run_model

from .collecting import CollectedMoments, MomentWatch
from .files import DEFAULT_CHUNK
from .imatrix import Imatrix
from .routed import RoutedExperts, Routing, find_routed_experts
from .self_written import SELF
from .windows import Text, check_text, token_windows

_running: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_running_lock = threading.Lock()


class Calibration(Imatrix):
    """An importance matrix that is being collected. `calibrate` and `collect_imatrix` make it.

    It is complete when the `with` block of `calibrate` ends. Inside the block, `refresh()` updates the entries, for
    example to save them during a long run.

    Attributes:
        tokens: the largest number of rows that any layer has received, including padding.

    Example:
        with isqtorch.calibrate(model) as im:
            model(torch.arange(100)[None])
            im.refresh()
        print(im.tokens, len(im))  # 100 57
    """

    def __init__(self, meters: dict[str, _Meter], source: str) -> None:
        super().__init__({}, source=source)
        self._meters = meters

    @property
    def tokens(self) -> int:
        """The largest number of rows that any layer has received, including padding."""
        return max((meter.rows for meter in self._meters.values()), default=0)

    def refresh(self) -> None:
        """Update the entries with everything collected so far.

        A matrix that received no token gets no entry. Experts in a list are an exception: without data, all their
        columns get the same weight, as in llama.cpp.

        Raises:
            ValueError: the inputs of a layer were not finite.
        """
        sums, counts = {}, {}
        for name, meter in self._meters.items():
            read = meter.read()
            if read is not None and (read[1].any() or ".experts." in f".{name}."):
                sums[name], counts[name] = read
        try:
            fresh = Imatrix(sums, counts, source=self.source)
        except ValueError as error:
            raise ValueError(
                f"{error}: this layer's inputs overflowed during calibration. Run the model in bf16."
            ) from None
        self.sums, self.counts = fresh.sums, fresh.counts


class _Meter:
    """Sums and counts of a matrix or stack of experts, on the model's device. Callers of `add` hold `_Watch._lock`."""

    def __init__(self, columns: int, experts: int | None = None) -> None:
        self.columns, self.experts = columns, experts
        self.rows = 0  # number of rows of all inputs, over all experts
        self._sums: Tensor | None = None  # f32 [K] or [E, K]
        self._counts: Tensor | None = None  # int64 [E]; without experts, `rows` is the count

    def add(self, sums: Tensor, rows: int, counts: Tensor | None = None) -> None:
        self.rows += rows
        self._sums = sums.clone() if self._sums is None else self._sums.add_(sums.to(self._sums.device))
        if counts is not None:
            self._counts = counts if self._counts is None else self._counts.add_(counts.to(self._counts.device))

    def read(self) -> tuple[Tensor, Tensor] | None:
        """Return sums and counts on the CPU, in the shapes of `Imatrix`."""
        if self._sums is None:
            shape = (self.columns,) if self.experts is None else (self.experts, self.columns)
            return torch.zeros(shape), torch.zeros(self.experts or 1, dtype=torch.int64)
        counts = torch.tensor([self.rows]) if self._counts is None else self._counts.to("cpu", torch.int64, copy=True)
        return self._sums.to("cpu", copy=True), counts


class _Watch:
    """The hooks of one calibration, and their sums."""

    def __init__(self, model: nn.Module) -> None:
        self.meters: dict[str, _Meter] = {}
        self.layers = self.meters  # what is watched
        self._model = model
        self._lock = threading.Lock()
        self._thread = threading.local()
        self._active = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """Install the hooks; remove them at the end, also after an error."""
        with ExitStack() as stack:
            for name, module in self._model.named_modules():
                if isinstance(module, nn.Linear) or layer_kind(module) == "conv1d":
                    self.meters[name] = _Meter(_columns(module))
                    handle = module.register_forward_pre_hook(self._linear_hook(name), with_kwargs=True)
                    stack.callback(handle.remove)
            for name, routed in find_routed_experts(self._model):
                for leaf, columns in routed.columns.items():
                    self.meters[f"{name}.{leaf}"] = _Meter(columns, routed.experts)
                stack.enter_context(routed.observed(self._experts_observer(name, routed)))
            self._active = True
            stack.callback(setattr, self, "_active", False)  # a forward in another thread may still call a hook
            yield

    def _linear_hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if self._active and isinstance(x, Tensor) and x.numel() and x.device.type != "meta":
                sums = self._shared_squares(x)
                with self._lock, ordinary_tensors():
                    self.meters[name].add(sums, x.numel() // x.shape[-1])

        return hook

    def _shared_squares(self, x: Tensor) -> Tensor:
        """Return the sums of an input. Consecutive layers that get the same tensor share them."""
        version = None if x.is_inference() else x._version  # inference tensors do not record in-place changes
        last = getattr(self._thread, "last", None)
        if last is not None and version is not None and last[0]() is x and last[1] == version:
            shared: Tensor = last[2]
            return shared
        with ordinary_tensors():
            sums: Tensor = torch.ops.isqtorch.square_sums(x.detach())[0]
        self._thread.last = weakref.ref(x), version, sums
        return sums

    def _experts_observer(self, name: str, routed: RoutedExperts) -> Callable[[str, Tensor, Routing], None]:
        def observe(leaf: str, x: Tensor, routing: Routing) -> None:
            """Add rows x `[S, K]` that were routed to experts `[S]` or `[S, top_k]`."""
            if self._active and len(x):
                with ordinary_tensors():
                    groups = routing.experts.reshape(len(x), -1)
                    sums = torch.ops.isqtorch.square_sums(x.detach(), groups, routed.experts)
                    counts = _occurrences(groups, routed.experts)
                with self._lock, ordinary_tensors():
                    self.meters[f"{name}.{leaf}"].add(sums, len(x), counts)

        return observe


@overload
def calibrate(model: nn.Module) -> AbstractContextManager[Calibration]: ...
@overload
def calibrate(model: nn.Module, *, moments: Literal[False]) -> AbstractContextManager[Calibration]: ...
@overload
def calibrate(model: nn.Module, *, moments: Literal[True]) -> AbstractContextManager[CollectedMoments]: ...
@contextmanager  # type: ignore[misc]  # the overloads say which of the two it yields
def calibrate(model: nn.Module, *, moments: bool = False) -> Iterator[Calibration | CollectedMoments]:
    """Collect an importance matrix from everything that runs through a model inside a `with` block.

    The inputs of all linear layers, quantized or not, and of the fused experts of transformers models are recorded, in
    all threads. Every row of an input counts, so use little padding. Inside the block, fused experts of transformers
    use their "grouped_mm" implementation.

    Args:
        model: any module that is not being calibrated already.
        moments: whether to collect second moments as well, for `rule="feedback"`. This takes 4 bytes for each pair of
            columns of each distinct input. Every 8th sequence is held out, to judge with. Padding is left out, if the
            calls have an `attention_mask`.

    Yields:
        The matrix, or an `isqtorch.Moments`. It is empty until the block ends or `refresh()` is called.

    Raises:
        ValueError: the model has no linear layer or is being calibrated already, the inputs of a layer were not finite,
            or no layer ran inside the block (a model that was compiled before does not call hooks).

    Example:
        with isqtorch.calibrate(model) as im:
            model(torch.arange(100)[None])
        isqtorch.quantize_(model, "q4k", imatrix=im)
    """
    source = f"calibration of {type(model).__name__}"
    watch = MomentWatch(model) if moments else _Watch(model)
    im: Calibration | CollectedMoments
    im = CollectedMoments(watch, source) if isinstance(watch, MomentWatch) else Calibration(watch.meters, source)
    with watching(model), watch.running():
        if not watch.layers:
            raise ValueError(f"calibrate: {type(model).__name__} has no linear layer to watch")
        yield im
    im.refresh()
    if not im:
        raise ValueError(
            "calibrate: no layer of the model ran inside the block. Run the model itself, not a compiled or exported form of it."
        )


@contextmanager
def watching(model: nn.Module) -> Iterator[None]:
    """Mark a model as being calibrated. ValueError if it is already."""
    with _running_lock:
        if model in _running:
            raise ValueError("calibrate: this model is being calibrated already")
        _running.add(model)
    try:
        yield
    finally:
        _running.discard(model)


def collect_imatrix(
    model: nn.Module,
    text: Text = SELF,
    tokenizer: Any = None,
    chunk: int = DEFAULT_CHUNK,
    max_tokens: int | None = None,
    progress: bool | None = None,
) -> Calibration:
    """Run a text through a causal language model and collect its importance matrix.

    It works as llama-imatrix does: the text is cut into chunks of `chunk` tokens, and an incomplete last chunk is left
    out. Each chunk starts from an empty cache, and its first token is replaced by BOS if the tokenizer adds one to a
    text. 10,000 to 50,000 tokens are enough.

    Args:
        model: the model, in the dtype that it should run in. It runs in eval mode and gets its training flags back.
        text: a file (a path object, or a string that names an existing file), a text, token ids `[T]`, or windows of
            token ids `[S, T]`, which are read as they are. "self", the default, lets a model of transformers write the
            text itself: 48 sequences of 256 tokens.
        tokenizer: the model's tokenizer; not needed with token ids. With "self" it tells whether texts begin with BOS.
        chunk: tokens per chunk of a text that is given. If the model's context is not longer, chunks are one token
            shorter than the context.
        max_tokens: use only this number of tokens from the beginning of the text; None uses all.
        progress: whether to show a progress bar; None shows one if stderr is a terminal.

    Returns:
        The matrix, with `chunk_count`, `chunk_size` and `datasets` set.

    Raises:
        ValueError: a bad argument, a text that is too short or not UTF-8, or inputs of a layer that are not finite.
        OSError: the file cannot be read.

    Example:
        im = isqtorch.collect_imatrix(model, "examples/demo_model/calibration.txt", tokenizer, max_tokens=2048)
        im.save("demo.gguf")
    """
    windows = token_windows(model, text, tokenizer, "collect_imatrix", chunk, max_tokens, progress=progress)
    with calibrate(model) as im, evaluating(model):
        for ids_of_one in progress_bar("calibrate", "chunk", progress, windows.ids):
            run_model(model, ids_of_one[None])
    im.chunk_count, im.chunk_size, im.datasets = windows.facts
    return im


def _columns(module: nn.Module) -> int:
    """Return K of a linear layer: packed, ordinary or Conv1D."""
    if isinstance(module, nn.Linear):
        return module.in_features
    weight = module.weight
    assert isinstance(weight, Tensor) and not isinstance(module, PackedModule)
    return weight.shape[0]


def _occurrences(groups: Tensor, count: int) -> Tensor:
    """Count how often each of 0 .. count - 1 occurs, int64 `[count]`. Unlike bincount, it does not sync the device."""
    return (groups.reshape(-1, 1) == torch.arange(count, device=groups.device)).sum(0)


def collect(
    model: nn.Module, request: Request, text: Text, imatrix: Imatrix | None, check: Callable[[], object]
) -> Imatrix:
    """Collect the importance matrix of the model in its current state, from the calibration text of a request.

    Args:
        model: the model.
        request: the request; its options have the tokenizer.
        text: the text.
        imatrix: the importance matrix of the request; must be None.
        check: called first. It raises if anything else is wrong with the request, because the collection takes minutes.

    Raises:
        ValueError: see `quantize_` and `collect_imatrix`.
    """
    op, options = request.op, request.options
    if imatrix is not None:
        raise ValueError(f"{op}: give either imatrix or calibration_file, not both")
    check_text(op, text, options.tokenizer)
    check()
    return collect_imatrix(model, text, options.tokenizer, progress=options.progress)
