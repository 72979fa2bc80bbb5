"""Collect second moments of a text in as many passes as memory allows.

The moments of all inputs of a large model do not fit into memory together: 22 GB for 7 billion weights. So the model
runs over the text several times, each time for some of its inputs, in the order in which it reads them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from isqtorch.progress import progress_bar
from isqtorch.report.fit import memories
from isqtorch.running import evaluating, run_model

from .calibration import watching
from .collecting import CollectedMoments, MomentWatch
from .files import DEFAULT_CHUNK
from .imatrix import Imatrix
from .inputs import feeds_attention
from .moments import Moments
from .second import HELD_ROWS
from .self_written import SELF
from .tokens import HOLD_EVERY
from .windows import Text, Windows, token_windows

_SHARE = 0.5  # of the free memory


class Passes:
    """The second moments of a model over a text, as one or more `Moments`, each for some of the inputs.

    Attributes:
        count: number of passes over the text.
    """

    def __init__(
        self,
        model: nn.Module,
        windows: Windows,
        names: Collection[str],
        max_memory: int | None,
        progress: bool | None,
    ) -> None:
        """Run the model over one window to see which layers share an input, and plan the passes.

        Args:
            model: the model.
            windows: the text.
            names: the layers and stacks whose moments are wanted. Of the others, only importance is collected.
            max_memory: most bytes of moments at a time; None: half of the free memory of the model's device.
            progress: whether to show a progress bar; None: if stderr is a terminal.
        """
        self._model, self._windows, self._progress = model, windows, progress
        self._first: Moments | None = None
        look = MomentWatch(model, full=())
        with watching(model), look.running(), evaluating(model):
            run_model(model, windows.ids[:1])
        self._readers = look.readers
        wanted = [key for key in dict.fromkeys(look.readers.values()) if any(look.readers.get(n) == key for n in names)]
        limit = _SHARE * free_memory(model) if max_memory is None else max_memory
        self._plan: list[list[str]] = [[]]
        filled = 0
        for key in wanted:
            size = self._size(look, key)
            if self._plan[-1] and filled + size > limit:
                self._plan.append([])
                filled = 0
            self._plan[-1].append(key)
            filled += size

    @property
    def count(self) -> int:
        return len(self._plan)

    def importance(self) -> Imatrix:
        """The importance of all layers; if there is only one pass, its moments.

        Raises:
            ValueError: the inputs of a layer were not finite.
        """
        first = self._first = self._collect(0)
        if self.count == 1:
            return first
        return Imatrix(
            first.sums,
            first.counts,
            source=first.source,
            chunk_count=first.chunk_count,
            chunk_size=first.chunk_size,
            datasets=first.datasets,
        )

    def collected(self) -> Iterator[Moments]:
        """The moments of each pass. All passes run anew each time, except for what `importance` has collected.

        Raises:
            ValueError: the inputs of a layer were not finite.
        """
        for number in range(self.count):
            if number == 0 and self._first is not None:
                first, self._first = self._first, self._first if self.count == 1 else None
                yield first
                del first  # frees the moments before those of the next pass are collected
            else:
                yield self._collect(number)

    def _collect(self, number: int) -> Moments:
        watch = MomentWatch(self._model, self._plan[number], self._readers, others=number == 0)
        return run_windows(self._model, watch, self._windows, self._progress, number, self.count)

    def reads(self, moments: Moments | None, names: Iterable[str]) -> bool:
        """Whether the moments of a weight are among those of a pass, by the names of the layers that share it."""
        return moments is not None and any(self._readers.get(name) in moments.inputs for name in names)

    def _size(self, look: MomentWatch, key: str) -> int:
        """About how many bytes the moments of an input take."""
        parts, windows = look.inputs[key], len(self._windows.ids)
        columns, tokens = parts[0].total.columns, self._windows.ids.numel()
        held = min(2 * HELD_ROWS, windows // HOLD_EVERY * 33) * columns * 4
        if key in look.stacks:
            return 4 * columns * min(len(parts) * columns, tokens * look.routes[key]) + held
        first = (
            4 * columns * min(columns, windows)
            if any(feeds_attention(name) for name, own in look.readers.items() if own == key)
            else 0
        )
        return 4 * columns * columns + first + held


def collect_moments(
    model: nn.Module,
    text: Text = SELF,
    tokenizer: Any = None,
    chunk: int = DEFAULT_CHUNK,
    max_tokens: int | None = None,
    progress: bool | None = None,
) -> CollectedMoments:
    """Run a text through a causal language model and collect the second moments of its inputs.

    It works as `collect_imatrix` does. Every 8th chunk is held out, to judge with. 20,000 tokens or more are enough, and
    more of them help. All moments are in memory at the end: 4 bytes for each pair of columns of each distinct input,
    22 GB for a model of 7 billion weights. `quantize_` with `calibration_file` and `rule="feedback"` collects them in
    passes instead, within `max_memory`.

    Args:
        model: the model, in the dtype that it should run in. It runs in eval mode and gets its training flags back.
        text: a file (a path object, or a string that names an existing file), a text, or token ids; "self": a text
            that the model writes, see `collect_imatrix`.
        tokenizer: the model's tokenizer; not needed with token ids.
        chunk: tokens per chunk. A text of fewer than 8 chunks is cut into 8.
        max_tokens: use only this number of tokens from the beginning of the text; None uses all.
        progress: whether to show a progress bar; None shows one if stderr is a terminal.

    Returns:
        The moments, with `chunk_count`, `chunk_size` and `datasets` set.

    Raises:
        ValueError: a bad argument, a text that is too short or not UTF-8, or inputs of a layer that are not finite.
        OSError: the file cannot be read.

    Example:
        moments = isqtorch.collect_moments(model, text, tokenizer, max_tokens=2048)
        isqtorch.quantize_(model, "q4k", rule="feedback", imatrix=moments)
    """
    windows = token_windows(model, text, tokenizer, "collect_moments", chunk, max_tokens, HOLD_EVERY, progress)
    return run_windows(model, MomentWatch(model), windows, progress)


def run_windows(
    model: nn.Module,
    watch: MomentWatch,
    windows: Windows,
    progress: bool | None,
    number: int = 0,
    count: int = 1,
) -> CollectedMoments:
    """Run a model over windows and return what a watch has collected.

    Args:
        model: the model.
        watch: the watch, not running yet.
        windows: the text.
        progress: whether to show a progress bar.
        number, count: number of this pass and of all, for the bar.
    """
    with watching(model), watch.running(), evaluating(model):
        what = "calibrate" if count == 1 else f"calibrate {number + 1}/{count}"
        for ids in progress_bar(what, "chunk", progress, windows.ids):
            run_model(model, ids[None])
    found = CollectedMoments(watch, f"calibration of {type(model).__name__}")
    found.refresh()
    found.chunk_count, found.chunk_size, found.datasets = windows.facts
    return found


def free_memory(model: nn.Module) -> int:
    """Bytes that are free on the device of a model."""
    parameter: Tensor | None = next(model.parameters(), None)
    kind = "cpu" if parameter is None else parameter.device.type
    found = [memory.free for memory in memories() if memory.name.startswith("RAM" if kind == "cpu" else kind)]
    return min(found, default=memories()[0].free)
