"""OnPacked: PEFT's layers on packed layers. It merges by running PEFT's own code on a float layer.

Every kind of adapter has its own way to merge: LoRA adds to the weight, IA3 multiplies it, OFT turns it, DoRA scales its
rows. They all write to the weight and the bias of the base layer. So a merge puts a float layer in the place of the
packed one, lets PEFT merge into that, and packs the result.

A merge never writes to the packed layer. It puts a new one in its place, which remembers the old one (`record.py`). Each
merge starts from the old one and all adapters again, so rounding errors do not add up, and `unmerge` restores it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from isqtorch.formats import QuantFormat
from isqtorch.modules import PackedModule, QuantEmbedding, QuantLinear
from isqtorch.modules.convert import to_packed
from isqtorch.modules.packed import ordinary_tensors
from isqtorch.text import cause

from .floats import Floats
from .record import Record, attach, record_of
from .session import Session, session


class OnPacked:
    """Mixin of the classes that `adopt` makes. The other base class is PEFT's."""

    merged_adapters: list[str]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the float weight of the packed layer, and pack it again.

        Args:
            safe_merge: as for a float layer. A result that is not finite always raises, and nothing changes.
            adapter_names: the adapters to merge; None: all active ones.

        Raises:
            ValueError: the merged weight is not finite; the layer is sharded or offloaded; or its format does not fit.
        """
        packed = _base(self)
        if not isinstance(packed, PackedModule):  # dequantized since, or PEFT's own code calls this on the float layer
            _stock_merge(self, safe_merge, adapter_names)
            return
        names = list(check_adapters_to_merge(self, adapter_names) or [])
        available = cast(Any, self)._get_available_adapters()
        names = [name for name in names if name in available or not available]
        if not names:
            return
        before = record_of(packed)
        if before is None and self.merged_adapters:
            raise ValueError(_changed(self.merged_adapters))
        merged = [] if before is None else list(before.merged)
        mine = [entry for entry in merged if entry[0] is self]
        if mine:
            merged[merged.index(mine[0])] = (self, [*mine[0][1], *names])
        else:
            merged.append((self, names))
        with session() as running:
            _check(packed, running.weights.name_of(packed if before is None else before.original))
            record = Record(packed if before is None else before.original, merged)
            new = _merged(record, safe_merge, running)
            running.merged(record.original, new)
            _put(self, packed, new)

    def unmerge(self) -> None:
        """Restore the packed layer from before the merge."""
        packed = _base(self)
        record = record_of(packed)
        if record is None or all(entry[0] is not self for entry in record.merged):
            if self.merged_adapters and isinstance(packed, PackedModule):
                raise ValueError(_changed(self.merged_adapters))
            super().unmerge()  # type: ignore[misc]  # warns that nothing is merged
            return
        rest = [entry for entry in record.merged if entry[0] is not self]
        if rest:  # of a layer of PEFT around this one
            with session() as running:
                _put(self, packed, _merged(Record(record.original, rest), False, running))
        else:
            _put(self, packed, _restored(record.original, packed))
        self.merged_adapters = []

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by PEFT's class: pickle finds no class that is made at run time."""
        state: tuple[Any, ...] = super().__reduce_ex__(protocol)  # type: ignore[assignment]
        return (_new, (type(self).__mro__[2],), *state[2:])


@functools.cache
def _on_packed(kind: Any) -> type:
    metaclass: Any = type(kind)
    attributes = {"__module__": kind.__module__, "__doc__": kind.__doc__}
    return cast(type, metaclass(kind.__name__, (OnPacked, kind), attributes))


def _new(kind: Any) -> Any:
    made: Any = _on_packed(kind)
    return made.__new__(made)


def adopt(model: nn.Module) -> None:
    """Let all layers of PEFT on packed layers merge in our way."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, OnPacked):
            if isinstance(_base(module), (QuantLinear, QuantEmbedding)):
                kind: Any = type(module)
                module.__class__ = _on_packed(kind)


def _stock_merge(layer: Any, safe_merge: bool, names: list[str] | None) -> None:
    super(OnPacked, layer).merge(safe_merge=safe_merge, adapter_names=names)


# ---- the base layer --------------------------------------------------------------------------------------------------


def _base(layer: Any) -> nn.Module:
    return cast(nn.Module, layer.get_base_layer())


def _put(layer: Any, old: nn.Module, new: nn.Module) -> None:
    """Replace the base layer, in the innermost layer of PEFT."""
    while layer.base_layer is not old:
        layer = layer.base_layer
    layer.base_layer = new


def _check(packed: PackedModule, name: str) -> None:
    """ValueError unless the layer can be replaced."""
    weight = cast(Tensor, packed._parameters["weight"])
    if type(weight.data) is not Tensor:
        raise ValueError(
            f"merge: {name} is sharded ({type(weight.data).__name__}), and its blocks cannot be packed one by one. Merge on one "
            "process, before the model is distributed."
        )
    if weight.device.type == "meta":
        raise ValueError(f"merge: {name} is on the meta device: it is offloaded. Load the model without offloading.")


def _changed(names: Sequence[str]) -> str:
    return (
        f"merge: adapters {', '.join(names)} are merged, but the layer that holds them was replaced since, by requantize_ for example. "
        "Unmerge before such a change, or load the model again."
    )


def _restored(original: PackedModule, now: nn.Module) -> PackedModule:
    """The layer from before the merge, where the merged one is now."""
    weight = cast(Tensor, now._parameters["weight"])
    if original._parameters["weight"].device != weight.device:  # type: ignore[union-attr]
        original.to(weight.device)
    if isinstance(now, PackedModule) and original.dtype != now.dtype:
        original.to(now.dtype)
    return original.train(now.training)


# ---- merging ---------------------------------------------------------------------------------------------------------


def _merged(record: Record, safe_merge: bool, running: Session) -> PackedModule:
    """A packed layer with the adapters of a record; the layers of PEFT note that they are merged."""
    original = record.original
    fmt = running.format_of(original)
    names = [name for _, adapters in record.merged for name in adapters]
    with ordinary_tensors():
        floats = running.weights.of(original)
        before = floats.weight if floats.original else floats.weight.clone()
        stand_in = _float_layer(original, floats)
        _replay(record, stand_in, safe_merge)
        after = cast(Tensor, stand_in.weight).detach()
        try:
            packed = torch.ops.isqtorch.quantize(after, fmt.name, None, floats.rule)
        except ValueError as error:
            raise ValueError(
                f"merge: adapters {', '.join(names)} give {running.weights.name_of(original)} a weight that cannot be packed: "
                f"{cause(error)}"
            ) from None
        if not floats.original:
            packed = _only_changed(original, packed, fmt, before, after)
            running.measure(original, packed, fmt, before, after)
    new = _layer(original, running.parameter(cast(Tensor, original._parameters["weight"]), packed), fmt, stand_in)
    attach(new, record)
    for layer, adapters in record.merged:
        layer.merged_adapters = list(adapters)
    return new


def _float_layer(original: PackedModule, floats: Floats) -> nn.Module:
    """A float layer with the weight `[N, K]` and a copy of the bias."""
    bias = original._parameters.get("bias")
    made: Any
    with torch.device("meta"):
        if isinstance(original, QuantEmbedding):
            made = nn.Embedding(original.num_embeddings, original.embedding_dim, original.padding_idx)
        else:
            made = nn.Linear(floats.weight.shape[1], floats.weight.shape[0], bias=bias is not None)
    made.weight = nn.Parameter(floats.weight, requires_grad=False)
    if bias is not None:
        dtype = bias.dtype if floats.original else floats.weight.dtype
        made.bias = nn.Parameter(bias.detach().to(dtype, copy=True), requires_grad=False)
    if hasattr(original, "embed_scale"):
        made.embed_scale = original.embed_scale
    return cast(nn.Module, made.train(original.training))


def _replay(record: Record, stand_in: nn.Module, safe_merge: bool) -> None:
    """Let PEFT merge all adapters of a record into `stand_in`. The layers of PEFT are as they were afterwards."""
    for layer, adapters in record.merged:
        base, state = _base(layer), dict(vars(layer))  # some kinds keep the weight from before: it is not needed
        layer.merged_adapters = []
        _put(layer, base, stand_in)
        try:
            _stock_merge(layer, safe_merge, list(adapters))
        except NotImplementedError as error:
            kind = type(layer).__mro__[2].__qualname__
            raise NotImplementedError(f"merge: PEFT cannot merge {kind}. Keep the adapter unmerged. {error}") from error
        finally:
            _put(layer, _base(layer), base)
            vars(layer).clear()
            vars(layer).update(state)


def _only_changed(original: PackedModule, packed: Tensor, fmt: QuantFormat, before: Tensor, after: Tensor) -> Tensor:
    """The packed rows, with the old bytes where an adapter changes nothing: decoding and packing may change them."""
    old = cast(Tensor, original._parameters["weight"])
    if fmt.name != original.format:
        return packed
    changed = (before != after).any(dim=1, keepdim=True)
    return torch.where(changed, packed, old.detach())


def _layer(original: PackedModule, packed: nn.Parameter, fmt: QuantFormat, stand_in: nn.Module) -> PackedModule:
    """The packed layer for a merged float layer. It shares the bias of the original, unless that is merged, too."""
    new = cast(PackedModule, to_packed(original, packed, fmt))
    bias, old = (
        cast("Tensor | None", stand_in.bias) if hasattr(stand_in, "bias") else None,
        original._parameters.get("bias"),
    )
    if bias is not None and (old is None or not torch.equal(old.detach().to(bias.dtype), bias.detach())):
        dtype, trainable = (original.dtype, False) if old is None else (old.dtype, old.requires_grad)
        new.register_parameter("bias", nn.Parameter(bias.detach().to(dtype), requires_grad=trainable))
    hook = vars(original).get("_hf_hook")  # of accelerate
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, copy.copy(hook))
    return new
