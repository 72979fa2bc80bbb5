"""What one merge has in common for all layers: the user's wishes, and how much of the adapters is kept."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from isqtorch.formats import QuantFormat, Spec, get_format, resolve_format
from isqtorch.inplace.weights import STORED
from isqtorch.modules import PackedModule

from .floats import FloatWeights
from .record import detach, unmerged

ENOUGH = 0.9
"""The share of an adapter's change that a merge must keep, or it warns."""
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
    _shared: dict[int, list[nn.Parameter]] = field(default_factory=dict)  # id of a tied weight -> new weights

    @functools.cached_property
    def weights(self) -> FloatWeights:
        """The float weights. They are looked for when the first layer is merged."""
        return FloatWeights(self.model, self.wishes.source)

    def merged(self, original: PackedModule, new: PackedModule) -> None:
        """Note that `new` takes the place of `original`. If nothing is kept to unmerge, the layer before is freed."""
        if self._last is None or unmerged(self._last) is not original:
            self.count += 1
            if self._last is not None and self.unloads:
                self.weights.free(unmerged(self._last))
                detach(self._last)
        self._last = new

    def format_of(self, layer: PackedModule, leaf: str = "weight") -> QuantFormat:
        """The format that the merged layer gets; ValueError if it does not fit."""
        has = get_format(layer.packed[leaf])
        if self.wishes.format is None:
            return has
        packed = cast(Tensor, layer._parameters[leaf])
        columns = has.in_features(packed.shape[-1])
        fmt = resolve_format(self.wishes.format, packed.device, columns)
        if columns % fmt.block:
            raise ValueError(
                f"merge: {self.weights.name_of(layer)} has rows of {columns} weights, and merge_format {fmt.name} needs a multiple of "
                f"{fmt.block}. Use a format with a smaller block, such as q8_0."
            )
        return fmt

    # ---- what comes out ----------------------------------------------------------------------------------------------

    def parameter(self, old: Tensor, packed: Tensor) -> nn.Parameter:
        """A parameter for packed bytes. Layers that shared a weight share the new one, too, if it is the same."""
        made = self._shared.setdefault(id(old), []) if self.weights.is_tied(old) else []
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
            self.kept[self.weights.name_of(layer)] = change / total

    def close(self, stacklevel: int) -> None:
        """Warn once about what was lost and about what was packed in another way than before."""
        if not self.count:
            return
        lost = {name: share for name, share in self.kept.items() if share < ENOUGH}
        if lost:
            least = min(lost, key=lambda name: lost[name])
            warnings.warn(
                f"merge: {len(lost)} of {self.count} packed layers keep only {100 * sum(lost.values()) / len(lost):.0f} % of the "
                f"adapters' change on average; the least is {100 * lost[least]:.0f} %, in {least}. Smaller changes than a step "
                f"of the format are rounded away. The float weights were not used: {self.weights.why}. Give them with "
                "isqtorch.integrations.peft.merging(source=...), or use more bits with merging(merge_format=8), or keep the "
                "adapters unmerged, or call dequantize_ before the merge.",
                stacklevel=stacklevel,
            )
        if self.weights.unlike:
            warnings.warn(
                f"merge: {len(self.weights.unlike)} of {self.count} layers, such as {self.weights.unlike[0]}, were packed with an "
                "importance matrix or from other weights. That is not recorded, so they were packed without importance. To use "
                "it, merge into the float model and call quantize_ with imatrix=.",
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
