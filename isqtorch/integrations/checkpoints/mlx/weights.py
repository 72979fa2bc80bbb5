"""The weights in the files of an MLX folder: float tensors, and quantized modules of two or three tensors.

An affine module has `weight` (uint32 `[.., N, K * bits / 32]`), `scales` and `biases` (`[.., N, K / group]`). The other
modes have no biases, and scales of one byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isqtorch.files.tensors import Stored, TensorStore
from isqtorch.formats import QuantFormat, formats, get_format, repacked_as
from isqtorch.formats.affine import AffineFormat
from isqtorch.formats.bitstream import unpack_stream
from isqtorch.formats.codebook import mxfp4_blocks
from isqtorch.inplace.source import FLOATS
from isqtorch.tensor import QuantizedTensor
from isqtorch.text import first_names

from .settings import MODES, Setting, Settings

_SCALES = {"BF16": torch.bfloat16, "F16": torch.float16}
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Module:
    """One weight in the files.

    Attributes:
        key: the name of the tensor `weight`, or of the tensor if it is none.
        setting: how it is quantized; None: it is float.
        shape: the shape of the decoded weight.
        fmt: the format that has room for its codes, scales and biases; None: there is none, or it is float.
        instead: the format in which to pack the decoded values, if it is quantized and there is no `fmt`.
        note: what the file has, if that is not exactly `fmt`.
    """

    key: str
    setting: Setting | None
    shape: tuple[int, ...]
    fmt: QuantFormat | None = None
    instead: QuantFormat | None = None
    note: str = ""

    @property
    def path(self) -> str:
        return self.key.removesuffix(".weight")


class MlxWeights:
    """All weights of a folder.

    Attributes:
        where: the folder.
        keys: the names of all weights, without those of scales and biases.
    """

    def __init__(self, where: str, files: list[Path], settings: Settings) -> None:
        """Read the headers.

        Raises:
            ValueError: a module lacks scales or biases, or has ones of a wrong type or shape; config.json has an entry
                for a module that is not quantized in the files.
            OSError: a file is missing or cannot be read.
        """
        self.where, self._settings = where, settings
        self._store = TensorStore(files)
        tensors = self._store.tensors
        quantized = {key.removesuffix(".scales") for key in tensors if key.endswith(".scales")}
        quantized = {path for path in quantized if f"{path}.weight" in tensors}
        parts = {f"{path}.{leaf}" for path in quantized for leaf in ("scales", "biases", "global_scale")}
        self.keys = sorted(set(tensors) - parts)
        self._quantized = quantized
        wrong = sorted(path for path, setting in settings.own.items() if setting and path not in quantized)
        if wrong:
            raise ValueError(
                f"{where}: config.json says that {first_names(wrong)} is quantized, and the files have no such module with scales"
            )
        packed = [
            key for key in self.keys if tensors[key].dtype == "U32" and key.removesuffix(".weight") not in quantized
        ]
        if packed:
            raise ValueError(
                f"{where}: {packed[0]} is quantized (uint32), and {_sibling(packed[0], 'scales')} is missing"
            )
        for path in sorted(quantized):
            if settings.own.get(path, settings.default) is None:
                raise ValueError(
                    f"{where}: {path} has scales, so it is quantized, and config.json does not say how ('quantization')"
                )
            self._check(path)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor in the files, or of its codes if it is quantized."""
        return self._store.tensors[key].shape

    def elements(self) -> int:
        """How many numbers the files have, or more: a word is counted as 32 codes of one bit."""
        tensors = self._store.tensors.values()
        return sum(prod(stored.shape) * (32 if stored.dtype == "U32" else 1) for stored in tensors)

    def largest(self) -> int:
        """The largest dimension of a tensor, with words counted as codes of one bit."""
        shapes = (stored.shape for stored in self._store.tensors.values())
        return 32 * max((size for shape in shapes for size in shape), default=0)

    def is_quantized(self, key: str) -> bool:
        return key.endswith(".weight") and key.removesuffix(".weight") in self._quantized

    def module(self, key: str, columns: int | None) -> Module:
        """A weight of the files.

        Args:
            key: its name.
            columns: its input features in the model. Without an entry of its own in config.json, a module has the bits
                and the group size that its shapes then give, as in mlx-lm. None: not known.

        Raises:
            ValueError: the shapes are of no setting that MLX has, or not of the one in config.json.
        """
        stored = self._store.tensors[key]
        if not self.is_quantized(key):
            return Module(key, None, stored.shape)
        path = key.removesuffix(".weight")
        scales = self._store.tensors[f"{path}.scales"]
        words, groups = stored.shape[-1], scales.shape[-1]
        setting = self._settings.own.get(path)
        if setting is None:
            setting = self._inferred(path, columns) or self._settings.default
        assert setting is not None, "the constructor has checked it"
        if words * 32 != groups * setting.group * setting.bits or (
            columns is not None and groups * setting.group != columns
        ):
            fitting = "" if columns is None else f", and the layer has {columns} columns"
            raise ValueError(
                f"{self.where}: {path}: {words} words and {groups} scales in a row are not {setting}{fitting}. The files and "
                "config.json do not belong together, or one is damaged."
            )
        if (setting.mode == "affine") != (scales.dtype != "U8"):
            raise ValueError(f"{self.where}: {path}.scales is {scales.dtype}, which {setting.mode} does not have")
        shape = (*stored.shape[:-1], groups * setting.group)
        return self._placed(Module(key, setting, shape), scales)

    def blocks(self, module: Module, fmt: QuantFormat) -> Tensor:
        """The packed rows `[.., N, row_bytes]` of a module that has a format.

        Args:
            module: the module.
            fmt: its format, or an affine one with more bits or smaller groups: it has room for the same codes.

        Raises:
            ValueError: a scale or bias is not finite in the type that the format has for it.
        """
        setting = module.setting
        assert setting is not None, "the caller has asked for the format"
        if setting.mode == "mxfp4":
            words, exponents = (self._store.read(f"{module.path}.{leaf}") for leaf in ("weight", "scales"))
            return mxfp4_blocks(words.contiguous().view(torch.uint8), exponents)
        assert isinstance(fmt, AffineFormat), "the caller has asked for the format"
        weight, scales, biases = (self._store.read(f"{module.path}.{leaf}") for leaf in ("weight", "scales", "biases"))
        if (setting.bits, setting.group, scales.dtype, biases.dtype) == (fmt.bits, fmt.block, *[fmt.scale_dtype] * 2):
            return QuantizedTensor.from_mlx(weight, scales, biases, bits=setting.bits).data
        codes = unpack_stream(_bytes(weight, setting), setting.bits).reshape(-1, fmt.block)
        fields = {"q": codes}
        for field, values in (("scale", scales), ("bias", biases)):
            stored = values.to(fmt.scale_dtype)
            if not stored.isfinite().all():
                raise ValueError(f"{self.where}: {module.path}: a {field} is not finite in {fmt.scale_dtype}")
            fields[field] = stored.reshape(-1).repeat_interleave(setting.group // fmt.block)
        return fmt.pack(fields).view(*module.shape[:-1], fmt.row_bytes(module.shape[-1]))

    def decode(self, module: Module) -> Tensor:
        """The float values `[.., N, K]`; in f32 if the module is quantized."""
        if module.setting is None:
            dtype = self._store.tensors[module.key].dtype
            if dtype not in FLOATS:
                raise ValueError(f"{self.where}: {module.key} is {dtype}, must be one of {', '.join(FLOATS)}")
            return self._store.read(module.key)
        if module.fmt is not None and not module.note:
            packed = self.blocks(module, module.fmt)
            decoded: Tensor = torch.ops.isqtorch.dequantize(packed, module.fmt.name, torch.float32)
            return decoded
        return self._decode(module, module.setting)

    def sample(self, key: str, index: Any) -> Tensor | None:
        """A part of a float tensor; None if it is not float."""
        if self._store.tensors[key].dtype not in FLOATS:
            return None
        return self._store.read(key)[index]

    def release(self) -> None:
        """Give back the memory of what was read."""
        self._store.release()

    # ---- checks of the headers ---------------------------------------------------------------------------------------

    def _check(self, path: str) -> None:
        """ValueError if the tensors of a quantized module do not fit together."""
        weight, scales = (self._store.tensors[f"{path}.{leaf}"] for leaf in ("weight", "scales"))
        if weight.dtype != "U32" or len(weight.shape) < 2 or 0 in weight.shape:
            raise ValueError(f"{self.where}: {path}.weight must be uint32 [.., N, words], got {_text(weight)}")
        if scales.shape[:-1] != weight.shape[:-1] or 0 in scales.shape:
            raise ValueError(
                f"{self.where}: {path}.scales is {_text(scales)}, which does not fit weight {_text(weight)}"
            )
        if scales.dtype not in (*FLOATS, "U8"):
            raise ValueError(f"{self.where}: {path}.scales must be of a float type or uint8, got {scales.dtype}")
        whole = self._store.tensors.get(f"{path}.global_scale")
        if whole is not None and (whole.dtype not in FLOATS or whole.shape not in ((), (1,), weight.shape[:-2])):
            raise ValueError(
                f"{self.where}: {path}.global_scale is {_text(whole)}, which does not fit weight {_text(weight)}"
            )
        biases = self._store.tensors.get(f"{path}.biases")
        if scales.dtype == "U8":
            return
        if biases is None:
            raise ValueError(
                f"{self.where}: {path}.biases is missing, and {path} is affine, as its scales are {scales.dtype}"
            )
        if biases.dtype not in FLOATS or biases.shape != scales.shape:
            raise ValueError(
                f"{self.where}: {path}.biases is {_text(biases)}, which does not fit scales {_text(scales)}"
            )

    def _inferred(self, path: str, columns: int | None) -> Setting | None:
        """The setting that the shapes of a module give; None if the columns are not known or it is none of MLX."""
        words = self._store.tensors[f"{path}.weight"].shape[-1]
        scales = self._store.tensors[f"{path}.scales"]
        if not columns or columns % scales.shape[-1] or 32 * words % columns:
            return None
        bits, group = 32 * words // columns, columns // scales.shape[-1]
        modes = ("mxfp4", "nvfp4", "mxfp8") if scales.dtype == "U8" else ("affine",)
        found = [mode for mode in modes if bits in MODES[mode][0] and group in MODES[mode][1]]
        return Setting(found[0], bits, group) if found else None

    def _placed(self, module: Module, scales: Stored) -> Module:
        """The module with the format that has its blocks, or with the one to use instead."""
        setting = module.setting
        assert setting is not None
        if setting.mode == "mxfp4":
            return replace(module, fmt=get_format("mxfp4"))
        if setting.mode != "affine":
            instead = repacked_as(setting.bits)
            note = f"{setting} in the file, which is no format here; packed anew as {instead.name}"
            return replace(module, instead=instead, note=note)
        biases = self._store.tensors[f"{module.path}.biases"]
        same = scales.dtype == biases.dtype and scales.dtype in _SCALES
        kind = _SCALES[scales.dtype] if same else torch.float16
        wider = (affine_format(bits, setting.group, kind) for bits in range(setting.bits, 9))
        fmt = next(fmt for fmt in wider if fmt is not None)
        notes = (
            []
            if same
            else [f"its scales are {scales.dtype} and its biases {biases.dtype} in the file, which blocks round to F16"]
        )
        if fmt.bits != setting.bits:
            notes.append(f"{setting.bits}-bit codes in the file, kept as {fmt.bits}-bit codes")
        return replace(module, fmt=fmt, note="; ".join(notes))

    # ---- decoding without a format -----------------------------------------------------------------------------------

    def _decode(self, module: Module, setting: Setting) -> Tensor:
        words, scales = (self._store.read(f"{module.path}.{leaf}") for leaf in ("weight", "scales"))
        rows = (*module.shape[:-1], -1, setting.group)
        if setting.mode == "affine":
            biases = self._store.read(f"{module.path}.biases")
            codes = unpack_stream(_bytes(words, setting), setting.bits).view(rows)
            return (codes.float() * scales.float()[..., None] + biases.float()[..., None]).view(module.shape)
        codes = _bytes(words, setting)
        if setting.mode == "mxfp8":
            values = codes.view(torch.float8_e4m3fn).float()
        else:
            values = torch.tensor([*_E2M1, *(-value for value in _E2M1)])[unpack_stream(codes, 4).long()]
        if setting.mode == "nvfp4":
            factors = scales.view(torch.float8_e4m3fn).float()
            if f"{module.path}.global_scale" in self._store.tensors:
                whole = self._store.read(f"{module.path}.global_scale").float() / (448 * 6)
                factors = factors * whole.view(*whole.shape, *[1] * (factors.dim() - whole.dim()))
        else:
            factors = torch.ldexp(torch.ones(scales.shape), scales.int() - 127)  # MXFP8
        return (values.view(rows) * factors[..., None]).view(module.shape)


def affine_format(bits: int, group: int, scale: torch.dtype) -> AffineFormat | None:
    """The format with such codes, groups and scales, or None."""
    return _affine_formats().get((bits, group, scale))


@cache
def _affine_formats() -> dict[tuple[int, int, torch.dtype], AffineFormat]:
    every = map(get_format, formats(variants=True))
    return {(fmt.bits, fmt.block, fmt.scale_dtype): fmt for fmt in every if isinstance(fmt, AffineFormat)}


def common_format(found: Sequence[AffineFormat]) -> AffineFormat | None:
    """The format that has room for the codes of all these formats: with the most bits and the smallest groups."""
    kinds = {fmt.scale_dtype for fmt in found}
    if len(kinds) > 1:
        return None  # a bf16 number may not be one of f16, nor an f16 number one of bf16
    return affine_format(max(fmt.bits for fmt in found), min(fmt.block for fmt in found), kinds.pop())


def _bytes(words: Tensor, setting: Setting) -> Tensor:
    """The codes as bytes, one group in a row."""
    return words.contiguous().view(torch.uint8).reshape(-1, setting.group * setting.bits // 8)


def _sibling(key: str, leaf: str) -> str:
    return f"{key.removesuffix('.weight')}.{leaf}"


def _text(stored: Stored) -> str:
    return f"{stored.dtype} {list(stored.shape)}"
