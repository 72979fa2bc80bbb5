"""Quantize a PyTorch model in place: `isqtorch.quantize_(model, 4)`.

This file only imports the public names. All are imported at once, for a reason: the functions `isqtorch.formats` and
`isqtorch.explain` have the names of submodules, and a submodule that is imported later would replace the function.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .evaluation import KLResult, Perplexity, kl_divergence, perplexity, reference_logits
from .explain import Explanation, explain
from .formats import QuantFormat, formats, get_format, resolve_format
from .importance.calibration import Calibration, calibrate, collect_imatrix
from .importance.imatrix import Imatrix, read_imatrix
from .importance.moments import Moments
from .importance.passes import collect_moments
from .inplace.dequantize import dequantize_
from .inplace.quantize import quantize_
from .inplace.refine import refine_
from .inplace.requantize import requantize_
from .modules import QuantEmbedding, QuantExperts, QuantLinear
from .ops import metal
from .policy.topology import Topology
from .report.layer import LayerReport
from .report.plan import plan
from .report.refinement import Refinement
from .report.report import QuantReport
from .tensor import QuantizedTensor, quantize

from . import checkpoint  # isort: skip  # used as isqtorch.checkpoint.save, .load_
from .integrations.activate import activate

# These import transformers only when they are called.
from .integrations.checkpoints.gguf.export import export_gguf
from .integrations.checkpoints.mlx.export import export_mlx
from .integrations.generation import Optimization, optimize_
from .integrations.loading import Loaded, load

__all__ = [
    "Calibration",
    "Explanation",
    "Imatrix",
    "IsqConfig",
    "KLResult",
    "LayerReport",
    "Loaded",
    "Moments",
    "Optimization",
    "Perplexity",
    "QuantEmbedding",
    "QuantExperts",
    "QuantFormat",
    "QuantLinear",
    "QuantReport",
    "QuantizedCache",
    "QuantizedTensor",
    "Refinement",
    "Topology",
    "__version__",
    "calibrate",
    "checkpoint",
    "collect_imatrix",
    "collect_moments",
    "dequantize_",
    "explain",
    "export_gguf",
    "export_mlx",
    "formats",
    "get_format",
    "kl_divergence",
    "load",
    "metal",
    "optimize_",
    "perplexity",
    "plan",
    "quantize",
    "quantize_",
    "read_imatrix",
    "reference_logits",
    "refine_",
    "requantize_",
    "resolve_format",
]

if TYPE_CHECKING:
    from .integrations.transformers import IsqConfig, QuantizedCache
else:
    _OF_TRANSFORMERS = ("IsqConfig", "QuantizedCache")
    if find_spec("transformers") is None:  # `from isqtorch import *` works without transformers
        __all__ = [name for name in __all__ if name not in _OF_TRANSFORMERS]

    def __getattr__(name: str) -> Any:
        """Import what needs transformers on first use: that import takes seconds."""
        if name not in _OF_TRANSFORMERS:
            raise AttributeError(f"module 'isqtorch' has no attribute {name!r}")
        try:
            from .integrations import transformers as plugin
        except ImportError as error:
            if not isinstance(error, ModuleNotFoundError) or error.name != "transformers":
                raise  # transformers is too old, and the message says so
            # hasattr must return False, which takes an AttributeError. `from isqtorch import IsqConfig` needs an
            # ImportError: Python would replace the message of an AttributeError.
            importing = sys._getframe(1).f_globals.get("__name__") in ("importlib._bootstrap", "_frozen_importlib")
            hint = f"isqtorch.{name} needs transformers: pip install 'isqtorch[hf]'"
            raise (ImportError if importing else AttributeError)(hint) from error
        return getattr(plugin, name)

    def __dir__() -> list[str]:
        return sorted(__all__)


activate()
