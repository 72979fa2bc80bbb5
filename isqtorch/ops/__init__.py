"""The operators: quantize, quantize_feedback, dequantize, linear, embedding, experts_linear, attention, square_sums.

Importing this package registers them as `torch.ops.isqtorch.*`, with the native kernels of this installation; the names
here are those operators. `reference` defines them in plain PyTorch.
"""

import torch

from . import metal, schema, steps
from .native import CpuInfo, CudaInfo, LinearKernel, cpu_info, cuda_info, set_cpu_isa

__all__ = [
    "CpuInfo",
    "CudaInfo",
    "LinearKernel",
    "attention",
    "cpu_info",
    "cuda_info",
    "dequantize",
    "embedding",
    "experts_linear",
    "linear",
    "metal",
    "quantize",
    "quantize_feedback",
    "set_cpu_isa",
    "square_sums",
]

del schema, steps  # imported only to register the operators

quantize = torch.ops.isqtorch.quantize
quantize_feedback = torch.ops.isqtorch.quantize_feedback
dequantize = torch.ops.isqtorch.dequantize
linear = torch.ops.isqtorch.linear
embedding = torch.ops.isqtorch.embedding
experts_linear = torch.ops.isqtorch.experts_linear
attention = torch.ops.isqtorch.attention
square_sums = torch.ops.isqtorch.square_sums
