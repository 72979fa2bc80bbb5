"""The thread that generates: it reads prompts piece by piece, and gives a token to every running reply in each step.

Requests begin in the order of arrival. Replies that run together share the work of reading the weights, which is most
of the work of a token. A reply joins after its prompt is read and leaves when it ends; the others go on. A prompt is
read in pieces with a step in between, so a long one neither holds up the running replies nor the first tokens of
shorter prompts behind it.

A call, such as a change of the format, waits until all replies before it have ended; later ones wait for the call. A
reply that cannot share a step (see `why_not_batched`, `Job.joins`) is generated in the same way, by `generate`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import LogitsProcessorList

from isqtorch.integrations.transformers import quantized_cache

from .kv import Batch, beginning, new_cache
from .measures import Measures
from .memory import release_memory
from .prefixes import Prefixes
from .rows import Job, Row, Watch
from .stepping import Stepper, why_not_batched

_PIECE = {"cpu": 128}  # tokens of a prompt that are read between two steps
_OTHER_PIECE = 512  # a GPU reads more in the time of a step
_MORE = 32_768  # tokens of all running replies together, beyond the context of one
_ALIKE = 2  # replies are in one batch if their lengths differ by less than this factor,
_ALIKE_MORE = 256  # and this number of tokens: the shorter one is padded in memory
_LONG = 512  # tokens of a prompt after which memory is given back to the system


@dataclass
class _Call:
    """A call that uses the model; `alone`: no reply may be under way."""

    run: Callable[[], Any]
    alone: bool
    future: Future[Any] = field(default_factory=Future)


class _Reading:
    """A prompt that is being read."""

    def __init__(self, job: Job, row: Row, cache: Any, done: int) -> None:
        self.job, self.row, self.cache, self.done = job, row, cache, done


class _Running:
    """Replies that step together, and their cache."""

    def __init__(self, row: Row, cache: Any) -> None:
        self.rows, self.batch = [row], Batch(cache)

    def takes(self, tokens: int) -> bool:
        """Whether a reply of this length can join without much padding."""
        short, long = sorted((tokens, self.batch.columns))
        return long <= _ALIKE * short + _ALIKE_MORE


class Scheduler:
    """The thread.

    Args:
        model: returns the present model.
        context: largest number of tokens of a prompt and its reply.
        most: replies that may run at once; 1: each is generated alone by `generate`.
        prefix_bytes: of the beginnings of prompts that are kept; 0: none.
        kv: the formats of keys and of values; None: floats.

    Attributes:
        alone: why every reply is generated alone; None: replies share steps.
        measures: what was done so far.
    """

    def __init__(
        self,
        model: Callable[[], Any],
        context: int,
        most: int,
        prefix_bytes: int,
        kv: tuple[str, str] | None = None,
    ) -> None:
        self._model, self._most, self._limit, self._kv = model, most, context + _MORE, kv
        self.alone = "only one may run at once" if most == 1 else why_not_batched(model(), kv)
        self.measures = Measures()
        self._piece = _PIECE.get(model().device.type, _OTHER_PIECE)
        self._prefixes = Prefixes(0 if self.alone else prefix_bytes, self._piece)
        self._stepper: Stepper | None = None
        self._queue: deque[Job | _Call] = deque()
        self._news = threading.Condition()
        self._reading: deque[_Reading] = deque()
        self._running: list[_Running] = []
        threading.Thread(target=self._run, name="isqtorch-generate", daemon=True).start()

    def add(self, job: Job) -> None:
        """Queue a reply."""
        job.arrived = time.monotonic()
        self._put(job)

    def submit(self, call: Callable[..., Any], *args: Any, **named: Any) -> Future[Any]:
        """Queue a call that needs the model for itself."""
        queued = _Call(partial(call, *args, **named), alone=True)
        self._put(queued)
        return queued.future

    def between(self, call: Callable[..., Any], *args: Any) -> Future[Any]:
        """Queue a call that leaves the model as it is: it runs between two steps."""
        queued = _Call(partial(call, *args), alone=False)
        self._put(queued)
        return queued.future

    @property
    def waiting(self) -> int:
        """Requests whose turn has not come."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Replies under way in batches."""
        return len(self._reading) + sum(len(group.rows) for group in self._running)

    def _put(self, item: Job | _Call) -> None:
        with self._news:
            self._queue.append(item)
            self._news.notify()

    def _run(self) -> None:
        while True:
            with self._news:
                while not self._queue and not self._reading and not self._running:
                    self._news.wait()
            self._admit()
            with torch.inference_mode():
                self._read()
                for group in list(self._running):
                    try:
                        self._step(group)
                    except Exception as error:  # out of memory, for example: these replies cannot go on
                        self._give_up(group, error)

    # ---- the queue ---------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Begin what is at the head of the queue, as far as there is place."""
        while self._queue:
            item = self._queue[0]
            if isinstance(item, Job) and item.ended():
                self._queue.popleft()
                self._end(item, None)
            elif isinstance(item, Job) and not self.alone and item.joins:
                if not self._has_place(item):
                    return
                self._queue.popleft()
                self._begin(item)
            elif isinstance(item, _Call) and not item.alone:
                self._queue.popleft()
                self._call(item)
                return
            elif self.running:
                return
            else:
                self._queue.popleft()
                if isinstance(item, Job):
                    self._generate_alone(item)
                else:
                    self._call(item)
                return  # look at the queue again only after replies that wait for `_run`

    def _has_place(self, job: Job) -> bool:
        jobs = [reading.job for reading in self._reading]
        jobs += [row.job for group in self._running for row in group.rows]
        return not jobs or (len(jobs) < self._most and sum(other.tokens for other in jobs) + job.tokens <= self._limit)

    def _begin(self, job: Job) -> None:
        try:
            model = self._model()
            if self._stepper is None or self._stepper.model is not model:
                self._stepper = Stepper(model)
            with torch.inference_mode():
                cache, done = new_cache(model, self._kv), 0
                known = self._prefixes.find(job.ids)
                if known is not None:
                    prefix, done = known
                    prefix.fill(cache, done)
                    self.measures.reused(done)
                self._reading.append(_Reading(job, Row(job, model), cache, done))
        except Exception as error:
            self._end(job, error)

    def _call(self, call: _Call) -> None:
        if call.alone:
            self._prefixes.clear()
        if call.future.set_running_or_notify_cancel():
            try:
                result = call.run()
            except BaseException as error:  # belongs to whoever waits for the call
                call.future.set_exception(error)
            else:
                call.future.set_result(result)

    # ---- prompts -----------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        """Read up to a piece of prompts, in turns."""
        budget = self._piece
        while self._reading and budget > 0:
            reading = self._reading.popleft()
            job = reading.job
            if job.ended():
                self._end(job, None)
                continue
            try:
                budget -= self._read_piece(reading)
            except Exception as error:
                self._end(job, error)

    def _read_piece(self, reading: _Reading) -> int:
        """Read the next piece of a prompt; the tokens read."""
        assert self._stepper is not None
        job, before = reading.job, reading.done
        end = min(len(job.ids), (before // self._piece + 1) * self._piece)
        scores = self._stepper.read(reading.cache, job.ids[:end], before)
        reading.done = end
        if end < len(job.ids):
            self._reading.append(reading)
            return end - before
        whole = self._prefixes.missing(job.ids)
        if whole:
            prefix = beginning(reading.cache, whole)
            if prefix is not None:
                self._prefixes.add(job.ids[:whole], prefix)
        self.measures.began(len(job.ids), time.monotonic() - job.arrived)
        if len(job.ids) > _LONG:
            release_memory()
        row = reading.row
        failed = self._choose([row], scores)
        if row.finished:
            self._end(job, failed.get(id(row)))
            return end - before
        for group in self._running:
            if group.takes(end):
                group.batch.join(reading.cache)
                group.rows.append(row)
                break
        else:
            self._running.append(_Running(row, reading.cache))
        return end - before

    # ---- steps -------------------------------------------------------------------------------------------------------

    def _step(self, group: _Running) -> None:
        """One more token for each reply of a group."""
        assert self._stepper is not None
        for row in group.rows:
            if row.job.ended():
                row.finished = True
                self._end(row.job, None)
        self._drop_finished(group)
        if not group.rows:
            return
        scores = self._stepper.step(group.batch, [row.last for row in group.rows])
        failed = self._choose(group.rows, scores)
        self.measures.stepped(len(group.rows))
        for row in group.rows:
            if row.finished:
                self._end(row.job, failed.get(id(row)))
        self._drop_finished(group)

    def _choose(self, rows: list[Row], scores: torch.Tensor) -> dict[int, Exception]:
        """The next token of each row. An error ends its own row only."""
        failed: dict[int, Exception] = {}
        best = scores.argmax(-1).tolist() if any(row.plain for row in rows) else []
        for place, row in enumerate(rows):
            try:
                row.take(best[place] if row.plain else row.choose(scores[place]), scores[place])
            except Exception as error:
                row.finished, failed[id(row)] = True, error
        return failed

    def _drop_finished(self, group: _Running) -> None:
        keep = [place for place, row in enumerate(group.rows) if not row.finished]
        if len(keep) == len(group.rows):
            return
        group.rows = [group.rows[place] for place in keep]
        if keep:
            group.batch.keep(keep)
        else:
            self._running.remove(group)

    def _give_up(self, group: _Running, error: Exception) -> None:
        """End the replies of a group that have not ended yet."""
        for row in group.rows:
            if not row.finished:
                self._end(row.job, error)
        if group in self._running:
            self._running.remove(group)

    def _end(self, job: Job, error: Exception | None) -> None:
        if error is None and not job.ended():
            try:
                job.streamer.end()
            except Exception as late:
                error = late
        self._done(job, error)

    def _done(self, job: Job, error: Exception | None) -> None:
        self.measures.ended(job.streamer.total_tokens, error is not None)
        try:
            job.done(error)
        except RuntimeError:  # the event loop is closed: the server has ended
            pass

    # ---- alone -------------------------------------------------------------------------------------------------------

    def _generate_alone(self, job: Job) -> None:
        """A reply by `generate`."""
        model, began = self._model(), time.monotonic()
        watches: list[Any] = []
        streamer = job.streamer
        wanted = job.chances
        if wanted is not None:
            watch = Watch()
            watches.append(watch)
            streamer.watch(lambda token: watch.chances(token, wanted))
        if job.seed is not None:
            torch.manual_seed(job.seed)
        in_beams = (job.config.num_beams or 1) > 1  # generate takes no streamer then
        error: Exception | None = None

        def ended(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.full((len(ids),), streamer.stopped or job.ended(), dtype=torch.bool, device=ids.device)

        try:
            tokens = model.generate(
                **job.inputs,
                generation_config=job.config,
                streamer=None if in_beams else streamer,
                stopping_criteria=[ended],
                logits_processor=LogitsProcessorList([*watches, *(rule() for rule in job.rules)]),
                **quantized_cache.new_cache(model, self._kv),
            )
            if in_beams:
                prompt = len(job.ids)
                for part in (tokens[0, :prompt], *tokens[0, prompt:]):
                    streamer.put(part)
                streamer.end()
        except Exception as failure:
            error = failure
        if len(job.ids) > _LONG:
            release_memory()
        self.measures.began(len(job.ids), began - job.arrived)
        self._done(job, error)
