"""The checkpoint of a model: reads its tensors one by one, by the names of the model's parameters.

The checkpoint of a plain module has the names of the state dict. A library whose loader renames, joins or transposes
tensors has its own Source (see `host.py`), which does the same to the tensors read here.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from isqtorch.files.checkpoints import checkpoint_files, gguf_in, read_json
from isqtorch.files.tensors import TensorStore
from isqtorch.formats import QuantFormat
from isqtorch.modules import PackedModule
from isqtorch.modules.convert import float_shape
from isqtorch.modules.parameter import is_plain

if TYPE_CHECKING:
    from .stored import QuantizedFiles

FLOATS = ("F64", "F32", "F16", "BF16")
_WHOLE = 1 << 16  # elements: matrices up to this size are compared whole
_ROWS = 16  # compared of larger ones
_MAPPED = 1 << 24  # bytes of tensors, after which the files are closed: the system may map megabytes around each row
_PACKED = 8  # packed layers that are compared, spread over the model
_ALIKE = 0.3  # correlation; with 2 bits it is above 0.9, with another model's weights about 0
_OURS = "isq"  # quant_method of a model that isqtorch has packed
_ELSE = "Give source=..., the original model's folder or .safetensors file, or source='stored' to start from the quantized weights"


class Source(ABC):
    """A checkpoint that gives the float weights of a model, by the names of the model's parameters.

    Attributes:
        where: the folder or file, for messages.
        note: what the report says about these weights, if they are not the original ones.
    """

    where: str
    note: str = ""

    @abstractmethod
    def read(self, name: str) -> Tensor | None:
        """A parameter as it was loaded, in the type of the checkpoint, on the CPU; None if it is not there.

        The result may be a view of a mapped file: do not write to it.

        Raises:
            ValueError: the tensor is not of a float type, or the file was changed after it was opened.
        """

    @abstractmethod
    def sample(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """Some rows of a tensor, see `sampled`; None if its shape differs or reading them takes as long as all of it."""

    @abstractmethod
    def release(self) -> None:
        """Give back the memory of what was read."""

    def exact(self, name: str, turned: bool = False) -> tuple[QuantFormat, ...]:
        """The formats in which `packed` gives a parameter; none for floats.

        Args:
            name: the parameter.
            turned: whether the model stores the weight with the output features last.
        """
        return ()

    def packed(self, name: str, fmt: QuantFormat) -> Tensor | None:
        """The packed rows of a parameter, if the checkpoint has them in this format already; else None."""
        return None


class TensorFiles(Source):
    """The float tensors of some safetensors files. Weights that another program has quantized are decoded.

    Attributes:
        where: the folder or file, for messages.
        tensors: {name: the tensor in the files}; a quantized weight has the name that it has in a checkpoint of floats.
        quantized: reads the quantized weights; None if the checkpoint has floats.

    Raises:
        ValueError: a file is damaged, a tensor is in two files, or the files hold packed weights.
        OSError: a file is missing or cannot be read.
    """

    def __init__(self, files: Sequence[str | os.PathLike[str]]) -> None:
        paths = [Path(file) for file in files]
        self.where = str(paths[0].parent if len(paths) > 1 or paths[0].name == "model.safetensors" else paths[0])
        self._store = TensorStore(paths, _ELSE)
        self.tensors = self._store.tensors
        self.quantized: QuantizedFiles | None = None
        entry = quantization_of(paths[0].parent)
        method = None if entry is None else str(entry.get("quant_method"))
        ours = "isqtorch" if "isqtorch" in self._store.metadata else method
        if ours in ("isqtorch", _OURS):
            raise ValueError(f"{self.where}: is quantized by {ours} itself. {_ELSE}.")
        if entry is not None:
            try:
                from .stored import QuantizedFiles  # the methods take a while to import, and few checkpoints need them

                self.quantized = QuantizedFiles(self._store, entry)
            except (ValueError, NotImplementedError) as error:
                raise ValueError(
                    f"{self.where}: is quantized by {method} itself, and cannot be decoded: {error} {_ELSE}."
                ) from None
            self.tensors = self.quantized.tensors()

    def read(self, name: str) -> Tensor | None:
        return self.tensor(name) if name in self.tensors else None

    def exact(self, name: str, turned: bool = False) -> tuple[QuantFormat, ...]:
        held = [self.quantized.weights.get(key) for key in self._parts(name)] if self.quantized is not None else []
        if not held or self.quantized is None:
            return ()
        shared: tuple[QuantFormat, ...] | None = None
        for weight in held:
            upright = weight is not None and (weight.oriented or not turned)
            formats = weight.kept(self.quantized.files).formats if weight is not None and upright else ()
            shared = formats if shared is None else tuple(fmt for fmt in shared if fmt in formats)
        return shared or ()

    def packed(self, name: str, fmt: QuantFormat) -> Tensor | None:
        return self.blocks(self._parts(name)[0], fmt) if fmt in self.exact(name) else None

    def blocks(self, key: str, fmt: QuantFormat) -> Tensor:
        """The packed rows of a quantized weight, by its name in the files, in a format that holds it exactly."""
        assert self.quantized is not None, "only quantized weights have blocks"
        return self.quantized.blocks(self.quantized.weights[key], fmt)

    def _parts(self, name: str) -> list[str]:
        """Names of the tensors whose rows are joined to a parameter; none if it is made of them in another way."""
        return [name] if name in self.tensors else []

    def sample(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        key = self._plain(name)
        if key is None or self.tensors[key].shape != shape or self.tensors[key].dtype not in FLOATS:
            return None
        return self.tensor(key)[sampled(shape)]  # a view of the mapped file: only pages of these rows are read

    def _plain(self, name: str) -> str | None:
        """Name of the tensor that is loaded as this parameter without any conversion, or None."""
        return name if name in self.tensors else None

    def tensor(self, key: str) -> Tensor:
        """A tensor by its name in the files."""
        stored = self.tensors[key]
        if self.quantized is not None and key in self.quantized.weights:
            return self.quantized.tensor(self.quantized.weights[key])
        if stored.dtype not in FLOATS:
            raise ValueError(f"{stored.file}: {key} is {stored.dtype}, must be one of {', '.join(FLOATS)}. {_ELSE}.")
        return self._store.read(key)

    def release(self) -> None:
        self._store.release()


def files_in(path: str | os.PathLike[str], op: str = "requantize_") -> tuple[str, ...]:
    """The safetensors files of a folder, else its GGUF file; or the one file that is given.

    Args:
        path: what the user gave.
        op: name of the public function, for messages.

    Raises:
        ValueError: the index file of the folder is not valid, or there are several GGUF files.
        OSError: the path does not exist, or the folder has no safetensors files.
    """
    given = Path(path).expanduser()
    if not given.exists():
        raise FileNotFoundError(f"{op}: source: no folder or file {str(path)!r}")
    if given.is_dir():
        gguf = gguf_in(given)
        files = checkpoint_files(given, f"{op}: source") if gguf is None else [gguf]
    else:
        files = [given]
    return tuple(os.path.abspath(file) for file in files)


def difference(model: nn.Module, source: Source, instead: Mapping[str, Tensor] | None = None) -> str | None:
    """Say which float tensor of the model differs from the checkpoint, and by how much; None if none does.

    It was trained, merged or replaced since, or the checkpoint is another model's. All parameters and saved buffers
    that are not packed are compared, if the checkpoint has them in the same shape: norms, biases and small matrices
    whole, large matrices by rows spread over them. Some packed weights are only required to resemble the checkpoint's,
    which those of another model do not. This takes seconds for any model.

    Args:
        model: the model.
        source: the checkpoint.
        instead: values that are compared in the place of those of some parameters.
    """
    shared: dict[int, list[str]] = {}
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors |= instead or {}
    saved = set(model.state_dict())
    tensors |= {name: buffer for name, buffer in model.named_buffers(remove_duplicate=False) if name in saved}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.device.type != "meta" and type(tensor) in (nn.Parameter, Tensor):
            shared.setdefault(id(tensor), []).append(name)
    mapped = 0
    try:
        for names in shared.values():
            own = tensors[names[0]].detach()
            stored = (source.sample(name, tuple(own.shape)) for name in names)
            found = [_distance(own, rows) for rows in stored if rows is not None]
            if found and all(found):
                return f"{names[0]} (by up to {min(filter(None, found)):.3g})"
            mapped += own.nbytes
            if mapped > _MAPPED:
                source.release()
                mapped = 0
        packed = [(path, module) for path, module in model.named_modules() if isinstance(module, PackedModule)]
        for path, module in packed[:: -(-len(packed) // _PACKED)] if packed else ():
            for leaf, fmt in module.packed.items():
                alike = _likeness(module, leaf, fmt, f"{path}.{leaf}".lstrip("."), source)
                source.release()
                if alike is not None and alike < _ALIKE:
                    return f"{path} (its packed rows have a correlation of {alike:.2f} with the rows there)"
    finally:
        source.release()
    return None


@cache
def sampled(shape: tuple[int, ...]) -> Any:
    """The index of the part of a tensor that `difference` compares: all of it, or 16 rows, from the first to the last.

    The length of a row does not count, so the index also finds these rows in packed form. It is made of numpy arrays,
    for torch would make tensors on its default device.
    """
    if math.prod(shape) <= _WHOLE or len(shape) < 2:
        return ...
    rows = math.prod(shape[:-1])
    chosen = np.linspace(0, rows - 1, min(rows, _ROWS)).round().astype(np.int64)
    return np.unravel_index(chosen, shape[:-1])


def _likeness(module: PackedModule, leaf: str, fmt: str, name: str, source: Source) -> float | None:
    """The correlation of packed rows, decoded, with the rows of the checkpoint; None if they cannot be compared."""
    weight = module._parameters[leaf]
    if weight is None or not is_plain(weight) or weight.device.type == "meta" or module.is_turned():
        return None
    shape = float_shape(module, leaf)
    stored = source.sample(name, shape)
    if stored is None:
        return None
    rows = weight.detach()[sampled(shape)].to("cpu").reshape(-1, weight.shape[-1])
    mine = torch.ops.isqtorch.dequantize(rows, fmt, torch.float32).double().reshape(-1)
    theirs = stored.to("cpu", torch.float64).reshape(-1)
    product, mine_squared, theirs_squared = (float(x) for x in (mine @ theirs, mine @ mine, theirs @ theirs))
    scale = math.sqrt(mine_squared * theirs_squared)
    return product / scale if 0 < scale < math.inf else None  # all zeros are like anything


def _distance(own: Tensor, stored: Tensor) -> float:
    """The largest absolute difference of the rows; 0 if they agree bit for bit in the type of the model."""
    part = own[sampled(tuple(own.shape))]
    mine, theirs = (each.to("cpu", own.dtype).reshape(-1).contiguous() for each in (part, stored))
    if np.array_equal(mine.view(torch.uint8).numpy(), theirs.view(torch.uint8).numpy()):
        return 0.0
    apart = (mine.double() - theirs.double()).abs().max().item()
    return math.inf if math.isnan(apart) else apart or math.ulp(0.0)  # 0 and -0 are different bits


def quantization_of(folder: Path) -> dict[str, Any] | None:
    """The `quantization_config` in the config.json of a folder, or None."""
    config = folder / "config.json"
    content = read_json(config) if config.exists() else {}
    for part in (content, content.get("text_config")):
        entry = part.get("quantization_config") if isinstance(part, dict) else None
        if isinstance(entry, dict):
            return entry
    return None
