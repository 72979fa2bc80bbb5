"""The weights of a model as tensors of an MLX folder. No bit of a packed weight changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isqtorch.files.tensors_writing import Member, Piece
from isqtorch.formats import QuantFormat, formats, get_format
from isqtorch.formats.affine import AffineFormat
from isqtorch.formats.codebook import mxfp4_codes
from isqtorch.integrations.checkpoints.gguf.outgoing import Source, sources
from isqtorch.tensor import QuantizedTensor

from .layouts import Layout, is_raised, renamed
from .settings import Setting

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}


@dataclass(frozen=True)
class Part:
    """Some rows of a parameter, which are one weight in MLX.

    Attributes:
        source: the parameter.
        name: its name in the folder.
        number: which of the parts it is.
        count: how many parts the parameter has.
        interleaved: whether the rows of the parts alternate.
    """

    source: Source
    name: str
    number: int = 0
    count: int = 1
    interleaved: bool = False

    @property
    def path(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def setting(self) -> Setting | None:
        """How MLX describes its format; None: it is float, or MLX does not have the format."""
        return None if self.source.format is None else setting_of(get_format(self.source.format))

    def rows(self, tensor: Tensor) -> Tensor:
        """The rows of the part: dimension 1 of a stack or of its biases, 0 of a matrix."""
        if self.count == 1:
            return tensor
        dim = 1 if self.source.leaf.startswith(tuple(_PARTS)) else 0
        if self.interleaved:
            apart: Tensor = tensor.unflatten(dim, (-1, self.count))
            return apart.select(dim + 1, self.number)
        return tensor.chunk(self.count, dim)[self.number]


def parts_of(model: Any, layout: Layout, op: str) -> list[Part]:
    """All weights of a model, under their names in MLX.

    Raises:
        ValueError: the output head has weights of its own, and mlx-lm has none for this architecture.
    """
    found = []
    names = _Names(model, layout)
    for source in sources(model):
        stack, is_bias = source.leaf.removesuffix("_bias"), source.leaf.endswith("_bias")
        path = source.name.rpartition(".")[0]
        if stack in _PARTS and path.endswith(".experts"):
            place = names.of(f"{path.removesuffix('experts')}{layout.stacks}")
            interleaved = not getattr(source.module, "is_concatenated", True)
            end, roles = "bias" if is_bias else "weight", _PARTS[stack]
            found += [
                Part(source, f"{place}.{role}.{end}", number, len(roles), interleaved)
                for number, role in enumerate(roles)
            ]
            continue
        whole = next((end for end in layout.fused if source.name.endswith(f".{end}.weight")), None)
        if whole is not None and names.fused_applies:
            start, ends = source.name.removesuffix(f"{whole}.weight"), layout.fused[whole]
            found += [Part(source, f"{start}{end}.weight", number, len(ends)) for number, end in enumerate(ends)]
            continue
        found.append(Part(source, names.of(source.name)))
    return found + _head(model, layout, found, names, op)


def _head(model: Any, layout: Layout, found: list[Part], names: _Names, op: str) -> list[Part]:
    """The output head once more, if it shares the weight of the embedding and mlx-lm wants one of its own."""
    head, tied = model.get_output_embeddings(), is_tied(model)
    if layout.head is False and head is not None and not tied:
        raise ValueError(
            f"{op}: the output head has weights of its own, and mlx-lm uses the embedding for models of type "
            f"{model.config.model_type!r}. Tie them (model.tie_weights()) before quantizing."
        )
    if not (layout.head and tied):
        return []
    path = next(path for path, module in model.named_modules(remove_duplicate=False) if module is head)
    table = next(part.source for part in found if part.source.module is model.get_input_embeddings())
    return [Part(table, names.of(f"{path}.weight"))]


def is_tied(model: Any) -> bool:
    """Whether the output head of a model shares the weight of the embedding."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and table is not None and head._parameters.get("weight") is table._parameters.get("weight")


def setting_of(fmt: QuantFormat) -> Setting | None:
    """How MLX describes a format; None if it does not have it."""
    if isinstance(fmt, AffineFormat):
        return Setting("affine", fmt.bits, fmt.block)
    return Setting("mxfp4", 4, 32) if fmt.name == "mxfp4" else None


def known_formats() -> list[str]:
    """The names of the formats that MLX has, without their variants."""
    return sorted(name for name in formats() if setting_of(get_format(name)) is not None)


def pieces_of(part: Part, layout: Layout, op: str) -> list[Piece]:
    """The tensors of a weight in the folder.

    Raises:
        ValueError: it is packed in a format that MLX does not have, or is of a type that it does not have.
    """
    source = part.source
    if source.format is None:
        value = part.rows(source.tensor)
        if value.is_floating_point() and value.dtype not in _FLOATS:
            raise ValueError(
                f"{op}: {source.name} is {value.dtype}, which MLX does not have. Convert it: model.float()"
            )
        return [
            Piece((Member(part.name, value.dtype, _stored_shape(value, source)),), lambda: [_as_in_mlx(part, layout)])
        ]
    fmt = get_format(source.format)
    setting = setting_of(fmt)
    if setting is None:
        raise ValueError(
            f"{op}: {source.name} is {fmt.name}, which MLX does not have; it has {', '.join(known_formats())}. Pack the model again, "
            "from its float weights: requantize_(model, 'afq4'), or --isq afq4 on the command line. A topology gives single layers "
            "another format."
        )
    *rows, row_bytes = part.rows(source.tensor).shape
    columns = fmt.in_features(row_bytes)
    weight = Member(f"{part.path}.weight", torch.uint32, (*rows, columns * fmt.bits // 32))
    if isinstance(fmt, AffineFormat):
        others = [
            Member(f"{part.path}.{leaf}", fmt.scale_dtype, (*rows, columns // fmt.block))
            for leaf in ("scales", "biases")
        ]
        return [Piece((weight, *others), lambda: _affine(part, fmt))]
    scales = Member(f"{part.path}.scales", torch.uint8, (*rows, columns // fmt.block))
    return [Piece((weight,), lambda: _mxfp4(part)[:1]), Piece((scales,), lambda: _mxfp4(part)[1:])]


def _affine(part: Part, fmt: QuantFormat) -> Sequence[Tensor]:
    packed = part.rows(part.source.tensor).contiguous()
    *rows, row_bytes = packed.shape
    return QuantizedTensor(packed, fmt, torch.Size([*rows, fmt.in_features(row_bytes)]), torch.float32).to_mlx()


def _mxfp4(part: Part) -> list[Tensor]:
    codes, scales = mxfp4_codes(part.rows(part.source.tensor).contiguous())
    return [codes.contiguous().view(torch.uint32), scales]


def _is_convolution(source: Source) -> bool:
    return isinstance(source.module, nn.Conv1d) and source.leaf == "weight"


def _stored_shape(value: Tensor, source: Source) -> tuple[int, ...]:
    return tuple(value.transpose(1, 2).shape if _is_convolution(source) else value.shape)


def _as_in_mlx(part: Part, layout: Layout) -> Tensor:
    """The values of a float tensor in the folder."""
    source = part.source
    value = part.rows(source.tensor)
    if _is_convolution(source):
        return value.transpose(1, 2)
    if is_raised(layout, part.name, value):
        return (value.float() + 1).to(value.dtype)
    return value


class _Names:
    """From names of the model to those of MLX."""

    def __init__(self, model: Any, layout: Layout) -> None:
        from transformers.conversion_mapping import PrefixChange, get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        conversions = get_model_conversion_mapping(model, add_legacy=False)
        renamings = [
            each for each in conversions if isinstance(each, WeightRenaming) and not isinstance(each, PrefixChange)
        ]
        self._back = [each.reverse_transform() for each in reversed(renamings)]
        self._layout = layout
        self.fused_applies = not any("experts" in name for name, _ in model.named_modules())

    def of(self, name: str) -> str:
        from transformers.core_model_loading import apply_renamings

        return renamed(apply_renamings(name, self._back), self._layout.back)
