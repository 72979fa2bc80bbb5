"""One quantized weight as a value: the packed bytes with what is needed to read them, and conversions to other layouts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from isqtorch import ops
from isqtorch.formats import QuantFormat, get_format, resolve_format
from isqtorch.quantizers import Rule


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedTensor:
    """A quantized weight.

    Attributes:
        data: uint8 `[..., N, row_bytes]`.
        format: what the bytes mean.
        shape: shape of the weight that they stand for, `[..., N, K]`.
        dtype: dtype of the original weight, and the default of `dequantize`.
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
        """The decoded weight, `[..., N, K]` in `dtype`, by default that of the original weight."""
        weight: Tensor = ops.dequantize(self.data, self.format.name, dtype or self.dtype)
        return weight

    @property
    def nbytes(self) -> int:
        return self.data.numel()

    @property
    def bits_per_weight(self) -> float:
        return self.format.bits_per_weight

    def __repr__(self) -> str:
        sizes = " x ".join(map(str, self.shape))
        return (
            f"QuantizedTensor({sizes}, {self.format.name}, {self.bits_per_weight:.4g} bpw, {self.nbytes} bytes, "
            f"from {str(self.dtype).removeprefix('torch.')}, {self.data.device})"
        )

    # ---- MLX ---------------------------------------------------------------------------------------------------------

    def to_mlx(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three tensors that MLX keeps for an affine weight; bit patterns do not change.

        Returns:
            weight uint32 `[..., N, K * bits / 32]`, scales and biases f16 or bf16 `[..., N, K / group]`.

        Raises:
            ValueError: not an AFQ format.
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
            ValueError: shapes or types that do not fit together, or a group size without a format.
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
        """The three tensors that the hqq package keeps for a weight quantized with axis 1.

        Returns:
            W_q uint8, scale f16 `[groups, 1]`, zero f16 `[groups, 1]`; a group is a run of values in a row. W_q is
            `[groups, group]` for 8 bits and `[groups / 2, group]` for 4: first half of the groups high nibble, second half low.

        Raises:
            ValueError: not an HQQ format, or 4 bits and an odd number of groups.
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
            W_q: uint8, packed as the package does; its bits follow from the shapes.
            scale, zero: float, one value per group. They are stored as f16, which is exact for the package's default.
            shape: shape of the weight, `[N, K]`.
            dtype: dtype that the weight decodes to by default.

        Raises:
            ValueError: shapes that do not fit together, another axis, or values that f16 cannot hold.
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
        fmt: name of a format, or a number of bits for the format that suits the weight's device. AFQ formats take the
            16-bit type of their scales from the weight.
        importance: float `[K]`, or `[..., K]` with a vector per matrix: how much the error in each column matters. Formats
            without such a search ignore it, and so do AFQ and HQQ without rule="search".
        rule: alternative rule of the format's quantizer: "search" for AFQ and HQQ, "mlx" for AFQ.

    Returns:
        The packed weight.

    Raises:
        ValueError: unknown format or rule, a shape that the format does not fit, values that are not finite.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"quantize: weight must be a torch.Tensor, got {type(weight).__name__}.")
    chosen = resolve_format(fmt, weight.device).for_dtype(weight.dtype)
    return QuantizedTensor(ops.quantize(weight, chosen.name, importance, rule), chosen, weight.shape, weight.dtype)
