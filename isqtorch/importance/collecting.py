"""Collect second moments: hooks record the inputs of the layers while a model runs.

A layer's hook looks whether the tensor that it gets was read before, so that layers with the same input share its
moments. In fused experts, every expert has moments of its own.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from isqtorch.modules.convert import layer_kind
from isqtorch.modules.packed import ordinary_tensors

from .inputs import Input, feeds_attention, importance_of_inputs
from .moments import Moments
from .routed import RoutedExperts, Routing, find_routed_experts
from .second import HELD_ROWS, HeldOut, Second
from .tokens import Rows, Tokens

_RECENT = 8  # tensors that a layer's input is compared with
_EXPERT_ROWS = HELD_ROWS // 8  # held-out rows of one expert


@dataclass
class _Seen:
    """A tensor that was read, without keeping it alive."""

    tensor: weakref.ref[Tensor]
    mark: tuple[object, ...]
    key: str  # the input to which its rows were added
    readers: set[str] = field(default_factory=set)


class MomentWatch:
    """The hooks of one collection, and what they have collected.

    Attributes:
        inputs: {name of the first layer that reads an input, or of a stack: its moments, one for each expert}.
        readers: {layer or stack: key in `inputs`}.
        stacks: the keys that are stacks of experts.
        routes: {stack: experts of a token}, once it has run.
        rows: the largest number of rows that an input has had.
    """

    def __init__(
        self,
        model: nn.Module,
        full: Collection[str] | None = None,
        readers: Mapping[str, str] | None = None,
        others: bool = True,
    ) -> None:
        """Prepare.

        Args:
            model: the model.
            full: keys of the inputs whose moments are wanted; None: of all.
            readers: the readers of each input, if they are known from an earlier run.
            others: whether to collect importance for all other inputs.
        """
        self.inputs: dict[str, list[Input]] = {}
        self.readers: dict[str, str] = dict(readers or {})
        self.stacks: set[str] = set()
        self.routes: dict[str, int] = {}
        self.tokens = Tokens()
        self.rows = 0
        self.layers: dict[str, int] = {}  # every watched layer, with its columns
        self._model, self._full, self._others = model, full, others
        self._attention = {key for name, key in self.readers.items() if feeds_attention(name)}
        self._lock = threading.RLock()
        self._thread = threading.local()
        self._active = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """Install the hooks; remove them at the end, also after an error."""
        with ExitStack() as stack:
            stack.enter_context(self.tokens.following(self._model))
            for name, module in self._model.named_modules():
                if isinstance(module, nn.Linear) or layer_kind(module) == "conv1d":
                    linear = isinstance(module, nn.Linear)
                    self.layers[name] = module.in_features if linear else module.weight.shape[0]
                    handle = module.register_forward_pre_hook(self._linear_hook(name), with_kwargs=True)
                    stack.callback(handle.remove)
            for name, routed in find_routed_experts(self._model):
                for leaf, columns in routed.columns.items():
                    self.layers[f"{name}.{leaf}"] = columns
                stack.enter_context(routed.observed(self._experts_observer(name, routed)))
            self._active = True
            stack.callback(setattr, self, "_active", False)  # a forward in another thread may still call a hook
            yield

    def moments(self, source: str) -> Moments:
        """What was collected so far.

        Raises:
            ValueError: the inputs of a layer were not finite.
        """
        with self._lock:
            for parts in self.inputs.values():
                for part in parts:
                    part.finish()
            full = {key: parts for key, parts in self.inputs.items() if self._is_full(key)}
            readers = {name: key for name, key in self.readers.items() if key in full}
            others = {}
            for name, key in self.readers.items():
                if key in self.inputs and key not in full:
                    others[name] = importance_of_inputs(self.inputs[key], feeds_attention(name), key in self.stacks)
            for name, columns in self.layers.items():
                if name not in self.readers and ".experts." in f".{name}.":  # listed experts without a token
                    others[name] = torch.zeros(columns, dtype=torch.float32), torch.zeros(1, dtype=torch.int64)
        stacks = {key: key in self.stacks for key in full}
        try:
            return Moments(full, readers, stacks, others, source=source)
        except ValueError as error:
            raise ValueError(
                f"{error}: this layer's inputs overflowed during calibration. Run the model in bf16."
            ) from None

    # ---- layers ------------------------------------------------------------------------------------------------------

    def _linear_hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if not (self._active and isinstance(x, Tensor) and x.numel() and x.device.type != "meta"):
                return
            with self._lock, ordinary_tensors(), torch.no_grad():
                key = self._unread(name, x)
                if key is None or not (self._is_full(key) or self._others):
                    return
                rows = x.detach().reshape(-1, x.shape[-1])
                if key not in self.inputs:
                    self.inputs[key] = [self._input(key, rows.shape[1])]
                _add(self.inputs[key][0], rows, self.tokens.rows_of(len(rows)))
                self.rows = max(self.rows, self.inputs[key][0].total.count)

        return hook

    def _unread(self, name: str, x: Tensor) -> str | None:
        """The key of the input that x belongs to; None if another reader of this input has brought x already."""
        recent: deque[_Seen] = vars(self._thread).setdefault("recent", deque(maxlen=_RECENT))
        mark = _mark(x)
        alive = (seen for seen in reversed(recent) if seen.mark == mark and seen.tensor() is not None)
        found = None if mark is None else next(alive, None)
        own = self.readers.get(name)
        if found is not None and name not in found.readers:
            if own is None and not (feeds_attention(name) and self._first_is_missing(found.key)):
                own = self.readers[name] = found.key
            if own == found.key:
                found.readers.add(name)
                return None
        if own is None:
            own = self.readers[name] = name
        elif own != name:  # until now it has read the same as others; it begins anew, with an input of its own
            own = self.readers[name] = name
        if mark is not None:
            recent.append(_Seen(weakref.ref(x), mark, own, {name}))
        return own

    def _first_is_missing(self, key: str) -> bool:
        return key in self.inputs and self.inputs[key][0].first is None

    def _input(self, key: str, columns: int, sparse: bool = False) -> Input:
        full = self._is_full(key)
        first = None
        if key in self._attention or feeds_attention(key):
            first = Second(columns, full, sparse=True)
        return Input(Second(columns, full, sparse), first, HeldOut(columns, most=_EXPERT_ROWS if sparse else HELD_ROWS))

    def _is_full(self, key: str) -> bool:
        return self._full is None or key in self._full

    # ---- fused experts -----------------------------------------------------------------------------------------------

    def _experts_observer(self, name: str, routed: RoutedExperts) -> Callable[[str, Tensor, Routing], None]:
        def observe(leaf: str, x: Tensor, routing: Routing) -> None:
            """Add rows x `[S, K]` that were routed to experts `[S]` or `[S, top_k]`."""
            key = f"{name}.{leaf}"
            if not (self._active and len(x) and (self._is_full(key) or self._others)):
                return
            with self._lock, ordinary_tensors(), torch.no_grad():
                self.readers[key] = key
                self.stacks.add(key)
                if key not in self.inputs:
                    self.inputs[key] = [self._input(key, x.shape[1], sparse=True) for _ in range(routed.experts)]
                groups = routing.experts.reshape(len(x), -1)
                self.routes[key] = max(groups.shape[1], routing.times)
                if routing.order is None:
                    rows = self.tokens.rows_of(len(x), scattered=True)
                else:
                    rows = self.tokens.rows_of(len(x) // routing.times, scattered=True).repeated(
                        routing.order, routing.times
                    )
                self._add_routed(self.inputs[key], x.detach(), groups, rows)

        return observe

    def _add_routed(self, inputs: list[Input], x: Tensor, groups: Tensor, rows: Rows) -> None:
        used = torch.arange(len(x)) if rows.used is None else rows.used
        for expert, at in _by_expert(groups, used, len(inputs)):
            inputs[expert].total.add(x[at.to(x.device)])
        for expert, at in _by_expert(groups, torch.arange(len(rows.held)), len(inputs), rows.held):
            index = rows.held[at]
            inputs[expert].held.add(x[index.to(x.device)], rows.held_weights[at], rows.held_first[at])
        self.rows = max(self.rows, len(used))


def _add(part: Input, x: Tensor, rows: Rows) -> None:
    """Add rows `[S, K]` to the moments of an input."""
    part.total.add(x if rows.used is None else x[rows.used.to(x.device)])
    if part.first is not None:
        part.first.add(x[rows.first.to(x.device)])
    if part.total.full:
        part.held.add(x[rows.held.to(x.device)], rows.held_weights, rows.held_first)


def _by_expert(groups: Tensor, which: Tensor, experts: int, rows: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
    """For each expert that has any, the entries of `which` whose rows were routed to it.

    Args:
        groups: the experts of every row, `[S, top_k]`; numbers of E and more are of other ranks.
        which: int64 `[W]`.
        experts: E.
        rows: the row of each entry; None: the entries are rows.
    """
    chosen = groups.cpu()[which if rows is None else rows[which]]  # [W, top_k]
    flat, order = chosen.reshape(-1).sort(stable=True)
    counts = torch.bincount(flat[(flat >= 0) & (flat < experts)], minlength=experts).tolist()
    entries = which[order // max(1, chosen.shape[1])]
    start = int((flat < 0).sum())
    for expert, count in enumerate(counts):
        if count:
            yield expert, entries[start : start + count]
        start += count


def _mark(x: Tensor) -> tuple[object, ...] | None:
    """Equal for tensors that hold the same rows, if both are alive; None if changes of x could not be noticed."""
    if x.is_inference() or not x.is_contiguous():  # inference tensors do not record in-place changes
        return None
    return x.data_ptr(), x.numel(), x.shape[-1], x.dtype, x.device, x._version


class CollectedMoments(Moments):
    """Moments that are being collected. `calibrate(model, moments=True)` and `collect_moments` make it.

    They are complete when the `with` block of `calibrate` ends. Inside the block, `refresh()` updates the entries.

    Attributes:
        tokens: the largest number of rows that any input has received, without those that are held out.

    Example:
        with isqtorch.calibrate(model, moments=True) as moments:
            model(torch.arange(100)[None])
            model(torch.arange(100)[None])
        print(moments.tokens, len(moments))  # 100 57
    """

    def __init__(self, watch: MomentWatch, source: str) -> None:
        super().__init__({}, {}, {}, source=source)
        self._watch = watch

    @property
    def tokens(self) -> int:
        """The largest number of rows that any input has received, without those that are held out."""
        return self._watch.rows

    def refresh(self) -> None:
        """Update the entries with everything collected so far.

        Raises:
            ValueError: the inputs of a layer were not finite.
        """
        fresh = self._watch.moments(self.source)
        for name in ("inputs", "readers", "stacks", "sums", "counts"):
            setattr(self, name, getattr(fresh, name))
