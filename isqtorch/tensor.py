"""QuantizedTensor, one quantized weight: packed bytes with their format and shape, and conversions to other layouts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from isqtorch import ops
from isqtorch.formats import QuantFormat, get_format, resolve_format
from isqtorch.quantizers import Rule


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedTensor:
    """A quantized weight. `quantize` returns it.

    Attributes:
        data: uint8 `[..., N, row_bytes]`.
        format: the format of the bytes.
        shape: shape of the weight, `[..., N, K]`.
        dtype: dtype of the original weight, and the default of `dequantize`.

    Example:
        packed = isqtorch.quantize(torch.randn(64, 512), "q4k")
        print(packed.nbytes, packed.dequantize().shape)  # 18432 torch.Size([64, 512])
    """

    data: Tensor
    format: QuantFormat
    shape: torch.Size
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.data.dtype != torch.uint8 or self.data.ndim < 2:
            raise ValueError(
                f"QuantizedTensor: data must be uint8 [..., N, row_bytes], got {self.data.dtype} {list(self.data.shape)}."
            )
        decoded = torch.Size([*self.data.shape[:-1], self.format.in_features(self.data.shape[-1])])
        if self.shape != decoded:
            raise ValueError(
                f"QuantizedTensor: {list(self.data.shape)} bytes of {self.format.name} hold a weight of shape "
                f"{list(decoded)}, not {list(self.shape)}."
            )

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Decode the weight: `[..., N, K]` in `dtype`; default: the dtype of the original weight."""
        weight: Tensor = ops.dequantize(self.data, self.format.name, dtype or self.dtype)
        return weight

    @property
    def nbytes(self) -> int:
        """Size of `data` in bytes."""
        return self.data.numel()

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight: codes, scales and offsets."""
        return self.format.bits_per_weight

    def __repr__(self) -> str:
        sizes = " x ".join(map(str, self.shape))
        return (
            f"QuantizedTensor({sizes}, {self.format.name}, {self.bits_per_weight:.4g} bpw, {self.nbytes} bytes, "
            f"from {str(self.dtype).removeprefix('torch.')}, {self.data.device})"
        )

    # ---- MLX ---------------------------------------------------------------------------------------------------------

    def to_mlx(self) -> tuple[Tensor, Tensor, Tensor]:
        """Convert to the three tensors that MLX keeps for an affine weight. Bit patterns do not change.

        Returns:
            weight uint32 `[..., N, K * bits / 32]`, scales and biases f16 or bf16 `[..., N, K / group]`.

        Raises:
            ValueError: the format is not an AFQ format.
        """
        self._require("to_mlx", "affine", "afq4")
        raw = self.format.split(self.data.reshape(-1, self.format.block_bytes))
        *rows, columns = self.shape
        groups = (*rows, columns // self.format.block)
        codes = raw["qs"].reshape(*rows, columns * self.format.bits // 8)
        return codes.view(torch.uint32), raw["scale"].reshape(groups), raw["bias"].reshape(groups)

    @classmethod
    def from_mlx(cls, weight: Tensor, scales: Tensor, biases: Tensor, *, bits: int) -> QuantizedTensor:
        """Pack the three tensors of an MLX affine weight; the inverse of `to_mlx`.

        Args:
            weight: uint32 (or the same bits as int32) `[..., N, K * bits / 32]`.
            scales, biases: both f16 or both bf16, `[..., N, K / group]`; the group size follows from the shapes.
            bits: bits per code, from the checkpoint's config.

        Raises:
            ValueError: shapes or types do not fit together, or there is no format with this group size.
        """
        if weight.dtype not in (torch.uint32, torch.int32) or weight.ndim < 2:
            raise ValueError(
                f"from_mlx: weight must be uint32 [..., N, words], got {weight.dtype} {list(weight.shape)}."
            )
        if scales.dtype not in (torch.float16, torch.bfloat16) or biases.dtype != scales.dtype:
            raise ValueError(
                f"from_mlx: scales and biases must be both float16 or both bfloat16, got {scales.dtype} and {biases.dtype}. "
                "Convert them first; f32 ones lose precision by that."
            )
        if scales.shape != biases.shape or scales.shape[:-1] != weight.shape[:-1] or not scales.shape[-1]:
            raise ValueError(
                f"from_mlx: scales {list(scales.shape)} and biases {list(biases.shape)} do not fit a weight {list(weight.shape)}."
            )
        group, rest = divmod(32 * weight.shape[-1], bits * scales.shape[-1])
        if rest or group not in (32, 64, 128):
            raise ValueError(
                f"from_mlx: {weight.shape[-1]} words and {scales.shape[-1]} scales in a row do not make {bits}-bit groups "
                "of 32, 64 or 128. Is `bits` right?"
            )
        fmt = get_format(f"afq{bits}g{group}.{'f16' if scales.dtype == torch.float16 else 'bf16'}")
        raw = {
            "scale": scales.reshape(-1),
            "bias": biases.reshape(-1),
            "qs": weight.contiguous().view(torch.uint8).reshape(-1, group * bits // 8),
        }
        *rows, per_row = scales.shape
        data = fmt.join(raw).view(*rows, per_row * fmt.block_bytes)
        return cls(data, fmt, torch.Size([*rows, per_row * group]), scales.dtype)

    # ---- hqq ---------------------------------------------------------------------------------------------------------

    def to_hqq(self) -> tuple[Tensor, Tensor, Tensor]:
        """Convert to the three tensors that the hqq package keeps for a weight quantized with axis 1.

        Returns:
            W_q uint8, scale f16 `[groups, 1]`, zero f16 `[groups, 1]`; a group is a run of values in a row. W_q is
            `[groups, group]` for 8 bits and `[groups / 2, group]` for 4 bits, with the first half of the groups in the
            high nibbles and the second half in the low nibbles.

        Raises:
            ValueError: the format is not an HQQ format, or it has 4 bits and the number of groups is odd.
        """
        self._require("to_hqq", "hqq", "hqq4")
        fields = self.format.unpack(self.data.reshape(-1, self.format.block_bytes))
        codes = fields["q"]
        if self.format.bits == 4:
            half, odd = divmod(codes.shape[0], 2)
            if odd:
                raise ValueError(
                    f"to_hqq: the package packs 4-bit groups in pairs, and {list(self.shape)} has {codes.shape[0]}."
                )
            codes = codes[:half] << 4 | codes[half:]
        return codes, fields["scale"][:, None], fields["zero"][:, None]

    @classmethod
    def from_hqq(
        cls,
        W_q: Tensor,
        scale: Tensor,
        zero: Tensor,
        *,
        shape: tuple[int, ...] | torch.Size,
        dtype: torch.dtype = torch.float16,
    ) -> QuantizedTensor:
        """Pack the three tensors of a 4- or 8-bit weight of the hqq package (axis 1); the inverse of `to_hqq`.

        Args:
            W_q: uint8, in the layout of the package (see `to_hqq`). The number of bits follows from the shapes.
            scale, zero: float, one value per group. They are stored as f16, which is exact for the package's default.
            shape: shape of the weight, `[N, K]`.
            dtype: default dtype of `dequantize`.

        Raises:
            ValueError: shapes do not fit together, groups run along another axis, or a value overflows f16.
        """
        groups, group = scale.numel(), W_q.shape[-1] if W_q.ndim == 2 else 0
        bits = {groups: 8, groups // 2: 4}.get(W_q.shape[0] if W_q.ndim else 0)
        count = torch.Size(shape).numel()
        if (
            bits is None
            or group not in (32, 64, 128)
            or zero.numel() != groups
            or groups * group != count
            or shape[-1] % group
        ):
            raise ValueError(
                f"from_hqq: W_q {list(W_q.shape)}, scale {list(scale.shape)} and zero {list(zero.shape)} are not a 4- or 8-bit "
                f"weight of shape {list(shape)} in groups of 32, 64 or 128 along its rows (axis 1)."
            )
        if W_q.dtype != torch.uint8:
            raise ValueError(f"from_hqq: W_q must be uint8, got {W_q.dtype}.")
        stored = {"scale": scale.reshape(-1).half(), "zero": zero.reshape(-1).half()}
        if not all(bool(value.isfinite().all()) for value in stored.values()):
            raise ValueError(
                "from_hqq: scale or zero is not finite in float16. Dequantize with the package and quantize again."
            )
        fmt = get_format(f"hqq{bits}" if group == 64 else f"hqq{bits}g{group}")
        codes = W_q if bits == 8 else torch.cat([W_q >> 4, W_q & 15])
        data = fmt.pack({**stored, "q": codes}).view(*shape[:-1], fmt.row_bytes(shape[-1]))
        return cls(data, fmt, torch.Size(shape), dtype)

    def _require(self, method: str, solver: str, example: str) -> None:
        if self.format.solver != solver:
            raise ValueError(
                f"{method}: {self.format.name} is of another family. Quantize to one like {example} first."
            )


def quantize(
    weight: Tensor, fmt: int | str | QuantFormat, importance: Tensor | None = None, rule: Rule | None = None
) -> QuantizedTensor:
    """Quantize one weight.

    Args:
        weight: float `[..., N, K]`; leading dimensions (experts) are separate matrices.
        fmt: format, its name, or a number of bits, which selects a format for the weight's device and columns
            (`resolve_format`). AFQ formats have f16 scales for an f16 weight, else bf16 scales.
        importance: float `[K]`, or `[..., K]` with one vector per matrix, all >= 0: the weight of the squared error in
            each column. Formats without an importance search ignore it, and so do AFQ and HQQ without rule="search".
        rule: alternative rule of the format's quantizer: "search" for AFQ and HQQ, "mlx" for AFQ. None is the default
            rule.

    Returns:
        The packed weight, on the same device.

    Raises:
        TypeError: `weight` is not a tensor.
        ValueError: format or rule is unknown, the shape does not fit the format (K must be a multiple of its block), or
            weight or importance is not finite or too large.

    Example:
        weight = torch.randn(64, 512)
        packed = isqtorch.quantize(weight, "afq4", importance=torch.ones(512), rule="search")
        error = (packed.dequantize() - weight).norm() / weight.norm()
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"quantize: weight must be a torch.Tensor, got {type(weight).__name__}.")
    columns = weight.shape[-1] if weight.ndim else None
    chosen = resolve_format(fmt, weight.device, columns).for_dtype(weight.dtype)
    return QuantizedTensor(ops.quantize(weight, chosen.name, importance, rule), chosen, weight.shape, weight.dtype)
