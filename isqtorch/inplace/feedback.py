"""The rule "feedback" in a request: which layers can have it, where their moments come from, and what came of it."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from isqtorch.formats import QuantFormat
from isqtorch.importance.feedback import Judged, Shelf, has_inputs, pack_by_feedback
from isqtorch.importance.imatrix import Imatrix
from isqtorch.importance.inputs import joint_parts
from isqtorch.importance.moments import Moments
from isqtorch.importance.passes import Passes
from isqtorch.importance.tokens import HOLD_EVERY
from isqtorch.importance.windows import Text, check_text, token_windows
from isqtorch.policy.layers import LayerInfo
from isqtorch.policy.options import parsed_bytes
from isqtorch.policy.request import Request
from isqtorch.quantizers import has_rule
from isqtorch.quantizers.families import FEEDBACK
from isqtorch.report.layer import Outcome
from isqtorch.text import first_names


@dataclass
class Feedback:
    """How one weight is packed with feedback.

    Attributes:
        shelf: has the moments, while the weight is packed.
        names: the layers that share the weight.
        shape: `[N, K]` or `[E, N, K]`.
        parts: rows of the parts of a joint matrix, which are judged by themselves.
        judged: what the held-out rows said, of every matrix or part that was packed and judged.
        unjudged: number of matrices for which there was nothing to judge with.
    """

    shelf: Shelf
    names: tuple[str, ...]
    shape: tuple[int, ...]
    parts: tuple[int, ...] = ()
    judged: list[Judged] = field(default_factory=list)
    unjudged: int = 0

    def pack(
        self, weight: Tensor, fmt: QuantFormat, importance: Tensor, expert: int | None, columns: slice
    ) -> tuple[Tensor, Tensor]:
        """Pack a matrix; see `pack_by_feedback`.

        Returns:
            The packed rows, and those by importance alone.
        """
        layer = self.shelf.layer(self.names, self.shape)
        packed, alone, judged = pack_by_feedback(
            weight, fmt, self.shelf, layer, importance, expert, self.parts, columns
        )
        self.judged += judged
        self.unjudged += not judged
        return packed, alone

    def outcome(self) -> Outcome | None:
        """What came of it; None if the weight was not packed."""
        if not self.judged and not self.unjudged:
            return None
        rows = sum(each.rows for each in self.judged)
        power = sum(each.power for each in self.judged)

        def relative(squares: float) -> float | None:
            return (squares / power) ** 0.5 if power else None

        return Outcome(
            share=sum(each.rows for each in self.judged if each.better) / rows if rows else 0.0,
            importance=relative(sum(each.importance for each in self.judged)),
            feedback=relative(sum(each.feedback for each in self.judged)),
            unjudged=self.unjudged,
        )


def can_feed_back(layers: Sequence[LayerInfo], fmt: QuantFormat) -> bool:
    """Whether a weight can be packed with feedback: some layer reads it with an input, and its format has the rule."""
    return has_inputs(layers) and has_rule(fmt, FEEDBACK)


def feedback_of(layers: Sequence[LayerInfo], fmt: QuantFormat, shelf: Shelf) -> Feedback | None:
    """How a weight that several layers may share is packed with feedback; None if it cannot be."""
    if not can_feed_back(layers, fmt):
        return None
    shape = layers[0].shape
    return Feedback(shelf, tuple(layer.name for layer in layers), shape, joint_parts(layers[0].name, *shape[-2:]))


def check_moments(request: Request, imatrix: Imatrix | None) -> None:
    """ValueError if the rule is "feedback" and there are no moments, or their values are damaged."""
    if request.options.rule != FEEDBACK:
        return
    if isinstance(imatrix, Moments):
        imatrix.check()
        return
    op = request.op
    if imatrix is not None:
        raise ValueError(
            f"{op}: rule='feedback' needs second moments, and {imatrix!r} has importance only. Give imatrix= the moments of "
            "isqtorch.collect_moments or the file that they were saved to, or calibration_file= and tokenizer= instead."
        )
    raise ValueError(
        f"{op}: rule='feedback' needs second moments of the layers' inputs. Give imatrix= the moments of "
        "isqtorch.collect_moments or the file that they were saved to; or, where the model can run first, calibration_file= "
        "with a text and tokenizer=."
    )


def supply_from_text(model: nn.Module, request: Request, text: Text, names: Collection[str]) -> Passes:
    """Prepare to collect the moments of the calibration text of a request.

    Args:
        model: the model, which runs in its present state.
        request: its options have the tokenizer.
        text: the text.
        names: the layers that are packed with feedback.

    Raises:
        ValueError, OSError: see `quantize_`.
    """
    op, options = request.op, request.options
    if options.imatrix is not None:
        raise ValueError(f"{op}: give either imatrix or calibration_file, not both")
    check_text(op, text, options.tokenizer)
    windows = token_windows(model, text, options.tokenizer, op, least=HOLD_EVERY, progress=options.progress)
    most = None if options.max_memory is None else parsed_bytes(op, "max_memory", options.max_memory)
    return Passes(model, windows, names, most, options.progress)


def feedback_notes(request: Request, feeds: Sequence[Feedback], passes: int, tied: Sequence[str]) -> list[str]:
    """Notes about what came of the rule, after the weights are packed."""
    if request.options.rule != FEEDBACK:
        return []
    outcomes = [outcome for feed in feeds if (outcome := feed.outcome()) is not None]
    ratios = [each.feedback / each.importance for each in outcomes if each.feedback is not None and each.importance]
    kept = sum(each.share > 0 for each in outcomes)
    notes = [f"feedback: {kept} of {len(outcomes)} weights"]
    if ratios:
        notes[0] += (
            f"; the error of their outputs on held-out rows is {statistics.median(ratios):.2f} of that by importance alone "
            "(median)"
        )
    if passes > 1:
        notes[0] += f"; moments collected in {passes} passes"
    without = [feed.names[0] for feed in feeds if feed.unjudged and not feed.judged]
    if without:
        notes.append(
            f"{len(without)} weights have too few held-out rows to judge with, and were packed by importance alone: "
            f"{first_names(without)}"
        )
    if tied:
        notes.append(
            f"{len(tied)} weights are tables of embeddings, which have no feedback if no head shares them: "
            f"{first_names(list(tied))}"
        )
    return notes
