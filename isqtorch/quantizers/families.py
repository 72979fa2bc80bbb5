"""The families of quantizers, and what each of them can do. A format names its family in `solver`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from isqtorch.formats import Fields, QuantFormat

from . import absmax, affine, codebook, fp8, hqq, kquants, minmax
from .blocks import Blocks

Rule = Literal["search", "mlx"]
"""Alternatives to the default way of choosing the codes. A family supports both, one or none of them."""

FEEDBACK = "feedback"
"""The rule of all families that needs more than the weight: second moments of the inputs (`feedback.py`)."""


@dataclass(frozen=True)
class Family:
    """How the formats of a family choose scales and codes."""

    solve: Callable[[QuantFormat, Blocks, str | None], Fields]
    rules: tuple[str, ...] = ()  # alternatives to the default rule
    row_power: bool = False  # an importance vector is combined with the mean square of the whole row
    steps: Callable[[QuantFormat, Tensor], int] | None = None  # how many steps all blocks of a matrix take together

    @property
    def whole(self) -> bool:
        """Whether the quantizer needs all blocks at once."""
        return self.steps is not None


_FAMILIES = {
    "absmax": Family(absmax.solve, row_power=True),
    "minmax": Family(minmax.solve, row_power=True),
    "kquants": Family(kquants.solve),
    "codebook": Family(codebook.solve),
    "affine": Family(affine.solve, rules=("mlx", "search")),
    "hqq": Family(hqq.solve, rules=("search",), steps=hqq.count_steps),
    "fp8": Family(fp8.solve),
}


def family_of(fmt: QuantFormat) -> Family:
    """Return the family that chooses the codes of a format."""
    return _FAMILIES[fmt.solver]


def has_rule(fmt: QuantFormat, rule: str | None) -> bool:
    """Return whether a weight can be packed by `rule`. All formats support None, the default, and "feedback"."""
    return rule in (None, FEEDBACK) or rule in family_of(fmt).rules


def uses_importance(fmt: QuantFormat, rule: str | None) -> bool:
    """Return whether an importance vector changes the result of `rule`: only searches use one.

    "feedback" weighs the errors of columns in any case, by the second moments; their diagonal is the importance.
    """
    return fmt.takes_importance or rule in ("search", FEEDBACK)


def needs_whole(fmt: QuantFormat) -> bool:
    """Return whether the quantizer needs a whole matrix at once: HQQ stops by the error of all blocks."""
    return family_of(fmt).whole


def scale_rule(fmt: QuantFormat) -> str | None:
    """Return the rule that chooses the scales for "feedback": the family's search where the default has none."""
    return "search" if "search" in family_of(fmt).rules else None


def check_rule(fmt: QuantFormat, rule: str | None) -> None:
    """Raise ValueError unless the format's family can choose codes by `rule` from the weights alone."""
    rules = family_of(fmt).rules
    if rule is None or rule in rules:
        return
    if rule == FEEDBACK:
        raise ValueError(
            "quantize: rule 'feedback' needs the second moments of the layer's inputs. Use quantize_feedback for one weight, or "
            "quantize_ for a model."
        )
    known = " or ".join(["None", *map(repr, rules)])
    raise ValueError(f"quantize: {fmt.name} has no rule {rule!r}. Use rule={known}.")
