"""`quantize_(model, "auto", target_bpw=4.5)`: choose the format of each layer by measurement, within a budget.

    items    The layers that the request quantizes. Tied weights form one item. So do the same matrices of all experts
             in a list of linear layers. Each stack of fused experts is an item.
    options  The formats that an item can have: each allowed format, or its fallback. A layer in the topology has one.
    costs    See sensitivity.py.
    choice   See knapsack.py.

Embeddings and output heads are not promoted: only the measured cost counts. Speed does not count: decoding reads every
byte once, so a smaller model is faster in any format. To exclude a format that is slow on a device, list the others in
`formats`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn

from isqtorch.formats import QuantFormat, Spec, get_format, number_of_bits
from isqtorch.importance.feedback import Shelf, has_inputs
from isqtorch.importance.imatrix import Imatrix, importance_of
from isqtorch.importance.moments import Moments
from isqtorch.importance.passes import Passes
from isqtorch.importance.rules import rule_of
from isqtorch.importance.windows import Text
from isqtorch.modules.convert import owner_of, weight_matrix
from isqtorch.modules.packed import ordinary_tensors
from isqtorch.policy.decide import decide
from isqtorch.policy.inventory import Inventory
from isqtorch.policy.layers import LayerInfo
from isqtorch.policy.mixes import LISTED_EXPERT
from isqtorch.policy.request import Assigned, Request
from isqtorch.progress import progress_bar
from isqtorch.quantizers import scale_rule
from isqtorch.quantizers.families import FEEDBACK
from isqtorch.report.choice import Choice, Measured
from isqtorch.report.report import QuantReport
from isqtorch.text import cause, human_size

from .budget import Budget
from .curvature import measure_curvature
from .knapsack import Option, solve
from .sensitivity import Error, ShelvedMoments, Sums, Weighing, costs, errors_of, measure_errors


@dataclass(frozen=True)
class Item:
    """Weights that get one format together."""

    weights: tuple[tuple[LayerInfo, ...], ...]  # for each weight, the layers that share it
    options: dict[str, Spec]  # resulting format -> format to request for it; smallest first

    @property
    def names(self) -> list[str]:
        return [layer.name for sharing in self.weights for layer in sharing]

    @property
    def numel(self) -> int:
        return sum(sharing[0].numel for sharing in self.weights)

    @property
    def is_head(self) -> bool:
        return any(layer.role == "head" for sharing in self.weights for layer in sharing)

    def size(self, fmt: str) -> int:
        return sum(sharing[0].packed_bytes(get_format(fmt)) for sharing in self.weights)


WeightOf = Callable[[Sequence[str]], Tensor]
"""(names of all layers that share a weight) -> that float weight, `[N, K]` or `[E, N, K]`."""


class Auto:
    """The optimization problem: items, bytes that are fixed, and the budget. It reads no weights.

    Raises:
        ValueError: no layer can be quantized, or even the smallest formats exceed the budget; the message gives their
            size.
    """

    def __init__(self, inventory: Inventory, request: Request, budget: Budget) -> None:
        self.inventory, self.request, self.budget = inventory, request, budget
        self.items, self.misfits = _items(inventory, request, budget.formats)
        smallest = [next(iter(item.options)) for item in self.items]
        self.fixed = self._total(smallest) - self._size(smallest)  # bytes outside of the items
        self.limit = budget.bytes_for(inventory)
        least = self._total(smallest)
        if least > self.limit:
            bpw = 8 * least / inventory.numel
            raise ValueError(
                f"{request.op}: {budget} cannot be reached: with the smallest of the allowed formats everywhere, what is pinned and "
                f"what is not quantized, the model has {bpw:.4f} bits per weight, {human_size(least)} ({least} bytes)."
            )

    def smallest(self) -> Request:
        """A request for the smallest format of every item. It selects the same layers as the final one.

        It has no `activations`, because it is not known yet which layers will be in fp8.
        """
        return self._request([next(iter(item.options)) for item in self.items]).changed(activations=None)

    def choose(self, errors: Sequence[Mapping[str, Error]], measure: str) -> tuple[Request, Choice]:
        """The best choice within the budget: as a request, and as a record for the report.

        Args:
            errors: for each item, its errors by format.
            measure: the kind of cost: "kl", "output" or "weight".
        """
        by_item = costs(errors, [item.numel for item in self.items], [item.is_head for item in self.items])
        options = [
            [Option(item.size(fmt), cost[fmt]) for fmt in item.options]
            for item, cost in zip(self.items, by_item, strict=True)
        ]
        picks = solve(options, self.limit - self.fixed)
        chosen = [list(item.options)[pick] for item, pick in zip(self.items, picks, strict=True)]
        rows = [
            (
                item.names,
                fmt,
                {name: Measured(item.size(name), cost[name], error[name].weight) for name in item.options},
            )
            for item, fmt, cost, error in zip(self.items, chosen, by_item, errors, strict=True)
        ]
        predicted = sum(cost[fmt] for cost, fmt in zip(by_item, chosen, strict=True))
        choice = Choice(measure, str(self.budget), rows, predicted, self._notes(chosen, measure, predicted))
        return self._request(chosen), choice

    def _notes(self, chosen: Sequence[str], measure: str, predicted: float) -> list[str]:
        total = self._total(chosen)
        by = {
            "kl": f"the curvature of the KL divergence, which predicts {predicted:.5f} nats",
            "output": "the errors of weights, weighed by importance; quantize_ with a calibration file chooses better",
            "weight": "the errors of weights; quantize_ with a calibration file chooses better",
        }[measure]
        notes = [
            f"auto: {8 * total / self.inventory.numel:.4f} bits per weight, {human_size(total)}, for {self.budget}; by {by}; "
            f"{self.limit - total} bytes unused"
        ]
        if all(fmt == list(item.options)[-1] for item, fmt in zip(self.items, chosen, strict=True)):
            notes.append("auto: every layer has the largest of the allowed formats; the budget would hold more")
        return notes

    def _request(self, chosen: Sequence[str]) -> Request:
        assigned = {
            name: Assigned(spec.name if isinstance(spec := item.options[fmt], QuantFormat) else spec, "")
            for item, fmt in zip(self.items, chosen, strict=True)
            for name in item.names
        }
        return replace(self.request, assigned=self.misfits | assigned)

    def _total(self, chosen: Sequence[str]) -> int:
        verdict = decide(self.inventory.layers, self._request(chosen))
        return QuantReport.build(self.inventory, verdict, None).bytes_after

    def _size(self, chosen: Sequence[str]) -> int:
        return sum(item.size(fmt) for item, fmt in zip(self.items, chosen, strict=True))


def _items(inventory: Inventory, request: Request, allowed: Sequence[Spec]) -> tuple[list[Item], dict[str, Assigned]]:
    """The items, and a format to request for each layer that fits none of the formats.

    The policy decides about all layers once per allowed format.
    """
    options: dict[str, dict[str, Spec]] = {}
    misfits: dict[str, Assigned] = {}
    if request.options.fallback == "error":  # an error only where no format fits
        request = request.changed(fallback="skip")
    for spec in allowed:
        name = Assigned(spec.name if isinstance(spec, QuantFormat) else spec, "")
        everywhere = {layer.name: name for layer in inventory.layers}
        trial = replace(request, assigned=everywhere)
        for decision in decide(inventory.layers, trial).decisions:
            if decision.format is not None:
                options.setdefault(decision.name, {}).setdefault(decision.format.name, spec)
            elif decision.fell_back:
                misfits[decision.name] = name
    sharing: dict[str, list[LayerInfo]] = {}
    for layer in inventory.layers:
        if layer.name in options:
            sharing.setdefault(layer.holder, []).append(layer)
    together: dict[object, list[tuple[LayerInfo, ...]]] = {}
    for layers in sharing.values():
        expert = LISTED_EXPERT.fullmatch(layers[0].name)
        formats = tuple(options[layers[0].name])
        key = (*expert.groups(), layers[0].shape, formats) if expert else layers[0].name
        together.setdefault(key, []).append(tuple(layers))
    if not together and not misfits:
        raise ValueError(f"{request.op}: 'auto' finds no layer to quantize; isqtorch.plan(model, 4) tells why")
    items = []
    for weights in together.values():
        of_first = options[weights[0][0].name]
        by_size = sorted(of_first, key=lambda fmt: get_format(fmt).bits_per_weight)
        items.append(Item(tuple(weights), {fmt: of_first[fmt] for fmt in by_size}))
    return items, misfits


def choose_formats(
    model: nn.Module,
    auto: Auto,
    imatrix: Imatrix | None,
    weight_of: WeightOf | None = None,
    supply: Passes | None = None,
    text: Text | None = None,
) -> tuple[Request, Choice]:
    """Measure a live model and choose formats. The model does not change.

    Args:
        model: the model.
        auto: the problem. The options of its request say how to measure.
        imatrix: importance, or None.
        weight_of: reads weights that are not the model's own. Without it the model's own are used. With it the probe
            "kl" is not possible, because packed weights have no gradients.
        supply: where moments for the rule "feedback" come from, if they are not in `imatrix`.
        text: the calibration text, for the probe "kl".

    Returns:
        The request with the chosen formats, and the measurements.

    Raises:
        ValueError: see `measure_curvature`; `probe="kl"` without a text; a weight is not finite.
    """
    options = auto.request.options
    if options.probe == "kl" and text is None:
        raise ValueError(
            f"{auto.request.op}: probe='kl' needs calibration_file=..., a text to measure on, or calibration='self'"
        )
    curvature = None
    if weight_of is None and text is not None and options.probe != "output":
        names = [sharing[0].name for item in auto.items for sharing in item.weights]
        curvature = measure_curvature(model, names, options.tokenizer, text, progress=options.progress)
    errors, measured = measure_items(auto, weight_of or partial(_own_weight, model), imatrix, curvature, supply)
    return auto.choose(errors, measured)


def _own_weight(model: nn.Module, names: Sequence[str]) -> Tensor:
    return weight_matrix(*owner_of(model, names[0])).detach()


def measure_items(
    auto: Auto,
    weight_of: WeightOf,
    imatrix: Imatrix | None,
    curvature: Mapping[str, Weighing] | None,
    supply: Passes | None = None,
) -> tuple[list[dict[str, Error]], str]:
    """The errors of every item in each of its formats, and the kind of cost.

    Items with a single format are measured too, so that the predicted cost covers the whole model.

    Raises:
        ValueError: a weight is not finite, or too large for one of its formats.
    """
    options = auto.request.options
    shelf = Shelf(imatrix if isinstance(imatrix, Moments) else None)
    parts: dict[str, Sums] = {}

    def measure(item: Item, sharing: Sequence[LayerInfo]) -> None:
        formats = [get_format(fmt) for fmt in item.options]
        weighing = None if curvature is None else curvature.get(sharing[0].name)
        importance = importance_and_shares(sharing, imatrix)
        moments = moments_for(sharing, shelf, options.rule)
        with ordinary_tensors():
            weight = weight_of([layer.name for layer in sharing])
            try:
                rules = rules_for(item, sharing, options.rule, importance[0] is not None)
                sums = measure_errors(weight, formats, weighing, *importance, rules, moments=moments)
            except ValueError as error:
                raise ValueError(f"{auto.request.op}: {sharing[0].name}: {cause(error)} Nothing was changed.") from None
            parts[sharing[0].name] = sums

    waiting = [(item, sharing) for item in auto.items for sharing in item.weights]
    with progress_bar("measure", "weight", options.progress, total=len(waiting)) as bar:
        for number, moments in enumerate([shelf.moments] if supply is None else supply.collected(), 1):
            shelf.put(moments)
            later = []
            for item, sharing in waiting:
                names = [layer.name for layer in sharing]
                if supply is None or number == supply.count or supply.reads(moments, names):
                    measure(item, sharing)
                    bar.update()
                else:
                    later.append((item, sharing))
            waiting = later
            shelf.put(None)  # before the next ones are collected
            del moments
    errors = [errors_of([parts[sharing[0].name] for sharing in item.weights]) for item in auto.items]
    return errors, "kl" if curvature is not None else "weight" if imatrix is None else "output"


def rules_for(
    item: Item, sharing: Sequence[LayerInfo], asked: str | None, has_importance: bool
) -> dict[str, str | None]:
    """The rule with which packing will use each format of an item, for one of its weights."""
    names = [layer.name for layer in sharing]
    rules: dict[str, str | None] = {}
    for name, spec in item.options.items():
        fmt = get_format(name)
        if asked == FEEDBACK:
            rules[name] = scale_rule(fmt) if has_importance else None
        else:
            by_number = number_of_bits(spec) is not None
            rules[name] = rule_of(names, fmt, asked, has_importance=has_importance, by_number=by_number)
    return rules


def moments_for(sharing: Sequence[LayerInfo], shelf: Shelf, rule: str | None) -> ShelvedMoments | None:
    """The moments with which packing will use feedback for a weight; None if it will not."""
    if rule != FEEDBACK or not has_inputs(sharing):
        return None
    layer = shelf.layer([layer.name for layer in sharing], sharing[0].shape)
    return None if layer is None else ShelvedMoments(shelf, layer)


def importance_and_shares(sharing: Sequence[LayerInfo], imatrix: Imatrix | None) -> tuple[Tensor | None, Tensor | None]:
    """The importance that packing will use for a weight, and each expert's share of the tokens; both may be None."""
    if imatrix is None:
        return None, None
    shape = sharing[0].shape
    shares = imatrix.shares(sharing[0].name, shape[0]) if len(shape) == 3 else None
    return importance_of(imatrix, sharing, shape), shares
