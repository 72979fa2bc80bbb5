"""From the `quantization_config` of a checkpoint to the method that reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

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
    method = METHODS.get(name)
    if method is None:
        raise NotImplementedError(
            f"the checkpoint is quantized by {name[:80]!r}, which is not read here. Known methods are {', '.join(METHODS)}. Use a "
            "checkpoint of floats, or one of these methods."
        )
    return method.reader(entry)


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


class Method(NamedTuple):
    """A value of `quant_method` that is read.

    Attributes:
        reader: makes the method of an entry.
        reads: what of it is read, for the documentation.
        held: the formats that hold it exactly, for the documentation.
    """

    reader: Callable[[Entry], StoredMethod]
    reads: str
    held: str


_FP8 = Method(
    _fp8,
    "FP8 with one scale, a scale for each row, or blocks of any size, also ragged ones",
    "`fp8`, if 128 divides the columns and 128 columns of a row share a scale",
)
_AUTO_ROUND = Method(_auto_round, "`auto_round:auto_gptq`, `auto_round:auto_awq`", "as GPTQ and AWQ")
METHODS = {
    "fp8": _FP8,
    "fbgemm_fp8": _FP8,
    "mxfp8": _FP8,
    "mxfp4": Method(lambda entry: Mxfp4(), "the experts of gpt-oss", "`mxfp4`"),
    "compressed-tensors": Method(
        CompressedTensors,
        "`pack-quantized`, `int-quantized`, `float-quantized`, `naive-quantized`, `mxfp4-`, `mxfp8-` and `nvfp4-`",
        "`hqq4`, `hqq8`, `fp8`, `mxfp4`; NVFP4 and MXFP8 are packed anew",
    ),
    "gptq": Method(
        Gptq,
        "2, 3, 4 and 8 bits, also act-order; `gptq` and `gptq_v2`",
        "`hqq4`, `hqq8`; act-order is packed anew",
    ),
    "awq": Method(Awq, "`gemm`", "`hqq4`"),
    "hqq": Method(lambda entry: Hqq(), "1 to 8 bits, both axes", "`hqq4`, `hqq8`; axis 0 is packed anew"),
    "bitsandbytes": Method(
        lambda entry: BitsAndBytes(), "nf4, fp4, int8, also with double quantization", "packed anew"
    ),
    "modelopt": Method(ModelOpt, "FP8, NVFP4", "`fp8`; NVFP4 is packed anew"),
    "torchao": Method(
        lambda entry: TorchAo(),
        "safetensors with a byte for each code: `Float8Tensor`, `Int8Tensor`, `IntxUnpackedToInt8Tensor`",
        "`fp8`, `hqq8`",
    ),
    "auto-round": _AUTO_ROUND,
    "intel/auto-round": _AUTO_ROUND,
}
"""All methods, by `quant_method`, in the order of the documentation."""
