"""The unquantized model that all rows are compared with: floats, also where only a quantized file exists.

The weights of a quantized file lie on the grids of its blocks. A quantizer that meets the same grid again would lose
less, or more, than on weights of a training. So every packed weight is decoded, and noise hides its grid: uniform, one
step wide, seeded. The model with this noise is the original of the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import isqtorch
from isqtorch.formats import QuantFormat, get_format
from isqtorch.modules import QuantEmbedding, QuantLinear

SEED = 20261130
_CHUNK = 1 << 16  # blocks


@dataclass(frozen=True)
class Original:
    """A float model. `dithered`: number of weights with noise, of those that were `packed`."""

    model: Any
    tokenizer: Any
    packed: int
    dithered: int

    @classmethod
    def load(cls, source: str, dtype: str) -> Original:
        """Open a folder, an id or a GGUF file. dtype: its name, or "auto" for that of the checkpoint."""
        loaded = isqtorch.load(source, dtype=None if dtype == "auto" else dtype, progress=False)
        model = loaded.model
        layers = {name: m for name, m in model.named_modules() if isinstance(m, (QuantLinear, QuantEmbedding))}
        noise = {name: _noise(layer) for name, layer in _distinct(layers).items()}
        if layers:
            isqtorch.dequantize_(model)
        found = [name for name, value in noise.items() if value is not None]
        for name in found:
            weight: Tensor = model.get_submodule(name).weight
            value = noise.pop(name)
            assert value is not None
            with torch.no_grad():
                weight.add_(value.t() if layers[name].is_turned() else value)
        return cls(model, loaded.tokenizer, len(found) + len(noise), len(found))

    @property
    def note(self) -> str:
        """What was done to the weights; "" for a model that was not quantized."""
        if not self.packed:
            return ""
        return (
            f"the weights of the file are quantized: {self.packed} were decoded, and {self.dithered} of them got uniform "
            f"noise of one step of their own grid (seed {SEED})"
        )


def _distinct(layers: dict[str, QuantLinear | QuantEmbedding]) -> dict[str, QuantLinear | QuantEmbedding]:
    """One layer for each weight: tied layers share theirs."""
    found: dict[int, str] = {}
    for name, layer in layers.items():
        found.setdefault(_bytes_of(layer).data_ptr(), name)
    return {name: layers[name] for name in found.values()}


def _bytes_of(layer: QuantLinear | QuantEmbedding) -> Tensor:
    packed: Any = layer.weight
    plain: Tensor = getattr(packed, "plain", packed)
    return plain


def _noise(layer: QuantLinear | QuantEmbedding) -> Tensor | None:
    """Noise for the decoded weight, `[N, K]`; None for a format whose levels have no common step."""
    fmt, packed = get_format(layer.format), _bytes_of(layer)
    if fmt.solver in ("codebook", "fp8"):
        return None
    generator = torch.Generator().manual_seed(SEED)
    blocks = packed.reshape(-1, fmt.block_bytes)
    pieces = []
    for piece in blocks.split(_CHUNK):
        step = step_of(fmt, piece)
        pieces.append(step * (torch.rand(step.shape, generator=generator) - 0.5))
    return torch.cat(pieces).view(packed.shape[0], -1).to(layer.dtype)


def step_of(fmt: QuantFormat, blocks: Tensor) -> Tensor:
    """What one more in a code changes, for each weight of some blocks: uint8 `[n, block_bytes]` -> f32 `[n, block]`."""
    fields = fmt.unpack(blocks)
    code = fields["q"]
    zero, one = (fmt.decode({**fields, "q": torch.full_like(code, value)}) for value in (0, 1))
    return (one - zero).abs()


def is_language_model(model: nn.Module) -> bool:
    """Whether the model predicts tokens; others are judged by the embeddings of sentences."""
    return any(kind in type(model).__name__ for kind in ("CausalLM", "LMHead", "ConditionalGeneration"))
