"""QuantEmbedding: nn.Embedding over a packed table."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from isqtorch.formats import QuantFormat, get_format

from .packed import PackedModule, check_packed, ordinary_tensors, packed_parameter
from .parameter import PackedParameter, plain_bytes

_embedding = torch.ops.isqtorch.embedding.default


class QuantEmbedding(PackedModule, nn.Embedding):
    """Rows of a packed table, decoded on the way out.

    Args:
        num_embeddings: rows of the table.
        embedding_dim: K, a multiple of the format's block.
        padding_idx: kept for whoever asks; it has no effect, because the table does not learn.
        format: format or its name.
        device: where to allocate; "meta" allocates nothing.
        dtype: type of the rows that `forward` returns.

    Attributes:
        scale: what rows are multiplied by on the way out, as in Bart's and Gemma's tables; None for nothing.
        scale_is_rounded: whether the scale is rounded to `dtype` first, as Gemma does.
        first_row: number of the first row that is here, where tensor parallelism spreads the table over processes. Ids of
            rows that are elsewhere give zeros, for the processes' results to be added up.

    Shapes: ids int64 or int32 `[...]`; result `[..., K]` in `dtype`.
    """

    first_row: int = 0

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        format: QuantFormat | str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Embedding's own would allocate a float table
        fmt = self._set_format(format, dtype, nn.Embedding)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        # nn.Embedding's other attributes, at the only values supported: its extra_repr and other code read them
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.scale: float | None = None
        self.scale_is_rounded = False
        packed = torch.zeros(num_embeddings, fmt.row_bytes(embedding_dim), dtype=torch.uint8, device=device)
        self.weight = PackedParameter(packed)

    @classmethod
    def from_packed(
        cls,
        packed: Tensor,
        format: QuantFormat | str,
        *,
        padding_idx: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> QuantEmbedding:
        """A table over bytes that exist: uint8 `[rows, row_bytes]`. A parameter is taken over as it is, not copied."""
        fmt = get_format(format)
        rows, dim = check_packed("QuantEmbedding.from_packed", packed, fmt)
        layer = cls(rows, dim, padding_idx, format=fmt, device="meta", dtype=dtype)
        layer.weight = packed_parameter(packed)
        return layer

    @classmethod
    def from_float(
        cls,
        embedding: nn.Embedding,
        format: QuantFormat | str,
        *,
        importance: Tensor | None = None,
        rule: str | None = None,
    ) -> QuantEmbedding:
        """Quantize the table of `embedding`, which stays as it was.

        Raises:
            ValueError: K does not fit the format, a weight is not finite, or `max_norm` is set (it rewrites rows).
        """
        fmt = get_format(format)
        if embedding.max_norm is not None:
            raise ValueError(
                "QuantEmbedding.from_float: max_norm rewrites rows while it looks them up; packed rows cannot change"
            )
        with ordinary_tensors():
            packed = torch.ops.isqtorch.quantize(embedding.weight, fmt.name, importance, rule)
        return cls.from_packed(packed, fmt, padding_idx=embedding.padding_idx, dtype=embedding.weight.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        rows = self._rows(ids)
        if self.scale is None:
            return rows
        return rows * (torch.tensor(self.scale, dtype=self.dtype) if self.scale_is_rounded else self.scale)

    def _rows(self, ids: Tensor) -> Tensor:
        weight = plain_bytes(self.weight)
        if weight.shape[0] == self.num_embeddings:
            rows: Tensor = _embedding(ids, weight, self.format, self.dtype)
            return rows
        local = ids - self.first_row
        here = (local >= 0) & (local < weight.shape[0])
        rows = _embedding(torch.where(here, local, 0), weight, self.format, self.dtype)
        return torch.where(here[..., None], rows, 0)

    @property
    def embed_scale(self) -> Tensor:
        """The scale under the name that scaled tables have it, for those who ask (PEFT); no attribute where there is none."""
        if self.scale is None:
            raise AttributeError("this table has no scale")
        return torch.tensor(self.scale, dtype=self.dtype, device=self.weight.device)

    def reset_parameters(self) -> None:
        """Back to zeros, as the constructor leaves it: packed bytes cannot be initialized randomly."""
        with torch.no_grad():
            self.weight.zero_()

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f"padding_idx={self.padding_idx}, "
        scale = "" if self.scale is None else f"embed_scale={self.scale:g}, "
        return f"{self.num_embeddings}, {self.embedding_dim}, {padding}{scale}{self.format}, {self.bits_per_weight:.2f} bpw"
