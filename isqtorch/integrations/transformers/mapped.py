"""The loader's operation that packs one weight, and the release of the checkpoint's memory pages afterwards.

On Linux, transformers maps safetensors files into memory, and every tensor it loads is a view of the file. Pages that
were read stay resident (the kernel can reclaim them, but they count as memory of the process), and one view keeps a
whole file mapped. So the pages of a weight are dropped once it is packed, and tensors that stay float are copied out of
the mapping.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps

from isqtorch.files.binary import open_regular
from isqtorch.modules.plausible import Place

_TRIM_EVERY = 8 << 20  # bytes that are consumed
_MADV_DONTNEED = 4  # drop the pages from this process; reading them again reads the file
_library = ctypes.CDLL(None) if sys.platform == "linux" else None
_madvise = None if _library is None else _library.madvise
_trim = getattr(_library, "malloc_trim", None)  # glibc has it


class Pack(ConversionOps):  # type: ignore[misc]  # transformers is not typed
    """The loader's conversion: takes a float weight and returns the packed weight under the same name."""

    def __init__(self, pack: Callable[[Any, str, Any], Tensor]) -> None:
        self._pack = pack

    def convert(self, input_dict: dict[str, Any], model: Any = None, **_: Any) -> dict[str, Tensor]:
        model = getattr(model, "real", model)  # see AsFloat
        return {
            name: self._pack(model, name, value[0] if isinstance(value, list) else value)
            for name, value in input_dict.items()
        }

    @property
    def reverse_op(self) -> Keep:
        return Keep()


class Keep(ConversionOps):  # type: ignore[misc]  # transformers is not typed
    """The reverse conversion, for saving: packed weights are written as they are."""

    def convert(self, input_dict: dict[str, Any], **_: Any) -> dict[str, Any]:
        return input_dict

    @property
    def reverse_op(self) -> Keep:
        return self


class _Range(NamedTuple):
    """Addresses that a part of a file is mapped to."""

    low: int
    high: int
    offset: int  # of the first byte, in the file
    inode: int
    path: str


class MappedFiles:
    """The memory that some safetensors files are mapped to. Does nothing on other systems than Linux."""

    def __init__(self, files: Iterable[str]) -> None:
        self._paths = {os.path.realpath(file) for file in files if file.endswith(".safetensors")}
        self._ranges: list[_Range] | None = None
        self._opened: dict[str, int | None] = {}  # path -> descriptor; None if another file has the path now
        self._consumed = 0  # bytes since memory was given back

    def holds(self, tensor: Tensor) -> bool:
        """Whether the tensor is a view of one of the files. All files must be mapped before the first call."""
        return self._range(tensor) is not None

    def place(self, tensor: Tensor) -> Place | None:
        """Where a tensor lies in the file that it is a view of, to read a part without mapping its pages.

        None if it is no view of one of the files or not contiguous, or if the file was replaced. The descriptor is valid
        until `close`.
        """
        found = self._range(tensor)
        if found is None or not tensor.is_contiguous():
            return None
        if found.path not in self._opened:
            self._opened[found.path] = _opened(found)
        descriptor = self._opened[found.path]
        return (
            None if descriptor is None else Place(found.path, descriptor, found.offset + tensor.data_ptr() - found.low)
        )

    def close(self) -> None:
        """Close the files that `place` has opened."""
        while self._opened:
            _, descriptor = self._opened.popitem()
            if descriptor is not None:
                os.close(descriptor)

    def drop(self, tensor: Tensor) -> None:
        """Drop the pages of a contiguous tensor that is a view of a file. The tensor must not have been written to."""
        if _madvise is None or not self.holds(tensor):
            return
        start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages only: others hold neighbours too
        stop = stop // mmap.PAGESIZE * mmap.PAGESIZE
        if stop > start:
            _madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _MADV_DONTNEED)

    def consume(self, tensor: Tensor) -> None:
        """Drop the pages of a tensor from which something was computed, and at times give back freed memory.

        What is computed takes many times more than the tensor. Packed weights that stay are allocated between such
        blocks, and the C library keeps the holes: without this, half of the model's size.
        """
        self.drop(tensor)
        self._consumed += tensor.nbytes
        if self._consumed > _TRIM_EVERY:
            self._consumed = 0
            if _trim is not None:
                _trim(ctypes.c_size_t(0))

    def release(self, model: nn.Module) -> None:
        """At the end of a load, copy all tensors that are still views of the files, so that these can be unmapped."""
        self._ranges = None  # read again: some files are unmapped by now, and their addresses may be reused
        for tensor in [*model.parameters(), *model.buffers()]:
            if self.holds(tensor):
                view, tensor.data = tensor.data, tensor.data.clone()
                self.drop(view)

    def _range(self, tensor: Tensor) -> _Range | None:
        if tensor.device.type != "cpu" or type(tensor) not in (Tensor, nn.Parameter):
            return None
        if self._ranges is None:
            self._ranges = self._read_ranges()
        start = tensor.data_ptr()
        return next((found for found in self._ranges if found.low <= start < found.high), None)

    def _read_ranges(self) -> list[_Range]:
        if sys.platform != "linux" or not self._paths:
            return []
        ranges = []
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
            for line in file:
                start = line.find("/")  # of the path, which comes last
                if start > 0 and line[start:-1] in self._paths:
                    addresses, _, offset, _, inode = line[:start].split()
                    low, _, high = addresses.partition("-")
                    ranges.append(_Range(int(low, 16), int(high, 16), int(offset, 16), int(inode), line[start:-1]))
        return ranges


def _opened(mapped: _Range) -> int | None:
    """A descriptor of the file that is mapped; None if another file has its path now."""
    with suppress(OSError, ValueError), open_regular(mapped.path) as file:
        if os.fstat(file.fileno()).st_ino == mapped.inode:
            return os.dup(file.fileno())
    return None
