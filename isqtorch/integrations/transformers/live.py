"""Keeping a transformers model saveable when `quantize_`, `requantize_`, `dequantize_` or `checkpoint.load_` changed it."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import _assign_is_quantized

from isqtorch.integrations.record import METHOD
from isqtorch.report.report import QuantReport

from .config import IsqConfig
from .quantizer import IsqHfQuantizer, record
from .skeleton import packed_formats


def follow(model: nn.Module, report: QuantReport | None) -> None:
    """Make the model's quantizer and configuration say what its layers are now, as `from_pretrained` would have left them."""
    if not isinstance(model, PreTrainedModel):
        return
    layers, quantizer = packed_formats(model), getattr(model, "hf_quantizer", None)
    if quantizer is not None and not isinstance(quantizer, IsqHfQuantizer):
        if layers and report is not None:
            report.notes.append(
                f"the model is quantized by {quantizer.quantization_config.quant_method} as well; save_pretrained records only that. "
                "Save it with isqtorch.checkpoint."
            )
        return
    if not layers:
        if quantizer is not None:
            quantizer.remove_quantization_config(model)
            for module in model.modules():
                if isinstance(module, PreTrainedModel):
                    module.config._is_quantized = False
        model.isq_report = None
        return
    if quantizer is None:
        quantizer = IsqHfQuantizer(IsqConfig(layers=layers), pre_quantized=True)
    if report is not None:
        requested = report.requested  # text: a number of bits is a number in IsqConfig
        isq = int(requested) if requested is not None and requested.isdecimal() else requested
        quantizer.quantization_config = IsqConfig(isq, imatrix=report.imatrix, rule=report.rule, layers=layers)
    model.isq_report = report
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = METHOD
    record(model, quantizer)
    _assign_is_quantized(model)
