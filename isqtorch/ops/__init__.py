"""The operators: quantize, dequantize, linear, embedding.

Importing this package registers them as `torch.ops.isqtorch.*`. `reference` is their definition in plain PyTorch.
"""

from . import schema
from .native import CpuInfo, cpu_info, set_cpu_isa

__all__ = ["CpuInfo", "cpu_info", "set_cpu_isa"]

del schema  # imported for what it registers
