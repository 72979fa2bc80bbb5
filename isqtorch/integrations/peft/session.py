"""What one merge has in common for all layers: the user's wishes, the float weights, and how much of the adapters is kept."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast, get_args

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from isqtorch.formats import QuantFormat, Spec, get_format, resolve_format
from isqtorch.inplace.origin import Origin
from isqtorch.inplace.pack import relative_error
from isqtorch.inplace.weights import STORED, Weights
from isqtorch.modules import PackedModule
from isqtorch.modules.convert import float_shape
from isqtorch.quantizers import Rule, has_rule, needs_whole

from .record import detach, unmerged

ENOUGH = 0.9
"""The share of an adapter's change that a merge must keep, or it warns."""
_SAMPLE = 8  # least number of rows by which a layer is compared with the checkpoint
_CLOSE = 1.25  # the error of packed rows over that of freshly packed ones, if they were packed from the same floats
_CHUNK = 1 << 22  # number of weights that are decoded at a time to measure what is kept


class Wishes(NamedTuple):
    """The arguments of `merging`."""

    source: str | os.PathLike[str] | None = None
    format: Spec | None = None


_NONE = Wishes()
_wishes: ContextVar[Wishes] = ContextVar("wishes", default=_NONE)


@contextmanager
def merging(*, source: str | os.PathLike[str] | None = None, merge_format: Spec | None = None) -> Iterator[None]:
    """Say how adapters are merged into packed layers, for all merges in a `with` block.

    Args:
        source: where to read the float weights that the adapters are added to: a folder or a .safetensors file. None:
            the checkpoint that the model was loaded from, if that is known, else the decoded weights. "stored": the
            decoded weights.
        merge_format: the format of the merged layers, or a number of bits. None: each layer keeps its format.

    Raises:
        ValueError: there is no such format.
        OSError: there is no such file.

    Example:
        with isqtorch.integrations.peft.merging(merge_format=8):
            model = model.merge_and_unload()
    """
    if merge_format is not None:
        resolve_format(merge_format)
    if source is not None and source != STORED and not os.path.exists(os.path.expanduser(source)):
        raise FileNotFoundError(f"merging: source: no folder or file {str(source)!r}")
    token = _wishes.set(Wishes(source, merge_format))
    try:
        yield
    finally:
        _wishes.reset(token)


class Floats(NamedTuple):
    """The float weight of a packed layer."""

    weight: Tensor  # [N, K]; the caller may write to it
    rule: str | None  # the rule that packs it as the layer was packed
    original: bool  # whether it is that of the checkpoint, and not decoded


@dataclass
class Session:
    """One merge of a model's adapters.

    Attributes:
        model: the model inside of PEFT's; None if a layer merges by itself.
        unloads: whether the adapters are gone afterwards, so that nothing is kept to unmerge.
        wishes: what the user asked for.
        kept: the share of the adapters that each layer keeps, by its name, of the layers that were decoded.
        count: number of merged layers.
    """

    model: nn.Module | None = None
    unloads: bool = False
    wishes: Wishes = field(default_factory=_wishes.get)
    kept: dict[str, float] = field(default_factory=dict)
    count: int = 0
    _last: PackedModule | None = None  # the layer that was made last
    _weights: Weights | None = None
    _names: dict[int, list[str]] = field(default_factory=dict)  # id of a layer -> its names without PEFT's parts
    _sharing: dict[int, list[str]] = field(default_factory=dict)  # id of a weight -> names of the layers that have it
    _why: str = "where they came from is not known here"  # reason for decoding
    _unlike: list[str] = field(default_factory=list)  # layers that were packed in another way
    _shared: dict[int, tuple[Tensor, list[nn.Parameter]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.model is None:
            if self.wishes.source not in (None, STORED):
                raise ValueError(
                    "merge: merging(source=...) needs the names of the layers. Merge the model, with merge_adapter() or "
                    "merge_and_unload(), and not a layer by itself."
                )
            self._why = "a layer that merges by itself has no name to find them by"
            return
        plain = without_adapters(self.model)
        for name, module in plain.named_modules(remove_duplicate=False):
            if isinstance(module, PackedModule):
                self._names.setdefault(id(module), []).append(name)
                for leaf in module.packed:  # a tied weight may be stored under any of its names
                    self._sharing.setdefault(id(module._parameters[leaf]), []).append(name)
        self._weights = self._find(plain)

    def _find(self, plain: nn.Module) -> Weights | None:
        """The checkpoint, or None if the weights are decoded."""
        asked, origin = self.wishes.source, Origin.of(plain) or Origin()
        if asked == STORED:
            self._why = "the decoded ones were asked for"
            return None
        if asked is None and not origin.files:
            return None
        try:
            weights = Weights.find(plain, asked, origin)
        except (ValueError, OSError) as error:
            message = str(error).removeprefix("requantize_: ")
            if asked is not None:
                raise type(error)(f"merge: {message}") from None
            self._why = message.split(". Give source")[0]
            return None
        for alarm in weights.alarms:
            warnings.warn(alarm.replace("requantize_", "merge", 1), stacklevel=5)
        return weights

    def merged(self, original: PackedModule, new: PackedModule) -> None:
        """Note that `new` takes the place of `original`. If nothing is kept to unmerge, the layer before is freed."""
        if self._last is None or unmerged(self._last) is not original:
            self.count += 1
            if self._last is not None and self.unloads:
                detach(self._last)
        self._last = new

    def name_of(self, layer: PackedModule) -> str:
        """The layer's name for messages."""
        names = self._names.get(id(layer))
        return names[0] if names else f"a layer of {list(float_shape(layer))}"

    def format_of(self, layer: PackedModule, leaf: str = "weight") -> QuantFormat:
        """The format that the merged layer gets; ValueError if it does not fit."""
        has = get_format(layer.packed[leaf])
        if self.wishes.format is None:
            return has
        packed = cast(Tensor, layer._parameters[leaf])
        fmt = resolve_format(self.wishes.format, packed.device)
        columns = has.in_features(packed.shape[-1])
        if columns % fmt.block:
            raise ValueError(
                f"merge: {self.name_of(layer)} has rows of {columns} weights, and merge_format {fmt.name} needs a multiple of "
                f"{fmt.block}. Use a format with a smaller block, such as q8_0."
            )
        return fmt

    def floats(self, layer: PackedModule) -> Floats:
        """The float weight of a packed layer: that of the checkpoint, or decoded."""
        packed = cast(Tensor, layer._parameters["weight"])
        if self._weights is not None and id(layer) in self._names:
            found = self._read(self._weights, layer, packed)
            if found is not None:
                return found
        decoded: Tensor = torch.ops.isqtorch.dequantize(packed, layer.format, torch.float32)
        return Floats(decoded, None, False)

    def _read(self, weights: Weights, layer: PackedModule, packed: Tensor) -> Floats | None:
        """The weight of the checkpoint, or None if it is not that of the layer."""
        names = self._sharing[id(packed)]
        try:
            weight = weights.of(names).to(packed.device, copy=True, memory_format=torch.contiguous_format)
        except (ValueError, OSError) as error:
            message = str(error).removeprefix("requantize_: ")
            if self.wishes.source is not None:
                raise type(error)(f"merge: {message}") from None
            self._why = message.split(". Give source")[0]
            return None
        finally:
            weights.release()
        return self._compared(weight, layer, packed)

    def _compared(self, weight: Tensor, layer: PackedModule, packed: Tensor) -> Floats | None:
        """Find out from a few rows how the layer was packed: nothing records rule and importance."""
        fmt = get_format(layer.format)
        step = 1 if needs_whole(fmt) else max(1, weight.shape[0] // _SAMPLE)
        rows, stored = weight[::step].contiguous(), packed[::step].contiguous()
        for rule in (None, *get_args(Rule)):
            if has_rule(fmt, rule) and torch.equal(torch.ops.isqtorch.quantize(rows, fmt.name, None, rule), stored):
                return Floats(weight, rule, True)
        fresh = relative_error(rows, torch.ops.isqtorch.quantize(rows, fmt.name, None, None), fmt)
        if self.wishes.source is None and relative_error(rows, stored, fmt) > _CLOSE * fresh:
            self._why = f"{self.name_of(layer)} was not packed from the weights in the checkpoint"
            return None
        self._unlike.append(self.name_of(layer))
        return Floats(weight, None, True)

    # ---- what comes out ----------------------------------------------------------------------------------------------

    def parameter(self, old: Tensor, packed: Tensor) -> nn.Parameter:
        """A parameter for packed bytes. Layers that shared a weight share the new one, too, if it is the same."""
        _, made = self._shared.setdefault(id(old), (old, []))
        for other in made:
            if other.shape == packed.shape and torch.equal(other.data, packed):
                return other
        made.append(nn.Parameter(packed, requires_grad=False))
        return made[-1]

    def measure(self, layer: PackedModule, new: Tensor, fmt: QuantFormat, before: Tensor, after: Tensor) -> None:
        """Note the share of the change `after - before` that is in the decoded weights."""
        old = cast(Tensor, layer._parameters["weight"])
        change = total = 0.0
        step = max(1, _CHUNK // before.shape[1])
        for start in range(0, before.shape[0], step):
            rows = slice(start, start + step)
            delta = (after[rows] - before[rows]).double()
            was, now = (
                torch.ops.isqtorch.dequantize(packed[rows].contiguous(), name, torch.float32)
                for packed, name in ((old, layer.format), (new, fmt.name))
            )
            change += float(((now - was).double() * delta).sum())
            total += float((delta * delta).sum())
        if total:
            self.kept[self.name_of(layer) if id(layer) in self._names else f"layer {len(self.kept)}"] = change / total

    def close(self, stacklevel: int) -> None:
        """Warn once about what was lost and about what was packed in another way than before."""
        lost = {name: share for name, share in self.kept.items() if share < ENOUGH}
        if lost:
            least = min(lost, key=lambda name: lost[name])
            warnings.warn(
                f"merge: {len(lost)} of {self.count} packed layers keep only {100 * sum(lost.values()) / len(lost):.0f} % of the "
                f"adapters' change on average; the least is {100 * lost[least]:.0f} %, in {least}. Smaller changes than a step "
                f"of the format are rounded away. The float weights were not used: {self._why}. Give them with "
                "isqtorch.integrations.peft.merging(source=...), or use more bits with merging(merge_format=8), or keep the "
                "adapters unmerged, or call dequantize_ before the merge.",
                stacklevel=stacklevel,
            )
        if self._unlike:
            warnings.warn(
                f"merge: {len(self._unlike)} of {self.count} layers, such as {self._unlike[0]}, were packed with an importance matrix "
                "or from other weights. That is not recorded, so they were packed without importance. To use it, merge "
                "into the float model and call quantize_ with imatrix=.",
                stacklevel=stacklevel,
            )


_session: ContextVar[Session | None] = ContextVar("session", default=None)


@contextmanager
def session(model: nn.Module | None = None, unloads: bool = False, stacklevel: int = 5) -> Iterator[Session]:
    """The session of the merge that runs, or a new one, which warns at its end."""
    running = _session.get()
    if running is not None:
        yield running
        return
    new = Session(model, unloads)
    token = _session.set(new)
    try:
        yield new
    finally:
        _session.reset(token)
    new.close(stacklevel)


def without_adapters(model: nn.Module) -> nn.Module:
    """The model as it was before PEFT: other module objects, with the same parameters, under the old names."""
    copies: dict[int, nn.Module] = {}

    def plain(module: nn.Module) -> nn.Module:
        while isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inner: Any = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module.base_layer
            module = inner
        if isinstance(module, PackedModule):
            return unmerged(module)
        if id(module) not in copies:
            copies[id(module)] = twin = copy.copy(module)
            twin._modules = {name: None if child is None else plain(child) for name, child in module._modules.items()}
        return copies[id(module)]

    return plain(model)
