"""Calibration without a text: the model writes one itself.

What a model writes is close to what it was trained on, so the inputs of its layers are close to those of real text.
Every sequence begins with a random token, so that the texts differ, behind the BOS token if the tokenizer puts one
before a text. The others are drawn from the model's own predictions: temperature 1, and from the fewest tokens that
hold 98 % of the probability, which leaves out the noise of the tail.

transformers' `generate` runs the model, because it knows the caches of all its models. The drawing is a logits
processor with a random generator of its own: the same seed gives the same text on the same device, and the state of
torch's generators does not change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from isqtorch.progress import progress_bar
from isqtorch.running import bos_token, context_length, evaluating, text_config

SELF = "self"
"""The value of `calibration` that asks for a text that the model writes."""

SEQUENCES = 48
TOKENS = 256
_NUCLEUS = 0.98
_WAY_OUT = "give a text, token ids or an importance matrix instead"


def write_windows(
    model: nn.Module,
    tokenizer: Any = None,
    *,
    sequences: int = SEQUENCES,
    tokens: int = TOKENS,
    seed: int = 0,
    op: str = "calibration",
    progress: bool | None = None,
) -> Tensor:
    """Let a causal language model of transformers write token windows to calibrate with.

    All sequences are written in one batch, one token of each per step.

    Args:
        model: the model, packed or not. It runs in eval mode and gets its training flags back.
        tokenizer: its tokenizer. It tells whether texts begin with a BOS token, and which tokens are special: these
            begin no sequence. None: no BOS token, and any token may be the first.
        sequences: number of windows.
        tokens: tokens of each, with the first ones; at most the context of the model.
        seed: of the random numbers.
        op: name of the calling function, for messages.
        progress: whether to show a progress bar; None: if stderr is a terminal.

    Returns:
        int64 `[sequences, tokens]` on the CPU.

    Raises:
        ValueError: the model does not continue texts, or its logits are not finite.
    """
    check_writer(model, op)
    longest = context_length(model)
    tokens = min(tokens, *([longest] if longest is not None else []))
    generator = torch.Generator().manual_seed(seed)
    prompt = _prompts(model, tokenizer, sequences, generator, op)
    new = tokens - prompt.shape[1]
    if new < 1:
        return prompt[:, :tokens]
    device = next(model.parameters()).device
    prompt = prompt.to(device)
    with evaluating(model), progress_bar("write", "token", progress, total=new) as bar:
        written: Tensor = model.generate(  # type: ignore[operator]  # a method of transformers' models
            prompt,
            attention_mask=torch.ones_like(prompt),
            logits_processor=[_Nucleus(generator, bar, op)],
            do_sample=False,  # the processor draws, and leaves one token to choose
            num_beams=1,
            max_new_tokens=new,
            min_new_tokens=new,  # a text does not end before its window does
            pad_token_id=0,  # nothing is padded; without it transformers prints a remark
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            return_dict_in_generate=False,
        )
    return written.to("cpu", torch.int64)


def check_writer(model: nn.Module, op: str) -> None:
    """ValueError unless a model can write a text of its own, that is, continue one."""
    name = type(model).__name__
    if not callable(getattr(model, "generate", None)) or not callable(getattr(model, "can_generate", None)):
        why = "has no method generate of transformers, which writes it"
    elif not model.can_generate():  # type: ignore[operator]
        why = "generates no text"
    elif getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        why = "has an encoder and cannot begin a text without an input"
    elif getattr(model, "main_input_name", "input_ids") != "input_ids":
        why = f"takes {model.main_input_name} and no text"
    else:
        return
    raise ValueError(
        f"{op}: calibration='self' lets the model write the calibration text, and {name} {why}: {_WAY_OUT}."
    )


def describe(windows: Tensor, tokenizer: Any) -> str:
    """Describe windows that a model wrote, for the report."""
    begin = "" if tokenizer is not None else ", without a BOS token because no tokenizer was given"
    return f"text that the model wrote itself ({len(windows)} sequences of {windows.shape[1]} tokens{begin})"


def _prompts(model: nn.Module, tokenizer: Any, sequences: int, generator: torch.Generator, op: str) -> Tensor:
    """The first tokens of all sequences, `[sequences, 1 or 2]`: BOS if texts begin so, and a random token."""
    known = getattr(text_config(model), "vocab_size", None)
    if tokenizer is not None and hasattr(tokenizer, "__len__"):  # behind these the table may have untrained rows
        known = min(len(tokenizer), known or len(tokenizer))
    if not known:
        raise ValueError(
            f"{op}: calibration='self': the configuration of {type(model).__name__} has no vocab_size: {_WAY_OUT}."
        )
    special = set(getattr(tokenizer, "all_special_ids", None) or ())
    ordinary = torch.tensor([token for token in range(known) if token not in special])
    first = ordinary[torch.randint(len(ordinary), (sequences, 1), generator=generator)]
    bos = bos_token(tokenizer)
    return first if bos is None else torch.cat([torch.full_like(first, bos), first], dim=1)


class _Nucleus:
    """A logits processor that draws the next tokens and leaves only these possible."""

    def __init__(self, generator: torch.Generator, bar: Any, op: str) -> None:
        self.generator, self.bar, self.op = generator, bar, op

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.bar.update()
        chosen = draw(scores.float().softmax(-1), self.generator, self.op)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


def draw(p: Tensor, generator: torch.Generator, op: str = "calibration") -> Tensor:
    """Draw a token from each row of probabilities `[B, vocabulary]`, but none outside of the row's nucleus.

    The nucleus has the most likely tokens that together hold 98 %. A token is in it if all more likely ones hold less.
    Draws from outside are repeated, which gives the probabilities inside without sorting the vocabulary.
    """
    if not bool(torch.isfinite(p).all()):
        raise ValueError(f"{op}: the model's logits are not finite. Run the model in bf16 or f32.")
    cumulated = p.cumsum(-1)
    chosen = p.argmax(-1)  # kept only if a token outside is drawn each time
    waiting = torch.arange(len(p), device=p.device)
    for _ in range(100):
        at = torch.rand(len(waiting), 1, generator=generator).to(p.device) * cumulated[waiting, -1:]
        token = torch.searchsorted(cumulated[waiting], at, right=True)[:, 0].clamp(max=p.shape[1] - 1)
        rows = p[waiting]
        more_likely = torch.where(rows > rows.gather(1, token[:, None]), rows, 0.0).sum(-1)
        inside = (more_likely < _NUCLEUS) & (rows.gather(1, token[:, None])[:, 0] > 0)
        chosen[waiting[inside]] = token[inside]
        waiting = waiting[~inside]
        if not len(waiting):
            break
    return chosen
