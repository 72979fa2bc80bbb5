"""Quantize a PyTorch model in place: `isqtorch.quantize_(model, 4)`.

The public names, nothing else. They are imported here, in one go, on purpose: some functions are named as the module that
holds them (`plan`, `quantize`, `formats`), and a module imported later would take the function's place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._version import __version__
from .evaluation import kl_divergence, perplexity, reference_logits
from .explain import Explanation, explain
from .formats import QuantFormat, formats, get_format, resolve_format
from .importance.calibration import Calibration, calibrate, collect_imatrix
from .importance.imatrix import Imatrix, read_imatrix
from .inplace.dequantize import dequantize_
from .inplace.quantize import quantize_
from .inplace.requantize import requantize_
from .modules import QuantEmbedding, QuantLinear
from .ops import metal
from .report.layer import LayerReport
from .report.plan import plan
from .report.report import QuantReport
from .tensor import QuantizedTensor, quantize

from . import checkpoint  # isort: skip  # used as isqtorch.checkpoint.save, .load_
from .integrations.activate import activate as _activate
from .integrations.generation import Optimization, optimize_  # imports transformers only when called

if TYPE_CHECKING:
    from .integrations.transformers import IsqConfig as IsqConfig

__all__ = [
    "Calibration",
    "Explanation",
    "Imatrix",
    "LayerReport",
    "Optimization",
    "QuantEmbedding",
    "QuantFormat",
    "QuantLinear",
    "QuantReport",
    "QuantizedTensor",
    "__version__",
    "calibrate",
    "checkpoint",
    "collect_imatrix",
    "dequantize_",
    "explain",
    "formats",
    "get_format",
    "kl_divergence",
    "metal",
    "optimize_",
    "perplexity",
    "plan",
    "quantize",
    "quantize_",
    "read_imatrix",
    "reference_logits",
    "requantize_",
    "resolve_format",
]


def __getattr__(name: str) -> Any:
    if name == "IsqConfig":  # not imported above, and not in __all__: it needs transformers
        from .integrations.transformers import IsqConfig

        return IsqConfig
    raise AttributeError(f"module 'isqtorch' has no attribute {name!r}")


_activate()
