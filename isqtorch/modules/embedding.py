"""QuantEmbedding: nn.Embedding with a packed table."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from isqtorch.formats import QuantFormat, get_format

from .packed import FLOAT_DTYPES, PackedModule, ordinary_tensors, packed_parameter, packed_shape
from .parameter import PackedParameter, plain_bytes

_embedding = torch.ops.isqtorch.embedding.default


class QuantEmbedding(PackedModule, nn.Embedding):
    """An embedding with a packed table, uint8 `[num_embeddings, row_bytes]`. `forward` decodes the selected rows.

    `quantize_` makes it; `from_float` makes it from a layer, and `from_packed` from packed bytes. The constructor makes
    a table of zeros, to load a state dict into.

    Args:
        num_embeddings: rows of the table.
        embedding_dim: K, a multiple of the format's block.
        padding_idx: only stored; it has no effect, because the table is not trained.
        format: format or its name.
        device: device of the table; "meta" allocates no memory.
        dtype: type of the rows that `forward` returns; default: torch's default dtype.

    Attributes:
        scale: factor of the returned rows, as in the tables of Bart and Gemma; None if there is none.
        scale_is_rounded: whether the scale is rounded to `dtype` before the product, as in Gemma.
        first_row: index of the first row in this process, if tensor parallelism splits the table. Ids of rows in other
            processes give zeros, because the results of all processes are added.

    Shapes:
        ids int64 or int32 `[...]`; result `[..., K]` in `dtype`.

    Example:
        table = isqtorch.QuantEmbedding.from_float(torch.nn.Embedding(1000, 512), "q8_0")
        print(table(torch.tensor([3, 7])).shape)  # torch.Size([2, 512])
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
        # the other attributes of nn.Embedding, which other code reads; only these values are supported
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
        """Make a table from packed bytes, which are not copied.

        Args:
            packed: uint8 `[rows, row_bytes]`. A parameter stays the same object.
            format: format of the bytes, or its name.
            padding_idx: only stored.
            dtype: type of the rows that `forward` returns; default: torch's default dtype.

        Raises:
            ValueError: `packed` is not uint8 `[rows, row_bytes]` of whole blocks, or the format is unknown.
        """
        fmt = get_format(format)
        rows, dim = packed_shape("QuantEmbedding.from_packed", packed, fmt)
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
        """Quantize the table of an embedding. `embedding` itself does not change.

        Args:
            embedding: the float layer.
            format: format or its name.
            importance: float `[K]`, see `isqtorch.quantize`.
            rule: alternative rule of the quantizer, see `isqtorch.quantize`.

        Raises:
            ValueError: K does not fit the format, a weight is not finite, `max_norm` is set (it changes rows in the
                forward), or format or rule is unknown.
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
            return self._look_up(ids, weight)
        local = ids - self.first_row
        here = (local >= 0) & (local < weight.shape[0])
        rows = self._look_up(torch.where(here, local, 0), weight)
        return torch.where(here[..., None], rows, 0)

    def _look_up(self, ids: Tensor, weight: Tensor) -> Tensor:
        """Rows in the type of the layer. The operator gives three types; another one is made of float32, exactly."""
        native = self.dtype if self.dtype in FLOAT_DTYPES else torch.float32
        rows: Tensor = _embedding(ids, weight, self.format, native)
        return rows if native is self.dtype else rows.to(self.dtype)

    @property
    def embed_scale(self) -> Tensor:
        """The scale as a tensor, which PEFT reads. Without a scale this raises AttributeError, so hasattr is False."""
        if self.scale is None:
            raise AttributeError("this table has no scale")
        return torch.tensor(self.scale, dtype=self.dtype, device=self.weight.device)

    def reset_parameters(self) -> None:
        """Set all bytes to zero, as the constructor does. Packed bytes cannot be initialized randomly."""
        with torch.no_grad():
            self.weight.zero_()

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f"padding_idx={self.padding_idx}, "
        scale = "" if self.scale is None else f"embed_scale={self.scale:g}, "
        return f"{self.num_embeddings}, {self.embedding_dim}, {padding}{scale}{self.format}, {self.bits_per_weight:.2f} bpw"
