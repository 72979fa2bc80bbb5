"""Which rows of an activation are tokens, and which of these are the first of their window or held out.

Hooks on the modules that take token ids or embeddings see the attention mask and the positions of a call. A row of a
layer's input belongs to the token of the same number, if there are as many rows as tokens in the call. Of other inputs,
such as the patches of an image, all rows count alike, and the last eighth is held out.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

HOLD_EVERY = 8
"""Every 8th window is held out: not in the sums."""

_SAMPLED = 32  # held-out rows of a window, besides its first
_HELD = 1  # number of the first window that is held out; so two windows are enough to judge with


@dataclass
class Rows:
    """What the rows of an activation are. Indices are int64, on the CPU.

    Attributes:
        used: rows that count; None: all.
        first: rows among them that are the first token of a window.
        held: held-out rows, with how many tokens each stands for (f32), and whether it is a first token.
    """

    used: Tensor | None
    first: Tensor
    held: Tensor
    held_weights: Tensor
    held_first: Tensor

    def repeated(self, order: Tensor, times: int) -> Rows:
        """The same for rows of which each token has several, such as the inputs of the experts it was routed to.

        Args:
            order: for each row, `times` times the number of its token, plus less than `times`; int64.
            times: rows per token.
        """
        tokens = order.cpu() // times
        count = int(tokens.max()) + 1 if len(tokens) else 0
        marks = torch.ones(count, dtype=torch.bool)
        if self.used is not None:
            marks = torch.zeros(count, dtype=torch.bool)
            marks[self.used] = True
        weights, first = torch.zeros(count, dtype=torch.float32), torch.zeros(count, dtype=torch.bool)
        weights[self.held], first[self.held] = self.held_weights, self.held_first
        begins = torch.zeros(count, dtype=torch.bool)
        begins[self.first] = True
        held = weights[tokens].nonzero()[:, 0]
        return Rows(
            None if bool(marks.all()) else marks[tokens].nonzero()[:, 0],
            begins[tokens].nonzero()[:, 0],
            held,
            weights[tokens[held]],
            first[tokens[held]],
        )


@dataclass
class Call:
    """The tokens of one call of a module: B sequences of T tokens."""

    tokens: int  # B * T
    rows: Rows


@dataclass
class _Open:
    """The calls of one thread that have begun with the same outermost one."""

    depth: int = 0
    calls: list[Call] = field(default_factory=list)  # the latest last; inner ones too, also after they have ended
    outer: Tensor | None = None  # numbers of the windows of the outermost call, [B]


class Tokens:
    """Follows the calls of a model. `rows_of` tells what the rows of an activation are."""

    def __init__(self) -> None:
        self.windows = 0  # number of windows that have begun
        self._lock = threading.Lock()
        self._thread = threading.local()

    @contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """Install the hooks; remove them at the end."""
        with ExitStack() as stack:
            for module in model.modules():
                names = _signature(module, module is model)
                if names is None:
                    continue
                before = module.register_forward_pre_hook(self._begin(names), with_kwargs=True)
                after = module.register_forward_hook(self._end, always_call=True)
                stack.callback(before.remove)
                stack.callback(after.remove)
            yield

    @contextmanager
    def window(self, length: int) -> Iterator[None]:
        """A window of tokens runs through a part of the model inside this block, and no hook sees its ids.

        Args:
            length: number of tokens.
        """
        opened = self._open()
        with self._lock:
            held = torch.tensor([self.windows % HOLD_EVERY == _HELD])
            self.windows += 1
        counts, first = torch.ones(1, length, dtype=torch.bool), torch.zeros(1, length, dtype=torch.bool)
        first[:, 0] = True
        opened.calls, opened.depth = [Call(length, _classified(counts, first, held))], opened.depth + 1
        try:
            yield
        finally:
            opened.depth -= 1

    def rows_of(self, count: int, scattered: bool = False) -> Rows:
        """What the rows of an activation with `count` rows are, in the call that is running in this thread.

        Args:
            count: number of rows.
            scattered: whether to hold out single rows, and not the last ones, if the rows are no tokens of the call.
        """
        for call in reversed(self._open().calls):
            if call.tokens == count:
                return call.rows
        index = torch.arange(count)
        held = index % HOLD_EVERY == _HELD if scattered else index >= count - count // HOLD_EVERY
        rows = held.nonzero()[:, 0]
        kept = (
            rows[torch.linspace(0, len(rows) - 1, min(len(rows), _SAMPLED), dtype=torch.float64).long()]
            if len(rows)
            else rows
        )
        if scattered:
            kept = rows
        return Rows(
            (~held).nonzero()[:, 0] if len(rows) else None,
            torch.zeros(0, dtype=torch.int64),
            kept,
            torch.full((len(kept),), len(rows) / max(1, len(kept)), dtype=torch.float32),
            torch.zeros(len(kept), dtype=torch.bool),
        )

    def _open(self) -> _Open:
        found = getattr(self._thread, "open", None)
        if found is None:
            found = self._thread.open = _Open()
        return found

    def _begin(self, names: tuple[str, ...]) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            opened = self._open()
            if opened.depth == 0:
                opened.calls, opened.outer = [], None
            opened.depth += 1
            given = dict(zip(names, args, strict=False)) | kwargs
            call = self._call(opened, given)
            if call is not None:
                opened.calls.append(call)

        return hook

    def _end(self, *_: Any) -> None:
        opened = self._open()
        opened.depth = max(0, opened.depth - 1)

    def _call(self, opened: _Open, given: dict[str, Any]) -> Call | None:
        ids, embedded = given.get("input_ids", next(iter(given.values()), None)), given.get("inputs_embeds")
        if isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point():
            batch, length = ids.shape
        elif isinstance(embedded, Tensor) and embedded.dim() == 3:
            batch, length = embedded.shape[:2]
        else:
            return None
        begins = not _past(given)
        mask = given.get("attention_mask")
        counts = torch.ones(batch, length, dtype=torch.bool)
        if isinstance(mask, Tensor) and mask.dim() == 2 and len(mask) == batch and mask.shape[1] >= length:
            counts = mask[:, mask.shape[1] - length :].detach().cpu() != 0
        elif opened.calls and opened.calls[-1].tokens == batch * length:
            return None  # the caller's own mask says more
        first = torch.zeros(batch, length, dtype=torch.bool)
        positions = given.get("position_ids")
        if isinstance(positions, Tensor) and positions.dim() == 2 and positions.shape[1] == length:
            first = counts & (positions.detach().cpu().expand(batch, -1) == 0)
            begins = bool(first.any())
        elif begins:
            first = counts & (counts.cumsum(1) == 1)
        windows = opened.outer
        if windows is None or len(windows) != batch:
            with self._lock:
                if begins:
                    self._thread.windows = torch.arange(self.windows, self.windows + batch)
                    self.windows += batch
                windows = getattr(self._thread, "windows", None)
            if windows is None or len(windows) != batch:
                windows = torch.zeros(batch, dtype=torch.int64)
            opened.outer = windows
        return Call(batch * length, _classified(counts, first, windows % HOLD_EVERY == _HELD))


def _classified(counts: Tensor, first: Tensor, held: Tensor) -> Rows:
    """The rows of a call: `counts` and `first` are bool `[B, T]`, `held` is bool `[B]`."""
    _, length = counts.shape
    used = counts & ~held[:, None]
    rows, weights, begins = [], [], []
    for number in held.nonzero()[:, 0].tolist():
        own = counts[number].nonzero()[:, 0]
        starts, others = own[first[number][own]], own[~first[number][own]]
        some = min(len(others), _SAMPLED)
        if some:
            others = others[torch.linspace(0, len(others) - 1, some, dtype=torch.float64).long()]
        weight = (len(own) - len(starts)) / max(1, some)
        rows += [number * length + starts, number * length + others]
        weights += [
            torch.ones(len(starts), dtype=torch.float32),
            torch.full((some,), weight, dtype=torch.float32),
        ]
        begins += [torch.ones(len(starts), dtype=torch.bool), torch.zeros(some, dtype=torch.bool)]
    empty = torch.zeros(0, dtype=torch.int64)
    return Rows(
        None if bool(used.all()) else used.flatten().nonzero()[:, 0],
        (first & used).flatten().nonzero()[:, 0],
        torch.cat([empty, *rows]),
        torch.cat([empty.float(), *weights]),
        torch.cat([empty.bool(), *begins]),
    )


def _past(given: dict[str, Any]) -> bool:
    """Whether there is a cache of keys and values that holds tokens, whatever the argument is called."""
    for value in given.values():
        length = getattr(value, "get_seq_length", None)
        if callable(length):
            return int(length()) > 0
    return isinstance(given.get("past_key_values"), tuple)


def _signature(module: nn.Module, outermost: bool) -> tuple[str, ...] | None:
    """The argument names of a module that takes a batch of token ids or their embeddings; None for other modules.

    The outermost module may call its ids as it likes.
    """
    try:
        names = tuple(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):
        return ("input_ids",) if outermost else None
    return names if outermost or {"input_ids", "inputs_embeds"} & set(names) else None
