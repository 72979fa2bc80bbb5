"""Check that packed bytes belong to the format that they are loaded as.

The name of the format travels beside the bytes: in the metadata of a state dict, or in config.json. It can be lost or
wrong, and several formats have the same size. So a sample of each weight's blocks is shown to the format
(`QuantFormat.fault`). Files may be mapped into memory, so only a few pages are read.
"""

from __future__ import annotations

import os
import threading
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from isqtorch.formats import QuantFormat

from .parameter import plain_bytes

SWITCH = "ISQTORCH_CHECK_WEIGHTS"
"""Environment variable; "0" skips the check."""

_RUNS = 8
_BYTES_OF_A_RUN = 2304  # so that a run touches one page or two of a mapped file
_BLOCKS_OF_A_RUN = 64  # at most

_state = threading.local()


class Place(NamedTuple):
    """Where the bytes of a contiguous weight lie in an open file."""

    path: str
    descriptor: int
    start: int  # position of the first byte


def weight_fault(packed: Tensor, fmt: QuantFormat, place: Place | None = None) -> str | None:
    """Say why a packed weight cannot be in format `fmt`, or return None if it can or the check is switched off.

    Args:
        packed: uint8 `[..., row_bytes]`, on any device. A weight on meta or of another size is not judged.
        fmt: the format.
        place: where the weight lies in the file that it is mapped from. The sample is then read from there, which takes
            less time and memory than mapping its pages.

    Raises:
        OSError: the file cannot be read, or became shorter.
    """
    packed = plain_bytes(
        getattr(packed, "_local_tensor", packed)
    )  # the shard of a DTensor; a packed parameter's memory
    if os.environ.get(SWITCH) == "0" or packed.device.type == "meta" or packed.dtype != torch.uint8:
        return None
    if packed.dim() < 2 or packed.numel() == 0 or packed.shape[-1] % fmt.block_bytes:
        return None
    return fmt.fault(_sample(packed.detach(), fmt, place))


def _sample(packed: Tensor, fmt: QuantFormat, place: Place | None) -> Tensor:
    """Runs of blocks, spread evenly over the weight: uint8 `[n, block_bytes]`, on the CPU."""
    if not packed.is_contiguous():
        packed = packed[:: max(1, len(packed) // _RUNS)].contiguous()
    size = fmt.block_bytes
    count = packed.numel() // size
    step, length = count // _RUNS, min(_BYTES_OF_A_RUN // size, _BLOCKS_OF_A_RUN)
    runs, length = (_RUNS, length) if step > length else (1, count)
    if place is not None:
        starts = [place.start + i * step * size for i in range(runs)]
        read = bytearray().join([os.pread(place.descriptor, length * size, start) for start in starts])
        if len(read) != runs * length * size:
            raise OSError(f"{place.path}: became shorter while it was read")
        return torch.from_numpy(np.frombuffer(read, np.uint8).reshape(-1, size))
    blocks = packed.as_strided((runs, length * size), (step * size, 1))
    if blocks.device.type != "cpu":
        return blocks.reshape(-1, size).cpu()
    # numpy, for torch copies with all its threads, which takes longer
    return torch.from_numpy(np.ascontiguousarray(blocks.numpy()).reshape(-1, size))


def unknown_fault(key: str, incoming: Any, fmt: QuantFormat, call: list[str]) -> str | None:
    """Judge an entry of a state dict that does not say its format. Return the error, or warn once per call.

    Args:
        key: name of the entry.
        incoming: its value.
        fmt: the format of the layer that it is loaded into.
        call: torch's list of errors. It is the same object for all layers of one `load_state_dict`.
    """
    if not isinstance(incoming, Tensor):
        return None
    why = weight_fault(incoming, fmt)
    if why is not None:
        return (
            f"{key}: this layer is {fmt.name}, and the state dict, which has lost its metadata, seems to hold another format: read as "
            f"{fmt.name}, {why}. Quantize with the format of the saved model first. {SWITCH}=0 in the environment skips this check."
        )
    if getattr(_state, "warned", None) is not call:
        _state.warned = call
        warnings.warn(
            "load_state_dict: this state dict has lost its metadata (a file or a rebuilt dict does not keep it), so it does not say in "
            "which formats its packed weights are. They are read in the formats of the layers. Formats of one size cannot always be "
            "told apart: if the saved model had others, the output is wrong. isqtorch.checkpoint and save_pretrained keep the formats.",
            stacklevel=2,
        )
    return None
