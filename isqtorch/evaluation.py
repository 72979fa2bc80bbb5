"""Quality of a model: perplexity on a text, and the KL divergence of its predictions from those of a reference model.

Both run the model over non-overlapping windows of `context` tokens, each from an empty cache. Position i of a window
predicts token i + 1, so the last position of a window has no target and is not scored. If the tokenizer begins a text
with a BOS token, every window begins with it: some models, such as Gemma, predict nothing useful without one.
Differences between formats are far smaller than differences between texts: compare only numbers from the same ids, the
same tokenizer and the same context.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from isqtorch.running import Ids, Model, bos_token, context_length, evaluating, run_model, text_config, token_ids

Mode = Literal["global", "llamacpp"]

_PIECE = 1 << 22  # logits worked on at once, in f32 or f64: 27 positions of a vocabulary of 150,000


class Perplexity(float):
    """A perplexity: a float with attributes. `perplexity` returns it.

    Attributes:
        nll: mean negative log-likelihood per token, in nats; the perplexity is its exponential.
        stderr: standard error of the perplexity, `perplexity * sqrt(variance of the tokens' nll / (tokens - 1))`, as in
            llama.cpp.
        tokens: number of scored tokens.

    Example:
        result = isqtorch.perplexity(model, text, tokenizer)
        print(float(result), result.nll, result.stderr, result.tokens)
    """

    nll: float
    stderr: float
    tokens: int

    def __new__(cls, nll: float, nll_stderr: float, tokens: int) -> Perplexity:
        value = math.exp(nll) if nll < 709 else nll + math.inf  # nan stays nan
        self = super().__new__(cls, value)
        self.nll, self.stderr, self.tokens = nll, value * nll_stderr, tokens
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Perplexity, (self.nll, self.stderr / self, self.tokens)

    def __repr__(self) -> str:
        return f"{float(self):.4f} +- {self.stderr:.4f} ({self.tokens} tokens)"


@dataclass(frozen=True)
class KLResult:
    """KL(reference || model) over the scored positions. `kl_divergence` returns it.

    Attributes:
        mean: mean over the positions, in nats.
        p99: 99th percentile, in nats: 99 % of the positions have this value or a lower one.
        max: largest value, in nats.
        top1_agreement: percentage of positions where both models give the highest probability to the same token.
        tokens: number of scored positions.

    Example:
        result = isqtorch.kl_divergence(model, isqtorch.reference_logits(model, text, tokenizer), text, tokenizer)
        print(result.mean, result.top1_agreement)  # 0.0 100.0, because model and reference are the same
    """

    mean: float
    p99: float
    max: float
    top1_agreement: float
    tokens: int

    def __str__(self) -> str:
        return (
            f"KL {self.mean:.6f}, 99 % {self.p99:.6f}, max {self.max:.4f}, same top token {self.top1_agreement:.2f} % "
            f"({self.tokens} tokens)"
        )


def perplexity(
    model: Model,
    ids_or_text: Ids,
    tokenizer: Any = None,
    context: int = 512,
    mode: Mode = "global",
    batch: int = 1,
    progress: bool = False,
) -> Perplexity:
    """Compute the perplexity of a text: the exponential of the mean negative log-likelihood of its scored tokens.

    Args:
        model: a causal language model: a callable that maps ids `[B, T]` to logits `[B, T, vocabulary]`, or to a tuple
            or object with these logits. A module runs in eval mode and gets its training flags back.
        ids_or_text: token ids `[T]` or `[1, T]`, or a text. A text is tokenized with the tokenizer's usual special
            tokens.
        tokenizer: needed for a text; with ids it is needed if the model expects a BOS token, which they do not show.
        context: tokens per window, at least 2 (in mode "llamacpp" 3).
        mode: "global" scores every token except the first one of each window, also in a shorter last window. If the
            tokenizer adds a BOS token, it is that first one: windows have a BOS and context - 1 tokens of the text, all
            of which are scored. "llamacpp" computes the same number as llama-perplexity: whole windows only, the first
            token replaced by BOS if the tokenizer adds one, and only the tokens after position context // 2 scored.
        batch: windows per forward. Logits of `batch * context * vocabulary` values are held in memory.
        progress: show a progress bar.

    Returns:
        A float with the attributes nll, stderr and tokens. NaN if the model's logits are NaN.

    Raises:
        ValueError: a bad argument, too few tokens, a context longer than the model's, ids outside its vocabulary, or
            logits of the wrong shape.

    Example:
        text = Path("examples/demo_model/heldout.txt").read_text()
        print(isqtorch.perplexity(model, text, tokenizer, context=256))
    """
    if mode not in get_args(Mode):
        raise ValueError(f"perplexity: mode must be 'global' or 'llamacpp', got {mode!r}")
    llamacpp = mode == "llamacpp"
    ids = token_ids(ids_or_text, tokenizer, "perplexity")
    bos = bos_token(tokenizer)
    if llamacpp:
        run = _Windows("perplexity", ids, context, batch, first=context // 2, whole_only=True)
    else:
        run = _Windows("perplexity", ids, context, batch, bos)
    nll = torch.empty(run.tokens, dtype=torch.float64)
    done = 0
    with evaluating(model):
        for window in run.each(progress, model):
            inputs = window.clone()
            if bos is not None:
                inputs[:, 0] = bos  # in mode "global" it is there already
            logits = _scored_logits(model, inputs, run.first)  # [n, vocab]
            targets = window[:, run.first + 1 :].flatten().to(logits.device)  # [n]
            for piece in _pieces(logits):
                losses = nn.functional.cross_entropy(_float(logits[piece]), targets[piece], reduction="none")
                nll[done : done + len(losses)] = losses.cpu()
                done += len(losses)
    assert done == run.tokens
    mean = float(nll.mean())
    variance = float(nll.var(correction=0)) / max(run.tokens - 1, 1)
    return Perplexity(mean, math.sqrt(variance), run.tokens)


def reference_logits(
    model: Model,
    ids_or_text: Ids,
    tokenizer: Any = None,
    context: int = 512,
    batch: int = 1,
    progress: bool = False,
) -> Tensor:
    """Compute the logits of every scored position, as the reference for `kl_divergence`.

    Args:
        model, ids_or_text, tokenizer, context, batch, progress: as for `perplexity`.

    Returns:
        `[tokens, vocabulary]` on the CPU, in the dtype of the model's logits. This is large: a text of 30,000 tokens
        and a vocabulary of 128,000 need 8 GB in bf16. If both models fit in memory, pass the reference model itself to
        `kl_divergence` instead.

    Raises:
        ValueError: as for `perplexity`.

    Example:
        reference = isqtorch.reference_logits(model, text, tokenizer)
        isqtorch.quantize_(model, "q4k")
        print(isqtorch.kl_divergence(model, reference, text, tokenizer))
    """
    ids = token_ids(ids_or_text, tokenizer, "reference_logits")
    run = _Windows("reference_logits", ids, context, batch, bos_token(tokenizer))
    stored = torch.empty(0)
    done = 0
    with evaluating(model):
        for window in run.each(progress, model):
            logits = _scored_logits(model, window)
            if not done:
                stored = torch.empty(run.tokens, logits.shape[1], dtype=logits.dtype)
            stored[done : done + len(logits)] = logits
            done += len(logits)
    return stored


class Recorded:
    """A model that returns the logits of `reference_logits` again, so that one run gives perplexity and divergence.

    It can be used once, with the same ids, tokenizer and context, and with batch=1.
    """

    def __init__(self, logits: Tensor) -> None:
        self.logits, self.done = logits, 0  # [scored positions, vocabulary]

    def __call__(self, ids: Tensor) -> Tensor:
        scored = ids.shape[1] - 1  # the last position of a window has no target, so its logits were not kept
        window = self.logits[self.done : self.done + scored]
        self.done += scored
        return nn.functional.pad(window, (0, 0, 0, 1))[None]  # [1, T, vocabulary]


def kl_divergence(
    model: Model,
    reference: Tensor | Model,
    ids_or_text: Ids,
    tokenizer: Any = None,
    context: int = 512,
    batch: int = 1,
    progress: bool = False,
) -> KLResult:
    """Compute the Kullback-Leibler divergence KL(reference || model) of a model's predictions.

    It is computed in float64 from the logits, so even values near 1e-9 have several correct digits.

    Args:
        model: the model to judge, as for `perplexity`.
        reference: the result of `reference_logits` for the same ids, tokenizer and context, or the reference model
            itself. A model runs window by window, and its logits are not stored.
        ids_or_text, tokenizer, context, batch, progress: as for `perplexity`; the same tokens are scored as in its mode
            "global".

    Returns:
        Mean, 99th percentile and maximum in nats, and how often both models prefer the same token.

    Raises:
        ValueError: as for `perplexity`, or the reference has another number of positions or another vocabulary.

    Example:
        reference = copy.deepcopy(model)
        isqtorch.quantize_(model, "q4k")
        print(isqtorch.kl_divergence(model, reference, text, tokenizer))
    """
    ids = token_ids(ids_or_text, tokenizer, "kl_divergence")
    run = _Windows("kl_divergence", ids, context, batch, bos_token(tokenizer))
    if isinstance(reference, Tensor) and (reference.ndim != 2 or len(reference) != run.tokens):
        raise ValueError(
            f"kl_divergence: the reference has shape {list(reference.shape)}, but these ids in windows of {context} have "
            f"{run.tokens} scored positions. Make it with reference_logits for the same ids, tokenizer and context."
        )
    divergence = torch.empty(run.tokens, dtype=torch.float64)
    same_top = done = 0
    with evaluating(model), evaluating(reference):
        for window in run.each(progress, model):
            logits = _scored_logits(model, window)
            if isinstance(reference, Tensor):
                expected = reference[done : done + len(logits)]
            else:
                expected = _scored_logits(reference, window)
            if expected.shape != logits.shape:
                raise ValueError(
                    f"kl_divergence: the reference has a vocabulary of {expected.shape[-1]}, the model of {logits.shape[-1]}"
                )
            for piece in _pieces(logits):
                p, q = expected[piece].to(logits.device), logits[piece]
                divergence[done : done + len(p)] = _kl(p, q).cpu()
                same_top += int((p.argmax(-1) == q.argmax(-1)).sum())
                done += len(p)
    values = divergence.numpy()
    return KLResult(
        mean=float(values.mean()),
        p99=float(np.quantile(values, 0.99, method="higher")),  # a value that occurs: no inf - inf
        max=float(values.max()),
        top1_agreement=100 * same_top / run.tokens,
        tokens=run.tokens,
    )


def _kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """Compute KL(p || q) per row in float64: `[n, vocab]` twice -> `[n]`.

    The error in float32 would be 1e-6, which is as large as the divergence of q8_0.
    """
    if p_logits.device.type == "mps":  # MPS has no float64
        p_logits, q_logits = p_logits.cpu(), q_logits.cpu()
    log_p = torch.log_softmax(p_logits.double(), dim=-1)
    terms = torch.log_softmax(q_logits.double(), dim=-1)
    torch.sub(log_p, terms, out=terms)  # in place from here: allocating arrays of this size is slower than computing
    p = log_p.exp_()
    terms.mul_(p).masked_fill_(p == 0, 0.0)  # tokens masked with -inf contribute 0
    return terms.sum(-1).clamp_min_(0.0)


# ---- windows ---------------------------------------------------------------------------------------------------------


class _Windows:
    """The windows of a text: the number of scored tokens, and an iterator over batches of ids `[B, T]`.

    With `bos`, each window begins with this token. `first` is the first position that is scored.
    """

    def __init__(
        self,
        op: str,
        ids: Tensor,
        context: int,
        batch: int,
        bos: int | None = None,
        *,
        first: int = 0,
        whole_only: bool = False,
    ) -> None:
        self.op, self.context, self.batch, self.first = op, context, batch, first
        least = 3 if whole_only else 2  # the first half of a window of 2 would leave nothing to score
        if not isinstance(context, int) or context < least:
            raise ValueError(f"{op}: context must be an integer of {least} or more, got {context!r}")
        if not isinstance(batch, int) or batch < 1:
            raise ValueError(f"{op}: batch must be a positive integer, got {batch!r}")
        needed = context if whole_only else 2
        self.ids = ids if bos is None else _with_bos(ids, bos, context)
        if len(self.ids) < needed:
            raise ValueError(f"{op}: {len(ids)} tokens are too few, at least {needed} are needed. Use a longer text.")
        self.whole = len(self.ids) // context
        tail = len(self.ids) % context
        self.tail = tail if tail >= 2 and not whole_only else 0
        self.tokens = self.whole * (context - 1 - first) + max(self.tail - 1, 0)

    def each(self, progress: bool, model: Model) -> Iterator[Tensor]:
        """Check that the model fits, then yield batches of windows. A shorter last window is a batch of its own."""
        self._check_model(model)
        end = self.whole * self.context
        batches = list(torch.split(self.ids[:end].view(-1, self.context), self.batch)) if self.whole else []
        if self.tail:
            batches.append(self.ids[None, end : end + self.tail])
        if not progress:
            yield from batches
            return
        from tqdm import tqdm

        yield from tqdm(batches, desc=self.op, unit="batch", leave=False)

    def _check_model(self, model: Model) -> None:
        longest = context_length(model)
        if longest is not None and longest < self.context:
            raise ValueError(
                f"{self.op}: context is {self.context}, but the model has max_position_embeddings = {longest}. "
                f"Use context={longest} or less."
            )
        vocabulary = getattr(text_config(model), "vocab_size", None)
        low, high = (int(value) for value in torch.aminmax(self.ids))
        if low < 0 or (isinstance(vocabulary, int) and high >= vocabulary):
            raise ValueError(
                f"{self.op}: token ids run from {low} to {high}, the model knows 0 to "
                f"{vocabulary - 1 if isinstance(vocabulary, int) else '...'}. Use the model's own tokenizer."
            )


def _with_bos(ids: Tensor, bos: int, context: int) -> Tensor:
    """Put BOS before every context - 1 ids `[T]`, so that windows of `context` begin with it. No text stays as it is."""
    text = ids[1:] if len(ids) and int(ids[0]) == bos else ids
    if not len(text):
        return ids
    first = torch.tensor([bos])
    return torch.cat([part for piece in text.split(context - 1) for part in (first, piece)])


# ---- model -----------------------------------------------------------------------------------------------------------


def _scored_logits(model: Model, ids: Tensor, first: int = 0) -> Tensor:
    """Run the model and return the logits of positions first .. T - 2, which have a target in the window.

    Ids `[B, T]` -> `[B * (T - 1 - first), vocab]`.
    """
    output = run_model(model, ids)
    if isinstance(output, (tuple, list)):
        output = output[0]
    elif not isinstance(output, Tensor):
        output = getattr(output, "logits", None)
    if not isinstance(output, Tensor) or output.ndim != 3 or output.shape[:2] != ids.shape:
        found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"the model must return logits of shape [{ids.shape[0]}, {ids.shape[1]}, vocabulary] for ids of shape "
            f"{list(ids.shape)}, got {found}. Use a causal language model with its head."
        )
    return output[:, first:-1].flatten(0, 1)


def _pieces(logits: Tensor) -> Iterator[slice]:
    """Yield slices of rows of logits `[n, vocab]`: at most `_PIECE` values each, but at least one row."""
    rows = max(1, _PIECE // logits.shape[1])
    for start in range(0, len(logits), rows):
        yield slice(start, min(start + rows, len(logits)))


def _float(logits: Tensor) -> Tensor:
    """Convert logits to f32; leave f64 as it is."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
