"""Which format each layer of vLLM's model has in the checkpoint, or gets while it is loaded. This file does not know vLLM.

vLLM has paths of its own for some layers. A `Formats` begins with the paths of transformers, which config.json has, and
takes over those of vLLM with `rename`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from isqtorch.formats import QuantFormat, get_format, mix_name
from isqtorch.policy.decide import decide
from isqtorch.policy.layers import LayerInfo, Role, embedding_by_name, head_by_name
from isqtorch.policy.mixes import MIXES
from isqtorch.policy.options import Options
from isqtorch.policy.request import Request

from .skeleton import layers_of

OP = "isq in vLLM"
WAY_OUT = (
    "Open it with isqtorch.load(SOURCE, 'keep') in an environment with transformers >= 5.23, write model and tokenizer with "
    "save_pretrained, and give vLLM that folder: formats that isqtorch has keep their bits."
)
"""What to do with a checkpoint of another program."""
log = logging.getLogger("vllm.isqtorch")  # below vLLM's own logger, so that its settings apply

Kind = Literal["linear", "embedding", "experts"]
STACKS = ("gate_up_proj", "up_proj", "down_proj")
"""Names of the stacks of fused experts in transformers; the first two exclude each other."""
_EXPERT = re.compile(r"^(.+\.experts)\.\d+\.(gate_proj|up_proj|down_proj|w1|w2|w3)$")
_BLOCK = re.compile(r"^(?:.*\.)?\d+(?=\.)")  # the path of a decoder block: all up to the last number


@dataclass(frozen=True)
class Layer:
    """A weight of which vLLM asks the format.

    Attributes:
        path: its path.
        kind: what it is.
        shape: of the share that this process has, `[N, K]` or `[E, N, K]`.
        columns: K of the whole layer.
        dtype: type in which the model computes.
        role: whether it is a token table or an output head.
    """

    path: str
    kind: Kind
    shape: tuple[int, ...]
    columns: int
    dtype: torch.dtype
    role: Role = ""


class Formats:
    """The formats of a model's layers.

    Attributes:
        online: whether the checkpoint has float weights, which are packed while they are loaded.
        asked: the paths that vLLM has asked for.
        whole: the stacks of experts that vLLM takes one expert at a time, gate and up in one matrix.
    """

    def __init__(self, stored: Mapping[str, str] | None, request: Request | None) -> None:
        """Args:
        stored: {path: format} of the packed layers of a checkpoint; None: the checkpoint has none.
        request: what to pack; None with `stored`.
        """
        assert (stored is None) != (request is None)
        self.online = stored is None
        self.request = request
        self.asked: set[str] = set()
        self.whole: set[str] = set()
        self._known: dict[str, str | None] = dict(stored or {})
        self._original = {path: path for path in self._known}  # vLLM's path -> that of the checkpoint
        self._paths = set(self._known)  # those of the checkpoint

    def resolve(self, config: Any) -> None:
        """Decide about all layers at once, as `from_pretrained` would. Without this, each layer is decided alone.

        Args:
            config: the model's configuration, of transformers.

        Raises:
            ValueError: the request does not fit the model.
        """
        if self.request is None:
            return
        try:
            layers = layers_of(config)
        except Exception as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            log.warning(
                "%s: formats are chosen layer by layer, because transformers cannot make the model: %s", OP, why
            )
            return
        verdict = decide(layers, self.request)
        for note in verdict.notes:
            log.warning("%s: %s", OP, note)
        self._known = {each.name: each.format.name if each.format else None for each in verdict.decisions}
        self._original = {path: path for path in self._known}

    def rename(self, mapper: Any) -> None:
        """Take over the paths of vLLM's model. `mapper` is its WeightsMapper, and may leave layers out."""
        renamed = {_with_leaf_of(old, new): old for new, old in mapper.apply_dict({p: p for p in self._known}).items()}
        self._original = {new: self._original[old] for new, old in renamed.items()}
        self._known = {new: self._known[old] for new, old in renamed.items()}

    # ---- what layers are there ---------------------------------------------------------------------------------------

    def is_float(self, paths: Sequence[str]) -> bool:
        """Whether all of these layers are known to be float."""
        self.asked.update(paths)
        if self.online:
            return all(path in self._known and self._known[path] is None for path in paths)
        return not any(self._known.get(path) for path in paths)

    def table(self, prefix: str, head: bool) -> str:
        """The path of a token table or output head. Many of vLLM's models give their tables no prefix.

        Raises:
            ValueError: it has no prefix, and there are several of different formats that it may be.
        """
        if prefix:
            return prefix
        by_name = head_by_name if head else embedding_by_name
        names = [path for path in self._known if by_name(path)]
        names = [name for name in names if self._known[name] is not None] or names
        if len({self._known[name] for name in names}) > 1:
            listed = ", ".join(f"{name}: {self._known[name]}" for name in names)
            raise ValueError(
                f"{OP}: vLLM's model has a table without a name, which may be any of these, and they have different formats: {listed}. "
                f"Save the model with exclude={sorted(name.rpartition('.')[2] for name in names)}, or with a topology that gives them "
                "the same format."
            )
        self.asked.update(names)
        return names[0] if names else "lm_head" if head else "embed_tokens"

    def experts(self, prefix: str, gated: bool) -> tuple[str, str]:
        """The paths of the stacks of fused experts: what goes up, with the gate if there is one, and what goes down.

        transformers and vLLM have different names for the module of some models, so its block decides.

        Raises:
            ValueError: its block has several modules with experts.
        """
        leaves = ("gate_up_proj" if gated else "up_proj", "down_proj")
        parent = prefix
        if not any(f"{prefix}.{leaf}" in self._known for leaf in STACKS) and (block := _BLOCK.match(prefix)):
            parents = sorted(
                {
                    path.rpartition(".")[0]
                    for path in self._known
                    if path.startswith(f"{block[0]}.")
                    and path.rpartition(".")[2] in STACKS
                    and "experts" in path.split(".")
                }
            )
            if len(parents) > 1:
                raise ValueError(
                    f"{OP}: the experts of {prefix} may be any of {', '.join(parents)}. Save the model with exclude='experts'."
                )
            parent = parents[0] if parents else prefix
        up, down = (f"{parent}.{leaf}" for leaf in leaves)
        return up, down

    def are_packed(self, prefix: str, paths: tuple[str, str], moe: Any) -> bool:
        """Whether the two stacks of some experts are packed; no code runs experts of which one stack is float.

        Args:
            prefix: vLLM's name of the experts.
            paths: those of the two stacks.
            moe: vLLM's configuration of the experts, for their shapes.

        Raises:
            ValueError: the checkpoint has one of the stacks packed.
        """
        if not self.online or all(path in self._known for path in paths):
            self.asked.update(paths)
            packed = [bool(self._known.get(path)) for path in paths]
            if not self.online and any(packed) and not all(packed):
                one, other = paths if packed[0] else paths[::-1]
                raise ValueError(
                    f"{OP}: config.json says that {one} is packed and {other} is not, but no code runs such experts. The checkpoint was "
                    "made from another model, or is damaged."
                )
            if not all(packed) or not self.online:
                return all(packed)
        inner, rows = moe.intermediate_size_per_partition, 2 if moe.is_act_and_mul else 1
        experts, dtype = moe.num_local_experts, moe.in_dtype
        up = Layer(paths[0], "experts", (experts, rows * inner, moe.hidden_dim), moe.hidden_dim, dtype)
        down = Layer(paths[1], "experts", (experts, moe.hidden_dim, inner), moe.intermediate_size, dtype)
        return all(self.of(layer) is not None for layer in (up, down))

    def stored_in(self, tensor: str) -> str | None:
        """The packed layer of the checkpoint to which a tensor belongs; None: to none. `tensor` is without ".weight".

        The matrices of experts one by one belong to a stack.
        """
        if tensor in self._paths:
            return tensor
        found = _EXPERT.match(tensor)
        leaves = () if found is None else ("down_proj",) if found[2] in ("down_proj", "w2") else STACKS[:2]
        return next((path for leaf in leaves if (path := f"{found[1]}.{leaf}") in self._paths), None)  # type: ignore[index]

    def by_expert(self, tensor: str) -> tuple[str, str] | None:
        """Where vLLM takes a tensor of the checkpoint one expert at a time: the module, and its name for the values.

        Returns:
            For `M.gate_up_proj` of 32 matrices M and "w13_weight": vLLM knows them as M.0.w13_weight and so on. None: it
            takes the tensor as it is.
        """
        stack = tensor.removesuffix("_bias")
        parent, _, leaf = stack.rpartition(".")
        if not any(self._original[path] == stack for path in self.whole):
            return None
        return parent, f"{'w2' if leaf == 'down_proj' else 'w13'}_{'weight' if tensor == stack else 'bias'}"

    def unasked(self) -> dict[str, tuple[str, str]]:
        """The layers that have a format and that vLLM did not ask for: {path in the checkpoint: (path, format)}."""
        return {
            original: (path, fmt)
            for path, original in self._original.items()
            if path not in self.asked and (fmt := self._known[path]) is not None
        }

    # ---- their formats -----------------------------------------------------------------------------------------------

    def of(self, layer: Layer) -> QuantFormat | None:
        """The format of a weight; None: it is float.

        Raises:
            ValueError: the format of the checkpoint does not fit the share of this process.
        """
        self.asked.add(layer.path)
        name = self._known.get(layer.path)
        columns = layer.shape[-1]
        if self.request is None:
            fmt = None if name is None else get_format(name)
            if fmt is not None and columns % fmt.block:
                raise ValueError(
                    f"{OP}: {layer.path} is {fmt.name} with {layer.columns} columns, of which this process gets {columns}, not a multiple "
                    f"of its block of {fmt.block}. Use another tensor-parallel size, or pack this layer in a format with smaller blocks."
                )
            return fmt
        if layer.path not in self._known:
            return self._alone(layer)
        if name is None or columns % get_format(name).block == 0:
            return None if name is None else get_format(name)
        return _decided(layer, Request(name, Options(fallback=self.request.options.fallback), OP))

    def _alone(self, layer: Layer) -> QuantFormat | None:
        """The format of a layer that is not known; the base format of a mix, whose rules need the other layers."""
        assert self.request is not None
        mix = mix_name(self.request.fmt)
        if mix in MIXES:
            log.warning("%s: %s gets %s, because transformers does not know it", OP, layer.path, MIXES[mix].base)
            return _decided(layer, Request(MIXES[mix].base, self.request.options, OP))
        return _decided(layer, self.request)


def _with_leaf_of(old: str, new: str) -> str:
    """vLLM's path of a layer. Of a stack of experts it may be one of vLLM's parameters, so the last name stays."""
    leaf = old.rpartition(".")[2]
    return f"{new.rpartition('.')[0]}.{leaf}".lstrip(".") if leaf in STACKS else new


def _decided(layer: Layer, request: Request) -> QuantFormat | None:
    block = layer.path.rpartition(".")[0] if layer.kind == "experts" else None
    info = LayerInfo(layer.path, layer.kind, layer.shape, layer.dtype, layer.role, block=block)
    return decide([info], request).decisions[0].format
