"""From a request to a list of jobs: all checks, choices and look-ups before the first layer changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from isqtorch.auto import Auto, Budget, choose_formats
from isqtorch.auto.choose import WeightOf
from isqtorch.formats import QuantFormat, formats, get_format
from isqtorch.importance.calibration import collect
from isqtorch.importance.feedback import Shelf
from isqtorch.importance.imatrix import Imatrix, imatrix_name, importance_of
from isqtorch.importance.moments import Moments, load_imatrix
from isqtorch.importance.passes import Passes
from isqtorch.importance.rules import rule_of
from isqtorch.importance.windows import Text, is_self, token_windows
from isqtorch.ops.native import NATIVE_DEVICES, missing_kernels
from isqtorch.policy.activations import check_activations
from isqtorch.policy.decide import Decision, Verdict, decide
from isqtorch.policy.inventory import Inventory
from isqtorch.policy.layers import LayerInfo
from isqtorch.policy.request import Request
from isqtorch.quantizers import has_rule, scale_rule, uses_importance
from isqtorch.quantizers.families import FEEDBACK
from isqtorch.report.choice import Choice
from isqtorch.report.report import QuantReport
from isqtorch.text import first_names

from .checks import check_kernels
from .damage import Watch, damage_alarms, damage_reason
from .feedback import check_moments, feedback_notes, feedback_of, supply_from_text
from .pack import Job

_ZERO_RUN = 16  # the smallest sub-block of any format that takes importance


@dataclass(frozen=True)
class Prepared:
    """A checked request, ready to be carried out."""

    request: Request
    inventory: Inventory
    verdict: Verdict
    jobs: list[Job]
    again: bool  # layers that already have their format are packed once more
    imatrix: str | None  # source of the importance, or None if no job uses it
    notes: list[str]  # for the report, in addition to those of the verdict
    warnings: list[str]  # shown to the user immediately
    shelf: Shelf  # the moments for the jobs with feedback
    supply: Passes | None = None  # where they come from; None: they are on the shelf, or none are needed

    def turns(self) -> Iterator[Job]:
        """The jobs, each when its moments are in memory."""
        waiting = list(self.jobs)
        if self.supply is not None:
            for number, moments in enumerate(self.supply.collected(), 1):
                self.shelf.put(moments)
                now: list[Job] = []
                later: list[Job] = []
                for job in waiting:
                    is_last = number == self.supply.count
                    ready = job.feedback is None or is_last or self.supply.reads(moments, job.names)
                    (now if ready else later).append(job)
                waiting = later
                yield from now
                self.shelf.put(None)  # before the next ones are collected
                del moments
        yield from waiting

    def report(
        self, errors: Mapping[str, float] | None = None, choice: Choice | None = None, notes: Sequence[str] = ()
    ) -> QuantReport:
        """The report, after the jobs are done.

        Args:
            errors: measured relative errors, by layer name.
            choice: what "auto" chose, or None.
            notes: further notes for the report.
        """
        report = QuantReport.build(self.inventory, self.verdict, self.request.fmt, again=self.again)
        feeds = {name: job.feedback for job in self.jobs if job.feedback is not None for name in job.names}
        damages = {name: job for job in self._damaged() for name in job.names}
        added = {name: job.added.error for job in self.jobs for name in job.names}
        for layer in report.layers:
            layer.error = (errors or {}).get(layer.name, added.get(layer.name))
            if layer.name in feeds:
                layer.feedback = feeds[layer.name].outcome()
                if layer.feedback is not None:
                    layer.reason = "; ".join(filter(None, [layer.reason, layer.feedback.reason]))
            if layer.stored is not None and layer.name in damages:
                job = damages[layer.name]
                layer.damaged = True
                layer.reason = "; ".join(filter(None, [layer.reason, damage_reason(job.damages, job.fmt)]))
                if layer.error is None:
                    layer.error = max(matrix.error for matrix in job.damages)
        tables = [job.names[0] for job in self.jobs if job.feedback is None]
        passes = 1 if self.supply is None else self.supply.count
        fed = feedback_notes(self.request, list({id(feed): feed for feed in feeds.values()}.values()), passes, tables)
        report.notes += [*self.notes, *fed, *notes, *self.alarms]
        report.imatrix, report.rule = self.imatrix, self.request.options.rule
        if choice is not None:
            report.record(choice)
        return report

    @property
    def alarms(self) -> list[str]:
        """Warnings about layers that packing has damaged, after the jobs are done."""
        damaged = self._damaged()
        reasons = {f"{job.names[0]} ({job.fmt.name})": damage_reason(job.damages, job.fmt) for job in damaged}
        return damage_alarms(reasons, self.request.op)

    def _damaged(self) -> list[Job]:
        for job in self.jobs:
            job.watch.finish()
        return [job for job in self.jobs if job.damages]


def settle(
    model: nn.Module,
    inventory: Inventory,
    request: Request,
    check: Callable[[Prepared], None],
    weight_of: WeightOf | None = None,
    again: bool = False,
) -> tuple[Prepared, Choice | None]:
    """Read the importance, calibrate, choose formats for "auto", and decide. Checks run before each slow step.

    Args:
        model: the model. It runs if there is a calibration file.
        inventory: the inventory of the model.
        request: the format and options.
        check: raises if the weights of the jobs cannot be packed. It is called for each set of decisions.
        weight_of: reads the weights for "auto"; None: the model's own weights.
        again: see `prepare`.

    Returns:
        The jobs, and what "auto" chose (None for other formats).

    Raises:
        ValueError, OSError: see `quantize_`.
    """
    options = request.options
    budget = Budget.of(request.op, request.fmt, options)
    auto = None if budget is None else Auto(inventory, request, budget)
    trial = request if auto is None else auto.smallest()  # selects the same layers as the final request

    supply: Passes | None = None

    def checked(request: Request, imatrix: Imatrix | None) -> Prepared:
        prepared = replace(prepare(inventory, request, imatrix, again), supply=supply)
        check(prepared)
        return prepared

    imatrix = load_imatrix(options.imatrix)
    measures_on_text = auto is not None and weight_of is None  # then both a text and an imatrix may be given
    collects = options.calibration_file is not None and not (measures_on_text and imatrix is not None)
    text: Text | None = options.calibration_file
    if collects and imatrix is not None:
        raise ValueError(f"{request.op}: give either imatrix or calibration_file, not both")
    if text is not None and is_self(text):
        checked(trial, None)  # before the model writes
        text = token_windows(model, text, options.tokenizer, request.op, progress=options.progress)
    if options.rule == FEEDBACK and not collects:
        check_moments(request, imatrix)
    elif options.rule == FEEDBACK and text is not None:
        feeds = [job for job in checked(trial, None).jobs if job.feedback is not None]
        supply = supply_from_text(model, request, text, [name for job in feeds for name in job.names])
        imatrix = supply.importance()
    elif collects and text is not None:
        imatrix = collect(model, request, text, imatrix, lambda: checked(trial, None))
    prepared = checked(trial, imatrix)
    if auto is None:
        return prepared, None
    chosen, choice = choose_formats(model, auto, imatrix, weight_of, supply, text)
    return checked(chosen, imatrix), choice


def prepare(inventory: Inventory, request: Request, imatrix: Imatrix | None, again: bool = False) -> Prepared:
    """Decide about every weight, and do all checks that need no weights.

    Args:
        inventory: the weights.
        request: the format and options; for "auto" with the chosen formats.
        imatrix: importance, or None.
        again: whether layers that already have their format are packed once more, because the source has other weights.

    Raises:
        ValueError: see `quantize_`.
    """
    op, rule = request.op, request.options.rule
    verdict = decide(inventory.layers, request)
    permissions = check_activations(inventory.layers, verdict, request)
    shelf = Shelf(imatrix if isinstance(imatrix, Moments) else None)
    jobs = _jobs(inventory, verdict, request, imatrix, again, shelf)
    kernels = _kernel_notes(inventory, verdict)
    notes = [*kernels, *_rule_notes(jobs, rule), *permissions]
    if imatrix is not None:
        notes += _importance_notes(jobs, imatrix, op)
    alarms = _dead_columns(jobs)
    if not any(decision.format for decision in verdict.decisions):
        alarms.append(f"{op} quantized nothing; the report has the reasons")
    _check_rule(jobs, verdict, rule, op)
    check_kernels(jobs, op)
    source = imatrix_name(imatrix) if any(job.importance is not None for job in jobs) else None
    return Prepared(
        request, inventory, verdict, jobs, again, source, [*notes, *alarms], [*verdict.notes, *kernels, *alarms], shelf
    )


def _jobs(
    inventory: Inventory, verdict: Verdict, request: Request, imatrix: Imatrix | None, again: bool, shelf: Shelf
) -> list[Job]:
    """The weights to pack, in model order, each shared weight once. Also checks the imatrix entries of these layers."""
    groups: dict[str, list[tuple[LayerInfo, QuantFormat, Decision]]] = {}
    for layer, decision in zip(inventory.layers, verdict.decisions, strict=True):
        if decision.format is not None and (again or decision.format.name != layer.packed_as):
            groups.setdefault(layer.holder, []).append((layer, decision.format, decision))
    jobs, watch = [], Watch()
    for members in groups.values():
        layers = [layer for layer, _, _ in members]
        first, fmt, decision = members[0]
        importance = None if imatrix is None else importance_of(imatrix, layers, first.shape)
        names = tuple(layer.name for layer in layers)
        has_importance = importance is not None
        rule = rule_of(names, fmt, request.options.rule, has_importance=has_importance, by_number=decision.by_number)
        feedback = None
        if request.options.rule == FEEDBACK:
            rule, feedback = None if importance is None else scale_rule(fmt), feedback_of(layers, fmt, shelf)
        jobs.append(
            Job(
                names,
                any(layer.kind != "embedding" for layer in layers),
                fmt,
                importance if feedback is not None or uses_importance(fmt, rule) else None,
                rule,
                decision.device or request.device,
                request.options,
                feedback,
                watch,
            )
        )
    return jobs


def _kernel_notes(inventory: Inventory, verdict: Verdict) -> list[str]:
    """Notes about devices without native kernels: the PyTorch reference runs there."""
    devices = {
        decision.device.type if decision.device else layer.device_type
        for layer, decision in zip(inventory.layers, verdict.decisions, strict=True)
        if decision.format is not None
    }
    return [
        f"{missing_kernels(device)}: the plain PyTorch reference runs there, correct and slow; `isqtorch doctor` says more"
        for device in sorted(devices - {*NATIVE_DEVICES, "meta"})
    ]


def _rule_notes(jobs: list[Job], rule: str | None) -> list[str]:
    """A note about layers whose format does not have the requested rule. If none has it, `_check_rule` raises."""
    if rule == FEEDBACK:
        return []  # `feedback_notes` tells what came of it
    without = [job.names[0] for job in jobs if not has_rule(job.fmt, rule)]
    spared = [job.names[0] for job in jobs if job.rule != rule and rule is not None and has_rule(job.fmt, rule)]
    better = [job.names[0] for job in jobs if rule is None and job.rule is not None]
    notes = [f"{len(without)} layers have formats without a rule {rule!r}: {first_names(without)}"] if without else []
    if spared:
        notes.append(
            f"{len(spared)} layers keep the default rule, because rule={rule!r} may do harm without importance in front of attention "
            f"and in down projections; imatrix= or calibration= lets it search these, too: {first_names(spared)}"
        )
    if better:
        notes.append(
            f"{len(better)} layers use rule='search', which is how their formats take importance: {first_names(better)}"
        )
    return notes


def _importance_notes(jobs: list[Job], imatrix: Imatrix, op: str) -> list[str]:
    """Notes about layers without importance; ValueError if no layer that could use it has an entry in the matrix."""
    useful: list[Job] = []
    useless: list[Job] = []
    for job in jobs:
        uses = job.feedback is not None or uses_importance(job.fmt, job.rule)
        (useful if uses else useless).append(job)
    without = [job.names[0] for job in useful if job.importance is None and job.has_input]
    if without and not any(job.importance is not None for job in jobs):
        raise ValueError(
            f"{op}: no entry of {imatrix!r} belongs to a layer of this model; {without[0]}, for example, has none. "
            "It was made for another model."
        )
    notes = [imatrix.summary()] if imatrix.datasets else []
    if imatrix.unseen:
        notes.append(_unseen_note(imatrix))
    if without:
        notes.append(
            f"{len(without)} layers have no entry in the importance matrix and were quantized without: {first_names(without)}"
        )
    for search, told in (
        (False, "formats that take no importance"),
        (True, "formats that take it only with rule='search'"),
    ):
        names = [job.names[0] for job in useless if has_rule(job.fmt, "search") == search]
        if names:
            notes.append(f"{len(names)} layers have {told}: {first_names(names)}")
    return notes


def _unseen_note(imatrix: Imatrix) -> str:
    """Which matrices saw no token. Their columns count alike, as in llama.cpp, so that the bytes are the same."""
    counts = {name: (missing, len(imatrix.counts[name])) for name, missing in imatrix.unseen.items()}
    places = [f"{name} ({missing} of {of})" if of > 1 else name for name, (missing, of) in counts.items()]
    return (
        f"{sum(imatrix.unseen.values())} expert matrices saw no token in calibration: all their columns count alike: "
        f"{first_names(places)}"
    )


def _dead_columns(jobs: list[Job]) -> list[str]:
    """Warnings about sub-blocks whose importance is all zero. The rule "search" needs none: it then ignores them."""
    warnings = []
    for job in jobs:
        start = None if job.importance is None or not job.fmt.takes_importance else _zero_run(job.importance)
        if start is not None:
            assert job.importance is not None
            expert, start = divmod(start, job.importance.shape[-1])
            whose = f"{job.names[0]}[{expert}]" if job.importance.dim() == 2 else job.names[0]
            warnings.append(
                f"importance of {whose} is zero for columns {start} to {start + _ZERO_RUN - 1}: as in llama.cpp, a "
                f"sub-block of {job.fmt.name} without any importance is stored as zeros or coarsely. Calibrate with more text."
            )
    return warnings


def _zero_run(importance: Tensor) -> int | None:
    """First column of the first sub-block whose importance is all zero, or None."""
    dead = (importance.reshape(-1, _ZERO_RUN) == 0).all(dim=1).nonzero()
    return int(dead[0]) * _ZERO_RUN if len(dead) else None


def _check_rule(jobs: list[Job], verdict: Verdict, rule: str | None, op: str) -> None:
    """ValueError if no weight to pack has the requested rule; the message names the formats that were asked for."""
    if not jobs or any(job.feedback is not None if rule == FEEDBACK else has_rule(job.fmt, rule) for job in jobs):
        return
    if rule == FEEDBACK:
        raise ValueError(
            f"{op}: rule='feedback' is for linear layers and experts, and only {first_names([job.names[0] for job in jobs])} "
            "would be packed. Leave rule out."
        )
    names = list(dict.fromkeys(each.requested for each in verdict.decisions if each.format and each.requested))
    able = [name for name in formats() if has_rule(get_format(name), rule)]
    raise ValueError(
        f"{op}: {first_names(names)} {'has' if len(names) == 1 else 'have'} no rule {rule!r}, only {' '.join(able)} have. Use one "
        "of these, or leave rule out: other formats have one rule, the default."
    )
