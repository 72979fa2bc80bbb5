"""`explain`: the kernels that run for each quantized layer, by the number of rows of x, with the reasons."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from isqtorch.formats import get_format
from isqtorch.modules import PackedModule, QuantEmbedding, QuantExperts, QuantLinear
from isqtorch.modules.convert import name_of
from isqtorch.modules.foreign import find_foreign
from isqtorch.ops import CpuInfo, cpu_info, cuda_info
from isqtorch.ops.metal.chips import limits
from isqtorch.ops.native import NATIVE_DEVICES, missing_kernels, no_fp8_products
from isqtorch.text import common_name, markdown_table, text_table, without_numbers

JSON_VERSION = 1
_HEAD = ("layer", "count", "shape", "format", "bpw", "device", "op", "kernel, by rows of x")
_NUMBERS = (1, 4)  # columns of _HEAD that are aligned to the right
_ANY = "any"


@dataclass(frozen=True)
class KernelUse:
    """The kernel for a range of rows of x (embedding: number of ids; experts: number of rows per expert)."""

    rows: str  # "1-8", "9+", "any"
    kernel: str
    level: str  # instruction-set level of the CPU kernel; "" if it is not a native CPU kernel
    why: str

    def __str__(self) -> str:
        return self.kernel if self.rows == _ANY else f"{self.rows}: {self.kernel}"


@dataclass(frozen=True)
class LayerExplanation:
    """One quantized layer."""

    name: str  # path in the model; "" for the module itself
    module: str  # class
    op: str  # linear, embedding or experts_linear
    format: str
    shape: tuple[int, ...]  # [N, K], [E, N, K] for experts
    bits_per_weight: float
    device: str
    kernels: tuple[KernelUse, ...]


@dataclass
class Explanation:
    """The kernels of all quantized layers of a module. `explain` returns it; printing it shows a table and the notes.

    Attributes:
        layers: one entry per packed weight, in the order of the model. `explanation["name of a layer"]` returns one.
        notes: notes on all layers: the selected instruction-set level and the reason, and what each kernel does.

    Example:
        isqtorch.quantize_(model, "q4k")
        explanation = isqtorch.explain(model)
        print(explanation["model.layers.0.mlp.up_proj"].kernels)
        print(explanation.to_markdown())
    """

    layers: list[LayerExplanation]
    notes: list[str] = field(default_factory=list)

    @property
    def groups(self) -> list[tuple[str, list[LayerExplanation]]]:
        """Layers that differ only in numbers in their names, with a common name such as "layers.[0-7].mlp.up_proj"."""
        groups: dict[tuple[Any, ...], list[LayerExplanation]] = {}
        for layer in self.layers:
            key = (without_numbers(layer.name), layer.module, layer.format, layer.shape, layer.device, layer.kernels)
            groups.setdefault(key, []).append(layer)
        return [(common_name([layer.name for layer in group]), group) for group in groups.values()]

    def __getitem__(self, name: str) -> LayerExplanation:
        """Return the entry of one layer. Raise KeyError if there is none of this name."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    # ---- output ------------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        if not self.layers:
            return "\n".join(self.notes)
        return "\n".join([text_table(_HEAD, self._table(), right=_NUMBERS), "", *self.notes])

    def to_dict(self) -> dict[str, Any]:
        """Return version, notes and groups as plain dicts and lists."""
        groups = []
        for name, members in self.groups:
            facts = asdict(members[0])
            del facts["name"]
            groups.append({"name": name, "layers": [layer.name for layer in members], **facts})
        return {"explanation_version": JSON_VERSION, "notes": self.notes, "groups": groups}

    def to_json(self, indent: int | None = 2) -> str:
        """Format `to_dict()` as JSON, with `indent` spaces per level; None gives one line."""
        return json.dumps(self.to_dict(), indent=indent)

    def to_markdown(self) -> str:
        """Format the table and the notes in Markdown."""
        notes = [f"- {note}" for note in self.notes]
        if not self.layers:
            return "\n".join(notes) + "\n"
        return "\n".join([markdown_table(_HEAD, self._table(), right=_NUMBERS), "", *notes]) + "\n"

    def _table(self) -> list[Sequence[str]]:
        """Return one row of text per group."""
        return [
            (
                name or f"({members[0].module})",
                str(len(members)),
                " x ".join(map(str, members[0].shape)),
                members[0].format,
                f"{members[0].bits_per_weight:.2f}",
                members[0].device,
                members[0].op,
                "; ".join(map(str, members[0].kernels)),
            )
            for name, members in self.groups
        ]


def explain(module: nn.Module) -> Explanation:
    """Show which kernels run for each quantized layer, by the number of rows of x, and why.

    The result holds for the instruction-set level that is selected now. The operator `linear` itself chooses from the
    same list of kernels.

    Args:
        module: a model, or one layer.

    Returns:
        The layers with their kernels, and notes. A module without quantized layers gives no layers and one note.

    Raises:
        AttributeError: `module` is not an nn.Module.

    Example:
        isqtorch.quantize_(model, "q4k")
        print(isqtorch.explain(model))
    """
    info = cpu_info()
    found = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, PackedModule)]
    foreign = find_foreign(module)
    layers = [_explain_layer(name, layer, leaf, info) for name, layer in found for leaf in layer.packed]
    if not layers:
        note = f"{type(module).__name__} has no quantized layers: quantize it with isqtorch.quantize_ first."
        return Explanation([], [note if foreign is None else f"{foreign}. isqtorch runs none of them."])
    notes = [] if foreign is None else [f"{foreign}, which are not listed here: isqtorch does not run them"]
    if any(layer.device == "cpu" for layer in layers):
        notes.append(f"CPU kernels: {info.isa_selected}, {info.reason}; {info.threads} threads")
    uses = dict.fromkeys((use.kernel, use.level, use.why) for layer in layers for use in layer.kernels)
    notes += _activation_notes([layer for _, layer in found])
    notes += [f"{kernel}{f', level {level}' if level else ''}: {why}" for kernel, level, why in uses]
    return Explanation(layers, notes)


def _explain_layer(name: str, layer: PackedModule, leaf: str, info: CpuInfo) -> LayerExplanation:
    fmt, weight = get_format(layer.packed[leaf]), getattr(layer, leaf)
    op = "embedding" if isinstance(layer, QuantEmbedding) else "linear"
    if isinstance(layer, QuantExperts):
        op = "experts_linear"
    return LayerExplanation(
        name=name_of(name, leaf),
        module=type(layer).__name__,
        op=op,
        format=fmt.name,
        # computed from the bytes, because a shard has fewer columns than in_features
        shape=(*weight.shape[:-1], fmt.in_features(weight.shape[-1])),
        bits_per_weight=fmt.bits_per_weight,
        device=str(weight.device),
        kernels=_kernels(op, fmt.name, weight.device.type, info, _has_fp8_products(layer)),
    )


def _has_fp8_products(layer: PackedModule) -> bool:
    """Return whether x is rounded to FP8 for many rows: the layer allows it, and device and shape support it."""
    if not isinstance(layer, QuantLinear) or layer.activations is None:
        return False
    rows, columns = layer.weight.shape[0], get_format(layer.format).in_features(layer.weight.shape[1])
    return rows % 16 == 0 and columns > 128 and no_fp8_products(layer.weight.device) is None


def _activation_notes(layers: Sequence[PackedModule]) -> list[str]:
    """Explain why x is not rounded to FP8 in layers that allow it; one note per reason."""
    allowed = [layer for layer in layers if isinstance(layer, QuantLinear) and layer.activations]
    why: dict[str, int] = {}
    for layer in allowed:
        reason = no_fp8_products(layer.weight.device)
        if reason is None and not _has_fp8_products(layer):
            reason = "cuBLAS wants out_features that are a multiple of 16, and more than 128 in_features"
        if reason is not None:
            why[reason] = why.get(reason, 0) + 1
    return [f'activations="fp8" changes nothing for {count} layers: {reason}' for reason, count in why.items()]


def _kernels(op: str, format: str, device: str, info: CpuInfo, fp8_products: bool = False) -> tuple[KernelUse, ...]:
    if device == "meta":
        return (KernelUse(_ANY, "none", "", "a layer on meta holds no data; only shapes are computed"),)
    if device not in NATIVE_DEVICES:
        why = f"{missing_kernels(device)}, so weights are decoded by PyTorch, correctly and slowly"
        return (KernelUse(_ANY, "plain PyTorch reference", "", why),)
    if device == "cuda":
        return _cuda_kernels(op, format, fp8_products)
    if device == "mps":
        return _metal_kernels(op)
    if op == "embedding":
        return (KernelUse(_ANY, "decoded rows", info.isa_of_formats, "only the rows that the ids name are decoded"),)
    if op == "experts_linear" and info.linear[format][-1].decodes:
        few = info.linear[format][0]  # used for all rows, eight at a time: no expert is decoded into memory
        return (KernelUse(_ANY, few.kernel, few.level, few.why),)
    return tuple(KernelUse(use.rows, use.kernel, use.level, use.why) for use in info.linear[format])


def _cuda_kernels(op: str, format: str, fp8_products: bool) -> tuple[KernelUse, ...]:
    info = cuda_info()
    assert info
    if op == "embedding":
        return (KernelUse(_ANY, "decoded rows (CUDA)", "", "only the rows that the ids name are decoded"),)
    if op == "experts_linear":
        why = "pairs of a token and an expert, sorted on the GPU where there are many"
        return (KernelUse(_ANY, "rows or tiles (CUDA)", "", why),)
    return tuple(
        KernelUse(use.rows, use.kernel, use.level, use.why) for use in info.linear(format, fp8_products=fp8_products)
    )


def _metal_kernels(op: str) -> tuple[KernelUse, ...]:
    if op == "embedding":
        return (KernelUse(_ANY, "decoded rows (Metal)", "", "only the rows that the ids name are decoded"),)
    few, many = limits()
    uses = (
        KernelUse(f"1-{few}", "rows (Metal)", "", "each weight is read once, and used for all rows of x"),
        KernelUse(
            f"{few + 1}-{many}", "tiles (Metal)", "", "weights are decoded into threadgroup memory, for matrix units"
        ),
    )
    if op == "experts_linear":
        return (uses[0], replace(uses[1], rows=f"{few + 1}+"))
    why = "there torch's own product is faster, and decoding costs little beside it"
    return (*uses, KernelUse(f"{many + 1}+", "decoded, then torch's product (Metal)", "", why))
