"""Refinement: what `refine_` did to a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from isqtorch.text import first_names


@dataclass(frozen=True)
class Refinement:
    """What `refine_` did. Divergences are means of KL(float model || model) over the held-out tokens, in nats.

    All tokens but the 256 most likely ones of a position count as one, so they are a little lower than `kl_divergence`
    gives.

    Attributes:
        before: the divergence at the beginning.
        after: the divergence at the end; `before` if no step was better.
        steps: number of steps that were made.
        kept: number of the step whose scales the model has now; 0: those of the beginning.
        tokens: number of tokens that it learned from.
        held_tokens: number of tokens that chose the step.
        layers: number of weights whose scales were tuned.
        norms: number of vectors of norms that were tuned.
        left: the packed layers that stayed as they were, with the reason.
        notes: what else is worth knowing.
        seconds: wall time.

    Example:
        isqtorch.quantize_(model, "afq3")
        refinement = isqtorch.refine_(model, float_model, text=text, tokenizer=tokenizer, steps=50)
        print(refinement.after / refinement.before, refinement.left)
    """

    before: float
    after: float
    steps: int
    kept: int
    tokens: int
    held_tokens: int
    layers: int
    norms: int = 0
    left: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    def __str__(self) -> str:
        lines = [
            f"refined {self.layers} weights and {self.norms} norms in {self.seconds:.0f} s: KL {self.before:.4g} -> {self.after:.4g} "
            f"on {self.held_tokens} held-out tokens (step {self.kept} of {self.steps}, learned from {self.tokens} tokens)"
        ]
        if not self.kept:
            lines.append("no step was better than the beginning; the model is unchanged")
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            reasons.setdefault(reason, []).append(name)
        lines += [f"left as they were: {first_names(names)}: {reason}" for reason, names in reasons.items()]
        return "\n".join([*lines, *self.notes])
