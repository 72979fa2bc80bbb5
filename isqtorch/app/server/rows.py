"""One reply while it is generated: how its tokens are chosen, and when it ends.

The rules for choosing a token are those of `generate`: the same processors, made from the same generation settings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from .replies import Chances, Streamer

_ROOM = 64  # tokens to add when the text of a reply is full
_PLAIN = {"greedy_search", "sample"}  # ways to generate that take one token after the other


@dataclass
class Job:
    """A reply that was asked for.

    Attributes:
        inputs: what the tokenizer made of the prompt, `[1, T]` each.
        config: the generation settings.
        streamer: where the tokens go.
        ended: whether the reply should end: its client is gone, or the server ends.
        done: called at the end, with the error if there was one.
        seed: of sampling; None: any.
        chances: for how many of the likeliest tokens the log probabilities are wanted; None: for no token.
        rules: make further rules for the scores, when the turn of the reply comes.
    """

    inputs: dict[str, Tensor]
    config: GenerationConfig
    streamer: Streamer
    ended: Callable[[], bool]
    done: Callable[[Exception | None], Any]
    seed: int | None = None
    chances: int | None = None
    rules: Sequence[Callable[[], LogitsProcessor]] = ()
    arrived: float = 0.0
    ids: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.ids = self.inputs["input_ids"][0].tolist()

    @property
    def tokens(self) -> int:
        """Largest number of tokens of prompt and reply together."""
        return len(self.ids) + int(self.config.max_new_tokens)

    @property
    def joins(self) -> bool:
        """Whether the reply can be a row of a batch: one token after the other, from tokens alone."""
        config = self.config
        return (
            config.get_generation_mode().value in _PLAIN
            and config.guidance_scale in (None, 1)
            and not config.stop_strings
            and config.max_time is None
            and config.num_return_sequences in (None, 1)
            and set(self.inputs) <= {"input_ids", "attention_mask"}
        )


class Watch(LogitsProcessor):  # type: ignore[misc]  # transformers is not typed
    """A rule that changes nothing: it remembers the scores, from which the log probabilities are computed."""

    def __init__(self) -> None:
        self.scores: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.scores = scores.clone()
        return scores

    def chances(self, token: int, top: int) -> Chances:
        """The log probabilities of the token that was chosen by the scores of the last call."""
        assert self.scores is not None
        return chances(self.scores[0], token, top)


class Penalties(LogitsProcessor):  # type: ignore[misc]
    """OpenAI's penalties, on the tokens of the reply: one for each time a token was said, one for having been said."""

    def __init__(self, frequency: float, presence: float, prompt: int) -> None:
        self.frequency, self.presence, self.prompt = frequency, presence, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        for said, row in zip(input_ids[:, self.prompt :], scores, strict=True):
            tokens, times = said.unique(return_counts=True)
            row[tokens] -= self.frequency * times + self.presence
        return scores


def chances(scores: Tensor, token: int, top: int) -> Chances:
    """The log probabilities of a token and of the likeliest ones, from scores `[V]`."""
    scores = scores.float()
    total = scores.logsumexp(-1)
    best = scores.topk(min(top, len(scores)))
    likeliest = zip(best.indices.tolist(), (best.values - total).tolist(), strict=True)
    return Chances(token, float(scores[token] - total), list(likeliest))


class Row:
    """A reply in a batch.

    Attributes:
        last: its last token, which the model has not seen yet.
        finished: whether it needs no more tokens.
    """

    def __init__(self, job: Job, model: Any) -> None:
        self.job, self.last, self.finished = job, -1, False
        config, _ = model._prepare_generation_config(job.config)  # fills in what `generate` fills in
        model._prepare_special_tokens(config, True, device=model.device)
        self._rules = model._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=len(job.ids),
            logits_processor=LogitsProcessorList(rule() for rule in job.rules),
            device=model.device,
        )
        self._samples = bool(config.do_sample)
        self._most = int(config.max_new_tokens)
        ends = config.eos_token_id
        self._ends = set(ends if isinstance(ends, list) else [ends])
        self._random: torch.Generator | None = None
        if self._samples:
            self._random = torch.Generator(device=model.device)
            if job.seed is None:
                self._random.seed()
            else:
                self._random.manual_seed(job.seed)
        self._text = torch.empty(1, len(job.ids) + _ROOM, dtype=torch.long, device=model.device)
        self._text[0, : len(job.ids)] = torch.tensor(job.ids)
        self._length, self._made = len(job.ids), 0

    @property
    def plain(self) -> bool:
        """Whether the token with the highest score is chosen, and nothing else is asked."""
        return not self._samples and not self._rules and self.job.chances is None

    def choose(self, scores: Tensor) -> int:
        """The next token, from scores `[V]`."""
        ruled = self._rules(self._text[:, : self._length], scores.unsqueeze(0).clone())
        if self._random is None:
            return int(ruled.argmax(-1))
        return int(torch.multinomial(ruled.softmax(-1), 1, generator=self._random))

    def take(self, token: int, scores: Tensor) -> None:
        """Append a token to the reply."""
        wanted = self.job.chances
        self.job.streamer.token(token, None if wanted is None else chances(scores, token, wanted))
        self.last = token
        self._made += 1
        if self._length == self._text.shape[1]:
            self._text = torch.cat([self._text, self._text.new_empty(1, max(_ROOM, self._length // 2))], dim=1)
        self._text[0, self._length] = token
        self._length += 1
        self.finished = token in self._ends or self._made >= self._most or self.job.streamer.stopped

    @property
    def text(self) -> list[int]:
        """The tokens of prompt and reply."""
        tokens: list[int] = self._text[0, : self._length].tolist()
        return tokens
