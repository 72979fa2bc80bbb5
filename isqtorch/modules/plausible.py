"""Check that packed bytes belong to the format that they are loaded as.

The name of the format travels beside the bytes: in the metadata of a state dict, or in config.json. It can be lost or
wrong, and several formats have the same size. So a sample of each weight's blocks is shown to the format
(`QuantFormat.fault`). Files may be mapped into memory, so only a few pages are read.
"""

from __future__ import annotations

import os
import threading
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isqtorch.formats import QuantFormat

SWITCH = "ISQTORCH_CHECK_WEIGHTS"
"""Environment variable; "0" skips the check."""

_RUNS = 8
_BYTES_OF_A_RUN = 2304  # so that a run touches one page or two of a mapped file
_BLOCKS_OF_A_RUN = 64  # at most

_state = threading.local()


def weight_fault(packed: Tensor, fmt: QuantFormat) -> str | None:
    """Say why a packed weight cannot be in format `fmt`, or return None if it can or the check is switched off.

    Args:
        packed: uint8 `[..., row_bytes]`, on any device. A weight on meta or of another size is not judged.
        fmt: the format.
    """
    packed = getattr(packed, "_local_tensor", packed)  # the shard of a DTensor
    if os.environ.get(SWITCH) == "0" or packed.device.type == "meta" or packed.dtype != torch.uint8:
        return None
    if packed.dim() < 2 or packed.numel() == 0 or packed.shape[-1] % fmt.block_bytes:
        return None
    return fmt.fault(_sample(packed.detach(), fmt))


def _sample(packed: Tensor, fmt: QuantFormat) -> Tensor:
    """Runs of blocks, spread evenly over the weight: uint8 `[n, block_bytes]`, on the CPU."""
    if not packed.is_contiguous():
        packed = packed[:: max(1, len(packed) // _RUNS)].contiguous()
    blocks = packed.view(-1, fmt.block_bytes)
    step, length = len(blocks) // _RUNS, min(_BYTES_OF_A_RUN // fmt.block_bytes, _BLOCKS_OF_A_RUN)
    if step > length:
        blocks = blocks[: step * _RUNS].view(_RUNS, step, fmt.block_bytes)[:, :length]
    if blocks.device.type != "cpu":
        return blocks.reshape(-1, fmt.block_bytes).cpu()
    # numpy, for torch copies with all its threads, which takes longer
    return torch.from_numpy(np.ascontiguousarray(blocks.numpy()).reshape(-1, fmt.block_bytes))


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
