"""From the `quantization_config` of a checkpoint to the method that reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .base import StoredMethod
from .bitsandbytes import BitsAndBytes
from .compressed import CompressedTensors
from .float4 import Mxfp4
from .float8 import Fp8
from .half_quadratic import Hqq
from .modelopt import ModelOpt
from .packed_integers import Awq, Gptq
from .torchao import TorchAo

Entry = Mapping[str, Any]
"""The `quantization_config` in config.json."""


def method_of(entry: Entry) -> StoredMethod:
    """The method of a checkpoint.

    Args:
        entry: the `quantization_config` in its config.json.

    Raises:
        NotImplementedError: the method, or the way in which it is used, is not read here.
        ValueError: the entry is not valid.
    """
    named = entry.get("quant_method")
    name = str(getattr(named, "value", named))
    if named is None and (entry.get("load_in_4bit") or entry.get("load_in_8bit")):
        name = "bitsandbytes"  # its first checkpoints do not name it
    elif named is None:
        raise ValueError(
            "the quantization_config of the checkpoint has no quant_method, so it does not say what reads it"
        )
    reader = _READERS.get(name)
    if reader is None:
        raise NotImplementedError(
            f"the checkpoint is quantized by {name[:80]!r}, which is not read here. Known methods are {', '.join(_READERS)}. Use a "
            "checkpoint of floats, or one of these methods."
        )
    return reader(entry)


def _fp8(entry: Entry) -> StoredMethod:
    return Fp8(str(entry["quant_method"]), _block(entry))


def _auto_round(entry: Entry) -> StoredMethod:
    """AutoRound writes the tensors of GPTQ or AWQ."""
    packing = str(entry.get("packing_format") or "")
    kinds: dict[str, Callable[[Entry], StoredMethod]] = {"auto_round:auto_gptq": Gptq, "auto_round:auto_awq": Awq}
    if packing not in kinds:
        raise NotImplementedError(
            f"an AutoRound checkpoint in the packing {packing[:80]!r} is not read, only {' and '.join(kinds)}"
        )
    return kinds[packing](entry)


def _block(entry: Entry) -> tuple[int, int] | None:
    """Rows and columns of a block; None if the entry names none."""
    block = entry.get("weight_block_size")
    if block is None:
        return None
    if not isinstance(block, (list, tuple)) or len(block) != 2 or any(type(n) is not int or n < 1 for n in block):
        raise ValueError(f"quantization_config: weight_block_size is {block!r:.80}, must be two positive numbers")
    return block[0], block[1]


_READERS: dict[str, Callable[[Entry], StoredMethod]] = {
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "mxfp8": _fp8,
    "mxfp4": lambda entry: Mxfp4(),
    "compressed-tensors": CompressedTensors,
    "gptq": Gptq,
    "awq": Awq,
    "bitsandbytes": lambda entry: BitsAndBytes(),
    "hqq": lambda entry: Hqq(),
    "modelopt": ModelOpt,
    "torchao": lambda entry: TorchAo(),
    "auto-round": _auto_round,
    "intel/auto-round": _auto_round,
}
