"""How far a quantized model is from the original: KL divergence on texts, or distances of sentence embeddings.

A judge runs the original once and keeps what it said. It then runs each quantized model once. Standard errors are those
of a mean over windows (or sentences), because tokens of one window are not independent.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from isqtorch.running import bos_token, evaluating, run_model, token_ids

_LOGITS = 1 << 28  # of one forward
_PIECE = 1 << 20  # logits worked on at once, as many as the caches hold
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n\s*\n")
_SENTENCE_SIZE = (40, 400)  # characters
_SENTENCE_BATCH = 64


@dataclass
class Score:
    """A model against the original, on one text."""

    text: str
    count: int  # scored tokens, or sentences
    distance: float = 0.0  # mean KL(original || quantized) in nats, or mean 1 - cosine
    stderr: float = 0.0
    p99: float = 0.0
    top1: float = 100.0  # % of tokens with the same most likely token; of sentences with the same nearest sentence
    perplexity: float | None = None  # None for sentences
    perplexity_stderr: float | None = None


class Judge(Protocol):
    """Compares models with the original. `original` is the original's own score."""

    original: Score

    def __call__(self, model: nn.Module) -> Score: ...


class TextJudge:
    """The original's log-probabilities on one text, `[tokens, vocabulary]`.

    They are kept in f16, half the size of logits in f32. They are normalized again when they are read, so they are a
    distribution that differs from the original's by 1e-7 nats; the KL of 8-bit formats is 1e-4.
    """

    def __init__(self, name: str, model: nn.Module, text: str, tokenizer: Any, context: int, tokens: int) -> None:
        ids = token_ids(text[: 16 * tokens], tokenizer, "quality")[:tokens]  # no tokenizer makes fewer of so much text
        bos = bos_token(tokenizer)
        if bos is not None:
            rows = list(ids[1:].split(context - 1))  # the tokenizer has put one BOS at the beginning
            rows = [torch.cat([ids.new_tensor([bos]), row]) for row in rows]
        else:
            rows = list(ids.split(context))
        self.name = name
        self.windows = [row for row in rows if len(row) > 1]
        self.scored = sum(len(row) - 1 for row in self.windows)
        self.log_p = torch.empty(0)
        self.top = torch.empty(self.scored, dtype=torch.int64)
        self.original = self._run(model, first=True)

    def __call__(self, model: nn.Module) -> Score:
        return self._run(model, first=False)

    def _batches(self, vocabulary: int) -> list[Tensor]:
        """Windows of the same length together: `[B, T]`."""
        batches: list[list[Tensor]] = []
        for row in self.windows:
            most = max(1, _LOGITS // (vocabulary * len(row)))
            if batches and len(batches[-1][0]) == len(row) and len(batches[-1]) < min(most, max(1, 1024 // len(row))):
                batches[-1].append(row)
            else:
                batches.append([row])
        return [torch.stack(rows) for rows in batches]

    def _run(self, model: nn.Module, first: bool) -> Score:
        loss, divergence = torch.empty(self.scored), torch.zeros(self.scored)
        same = torch.ones(self.scored, dtype=torch.bool)
        done = 0
        config: Any = model.config
        with evaluating(model):
            for ids in self._batches(config.get_text_config().vocab_size):
                logits = _logits(run_model(model, ids))[:, :-1].flatten(0, 1)  # [scored, vocabulary]
                targets = ids[:, 1:].flatten()
                if first and not done:
                    self.log_p = torch.empty(self.scored, logits.shape[1], dtype=torch.float16)
                for begin in range(0, len(logits), step := max(1, _PIECE // logits.shape[1])):
                    here = slice(begin, begin + step)
                    log_q, at = torch.log_softmax(logits[here].float(), -1), slice(done, done + len(targets[here]))
                    loss[at] = -log_q.gather(1, targets[here, None])[:, 0]
                    if first:
                        self.log_p[at], self.top[at] = log_q.half(), log_q.argmax(-1)
                    else:
                        divergence[at] = kl(self.log_p[at], log_q)
                        same[at] = log_q.argmax(-1) == self.top[at]
                    done = at.stop
        assert done == self.scored
        nll, nll_error = self._mean(loss)
        distance, error = self._mean(divergence)
        perplexity = math.exp(nll)
        return Score(
            text=self.name,
            count=self.scored,
            distance=distance,
            stderr=error,
            p99=float(np.quantile(divergence.numpy(), 0.99, method="higher")),
            top1=100 * float(same.double().mean()),
            perplexity=perplexity,
            perplexity_stderr=perplexity * nll_error,
        )

    def _mean(self, values: Tensor) -> tuple[float, float]:
        """Mean over tokens, and its standard error from the means of the windows."""
        sizes = [len(row) - 1 for row in self.windows]
        means = [float(part.double().mean()) for part in values.split(sizes)]
        return float(values.double().mean()), standard_error(np.array(means), np.array(sizes))


def kl(kept: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) per row, in nats, from log-probabilities of p in f16 and of q in f32, `[n, vocabulary]` both."""
    log_p = torch.log_softmax(kept.float(), -1)
    p = log_p.exp()
    terms = (log_p - log_q).mul_(p).masked_fill_(p == 0, 0.0)
    return terms.sum(-1, dtype=torch.float64).clamp_min_(0.0).float()


class SentenceJudge:
    """The original's embeddings of the sentences of one text: means over tokens, of length 1."""

    def __init__(self, name: str, model: nn.Module, text: str, tokenizer: Any, context: int, tokens: int) -> None:
        self.name, self.tokenizer, self.context = name, tokenizer, context
        self.sentences, count = [], 0
        for sentence in sentences(text):
            if count >= tokens:
                break
            self.sentences.append(sentence)
            count += len(tokenizer(sentence)["input_ids"])
        if len(self.sentences) < 2:
            raise ValueError(
                f"{name} has {len(self.sentences)} sentences of 40 to 400 characters; 2 or more are needed"
            )
        self.reference = self._embed(model)
        self.nearest = self._nearest(self.reference)
        self.original = Score(name, len(self.sentences))

    def __call__(self, model: nn.Module) -> Score:
        found = self._embed(model)
        distance = (1 - (found * self.reference).sum(-1)).clamp_min(0.0).numpy()
        same = self._nearest(found) == self.nearest
        return Score(
            text=self.name,
            count=len(self.sentences),
            distance=float(distance.mean()),
            stderr=standard_error(distance),
            p99=float(np.quantile(distance, 0.99, method="higher")),
            top1=100 * float(same.double().mean()),
        )

    def _embed(self, model: nn.Module) -> Tensor:
        order = sorted(range(len(self.sentences)), key=lambda i: len(self.sentences[i]))  # little padding
        found = torch.empty(0, dtype=torch.float64)
        with evaluating(model):
            for begin in range(0, len(order), _SENTENCE_BATCH):
                at = order[begin : begin + _SENTENCE_BATCH]
                texts = [self.sentences[i] for i in at]
                batch = self.tokenizer(
                    texts, padding=True, truncation=True, max_length=self.context, return_tensors="pt"
                )
                hidden = model(**batch).last_hidden_state.double()  # [B, T, width]
                mask = batch["attention_mask"][..., None]
                mean = nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
                if not begin:
                    found = mean.new_empty(len(order), mean.shape[1])
                found[at] = mean
        return found

    @staticmethod
    def _nearest(embeddings: Tensor) -> Tensor:
        alike = embeddings @ embeddings.t()
        return alike.fill_diagonal_(-2.0).argmax(-1)


def sentences(text: str) -> list[str]:
    """The sentences of a text that are neither headlines nor tables, in order, each once."""
    found = (" ".join(part.split()) for part in _SENTENCE.split(text))
    low, high = _SENTENCE_SIZE
    return list(dict.fromkeys(part for part in found if low <= len(part) <= high))


def standard_error(values: NDArray[np.float64], sizes: NDArray[np.int64] | None = None) -> float:
    """Of the mean of independent values, weighted by `sizes` if given; 0 for a single one, of which it is unknown."""
    count = len(values)
    if count < 2:
        return 0.0
    weights = np.full(count, 1 / count) if sizes is None else sizes / sizes.sum()
    errors = weights * (values - (weights * values).sum())
    return float(math.sqrt(count / (count - 1) * (errors**2).sum()))


def _logits(output: Any) -> Tensor:
    logits: Tensor = getattr(output, "logits", output)
    return logits
