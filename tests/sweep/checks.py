"""What is checked for every type of model. Each check has a name, by which `known` finds its exceptions."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import isqtorch
from isqtorch.integrations.transformers.findings import loaded
from isqtorch.report.report import QuantReport

from .building import Built, NotBuilt, build, described, outputs
from .choices import Choices
from .corrections import FILES

FORMAT, OTHER = "q4k", "q8_0"
"""The format of the model, and the one that it is requantized to. The second shows faults, the first hides them."""

CHECKS = {
    "immediate": "packing while loading gives what quantize_ gives, bit for bit",
    "reload": "a saved model is read again with the same bytes and outputs",
    "experts": "stacks of experts are packed",
    "requantize": "requantize_ gives what quantize_ gives on the original model, bit for bit",
    "forward": "the outputs of the packed model are close to those of the float model; routers take the same experts in both",
    "plan": "plan predicts the size within 1 %",
}
_SPREAD = 3.0  # an output may have so much more error than independent errors of all layers add up to
_PLAN = 0.01
_MANY = 64  # numbers
_ALIGNED = 64  # bytes
_MUCH = 0.05  # of a model's weights, left for one reason: a remark says so


@dataclass
class Row:
    """What was found out about one type."""

    kind: str
    cls: str = ""
    share: float = 0.0  # of the weights that are packed
    bits: float = 0.0  # for each weight, on average
    error: float | None = None  # of the outputs, in the second format
    bound: float | None = None
    remarks: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)  # check -> why
    not_built: str = ""
    seconds: float = 0.0


def check_type(kind: str, folder: Path) -> Row:
    """Run all checks for one type. `folder` is an empty one, for checkpoints."""
    row = Row(kind)
    try:
        built = build(kind)
    except NotBuilt as error:
        row.not_built = str(error)
        return row
    row.cls = type(built.model).__name__
    if built.remark:
        row.remarks.append(built.remark)
    try:
        save(built.model, folder / "float", kind)
        original, info = loaded(partial(built.auto.from_pretrained, folder / "float"))
        if info["missing_keys"]:
            raise ValueError(f"it misses {sorted(info['missing_keys'])[:2]}")
    except Exception as error:  # code of every type runs here
        row.not_built = f"transformers does not read what it saved ({described(error)})"
        return row
    _Checks(row, built, folder).run(original)
    return row


class _Checks:
    def __init__(self, row: Row, built: Built, folder: Path) -> None:
        self.row, self.built, self.folder = row, built, folder
        self.choices = Choices()

    def run(self, original: Any) -> None:
        with self.choices.noted():
            want = self._outputs(original)
        if want is not None and not same(want, self._outputs(original)):
            self.row.remarks.append("its outputs are not the same in each call, and are not compared")
            self.built = self.built._replace(arguments=None)
            want = None
        deferred = isqtorch.quantize_(original, FORMAT)
        self.row.bits = deferred.bits_per_weight
        self.row.share = sum(layer.numel for layer in deferred.quantized) / max(deferred.numel, 1)
        self._left(deferred)
        self._experts(deferred)
        self._attempt("plan", lambda: self._plan(deferred))
        if not deferred.quantized:
            self.row.remarks.append("no weight can be packed")
            return
        loaded = self._attempt("immediate", lambda: self._immediate(original))
        if loaded is None:
            return
        self._attempt("reload", lambda: self._reload(loaded))
        self._attempt("requantize", lambda: self._requantize(loaded))
        if want is not None and not _main(want).any():
            self.row.remarks.append("its outputs are zero, and are not compared with those of the float model")
        elif want is not None:
            self._attempt("forward", lambda: self._forward(want))

    # ---- the checks: each raises an error, whose text is the reason --------------------------------------------------------

    def _immediate(self, deferred: Any) -> Any:
        config = isqtorch.IsqConfig(FORMAT)
        load = partial(self.built.auto.from_pretrained, self.folder / "float", quantization_config=config)
        model, info = loaded(load)
        lost = {key: sorted(map(str, value))[:3] for key, value in info.items() if value}
        if lost:
            raise AssertionError(f"loading left something: {lost}")
        self._compare(model, deferred)
        return model

    def _reload(self, loaded: Any) -> None:
        save(loaded, self.folder / "packed", self.row.kind)
        self._compare(self._load("packed"), loaded)

    def _requantize(self, loaded: Any) -> None:
        isqtorch.requantize_(loaded, OTHER)
        fresh = self._load("float")
        isqtorch.quantize_(fresh, OTHER)
        self._compare(loaded, fresh)

    def _forward(self, want: list[Tensor]) -> None:
        fresh = self._load("float")
        report = isqtorch.quantize_(fresh, OTHER)
        with self.choices.repeated():
            got = self._outputs(fresh)
        assert got is not None
        self.row.bound = bound = expected_error(report)
        if _main(got).shape != _main(want).shape:
            shapes = [tuple(_main(each).shape) for each in (got, want)]
            raise AssertionError(f"the output is {shapes[0]}, not {shapes[1]}")
        self.row.error = error = relative_error(_main(got), _main(want))
        if not error <= bound:  # also if it is not a number
            raise AssertionError(f"the outputs differ by {error:.3g} of their size; {bound:.3g} is expected at most")

    def _plan(self, report: QuantReport) -> None:
        planned = isqtorch.plan(self.folder / "float", FORMAT)
        if abs(planned.bytes_after - report.bytes_after) > _PLAN * report.bytes_after:
            why = "; ".join(planned.notes[:1])
            raise AssertionError(f"planned {planned.bytes_after} bytes, it has {report.bytes_after}. {why}")

    def _experts(self, report: QuantReport) -> None:
        left = [layer for layer in report.left if "expert" in layer.name and len(layer.shape) == 3]
        if left:
            self.row.failures["experts"] = f"{left[0].name} {tuple(left[0].shape)}: {left[0].reason}"

    def _left(self, report: QuantReport) -> None:
        """Remarks on what is not packed, if it is much."""
        sizes: Counter[str] = Counter()
        example: dict[str, str] = {}
        for layer in report.left:
            sizes[layer.reason] += layer.numel
            example.setdefault(layer.reason, layer.name)
        for reason, numel in sizes.most_common(2):
            if numel > _MUCH * report.numel:
                self.row.remarks.append(f"{numel / report.numel:.0%} left: {reason} ({example[reason]})")

    # ---- tools ---------------------------------------------------------------------------------------------------------------

    def _attempt(self, check: str, work: Any) -> Any:
        try:
            return work()
        except Exception as error:  # whatever goes wrong is what the table has to say
            self.row.failures[check] = str(error)[:300] if type(error) is AssertionError else described(error)
            return None

    def _load(self, name: str) -> Any:
        return self.built.auto.from_pretrained(self.folder / name)

    def _outputs(self, model: Any) -> list[Tensor] | None:
        if self.built.arguments is None:
            return None
        align(model)
        return outputs(model, self.built.arguments)

    def _compare(self, one: nn.Module, other: nn.Module) -> None:
        different = first_difference(one, other)
        if different:
            raise AssertionError(different)
        first, second = self._outputs(one), self._outputs(other)
        if first is not None and second is not None and not same(first, second):
            raise AssertionError("the bytes are the same, and the outputs differ")


def save(model: Any, folder: Path, kind: str) -> None:
    """Save a model, with the files that its type needs beside it."""
    model.save_pretrained(folder)
    if kind in FILES:
        torch.save({}, folder / FILES[kind])


def align(model: nn.Module) -> None:
    """Let every tensor of a model begin where memory is aligned. Files are mapped, so they may begin anywhere.

    Products of floats are summed in another order where they do, and outputs differ in the last bit.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() % _ALIGNED:
            tensor.data = tensor.data.clone()


def first_difference(one: nn.Module, other: nn.Module) -> str:
    """What differs between the states of two models; empty if nothing does."""
    a, b = one.state_dict(), other.state_dict()
    if a.keys() != b.keys():
        return f"other names: {sorted(a.keys() ^ b.keys())[:4]}"
    for name in a:
        if a[name].dtype != b[name].dtype or a[name].shape != b[name].shape:
            kinds = [f"{t.dtype} {tuple(t.shape)}" for t in (a[name], b[name])]
            return f"{name} is {kinds[0]}, not {kinds[1]}"
        if not torch.equal(_bytes(a[name]), _bytes(b[name])):
            return f"{name} has other bytes"
    return ""


def same(one: list[Tensor], other: list[Tensor] | None) -> bool:
    """Whether outputs agree bit for bit."""
    if other is None or len(one) != len(other):
        return False
    pairs = zip(one, other, strict=True)
    return all(a.shape == b.shape and torch.equal(_bytes(a), _bytes(b)) for a, b in pairs)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def _main(tensors: list[Tensor]) -> Tensor:
    """The first output that is large enough for its size to mean something: one number may be zero by accident."""
    return next((each for each in tensors if each.numel() >= _MANY), torch.cat([each.flatten() for each in tensors]))


def relative_error(got: Tensor, want: Tensor) -> float:
    """RMS of the difference over RMS of `want`, where `want` is a number."""
    finite = want.isfinite()
    got, want = got[finite].double(), want[finite].double()
    return float((got - want).norm() / want.norm()) if want.numel() and want.norm() else math.nan


def expected_error(report: QuantReport) -> float:
    """Bound of the error of outputs: the errors of the formats of all packed layers, added as independent ones."""
    formats = [isqtorch.get_format(layer.stored) for layer in report.layers if layer.stored is not None]
    return _SPREAD * math.sqrt(sum(fmt.weight_error**2 + fmt.linear_error**2 for fmt in formats))
