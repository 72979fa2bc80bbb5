"""The Host for transformers: finds the checkpoint of a model, and updates its configuration when layers change.

It uses private names of transformers. Without `_assign_is_quantized` its import fails, so every test with transformers
notices. Without `_weight_conversions` and `_commit_hash` it silently uses the default conversions and the default
revision.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.quantizers.base import _assign_is_quantized

from isqtorch.files.checkpoints import checkpoint_files
from isqtorch.inplace.source import Source
from isqtorch.integrations.checkpoints.doors import checkpoint_of, open_checkpoint
from isqtorch.integrations.checkpoints.incoming import Incoming
from isqtorch.integrations.hub import cached_weights
from isqtorch.integrations.record import METHOD
from isqtorch.modules.foreign import find_foreign
from isqtorch.policy.inventory import inspect_model
from isqtorch.report.report import QuantReport

from .config import IsqConfig
from .quantizer import IsqHfQuantizer, record
from .skeleton import packed_formats
from .source import ConvertedSource


class TransformersHost:
    """See `isqtorch.inplace.host.Host`."""

    def files(self, model: nn.Module) -> list[str] | None:
        quantizer = getattr(model, "hf_quantizer", None)
        if not isinstance(model, PreTrainedModel) or not (quantizer is None or isinstance(quantizer, IsqHfQuantizer)):
            return None
        name = str(model.config.name_or_path or "")
        try:
            other = open_checkpoint(name, local=True) if name else None
            if other is not None:
                return list(other.files)
            if Path(name).is_dir():
                return [str(path) for path in checkpoint_files(Path(name), name)] if name else None
            return cached_weights(name, getattr(model.config, "_commit_hash", None))
        except (OSError, ValueError):  # ValueError: also for names that are no valid repository ids
            return None

    def open(self, model: nn.Module, files: Sequence[str], remembered: bool) -> Source | None:
        if not isinstance(model, PreTrainedModel):
            return None
        other = checkpoint_of(files)
        if other is not None:
            incoming = other.weights(model)
            incoming.note = _about(model, incoming)
            return incoming
        # The conversions of this load may include the user's own mapping. Other files may need other conversions.
        used = getattr(model, "_weight_conversions", None) if remembered else None
        return ConvertedSource(model, files, get_model_conversion_mapping(model) if used is None else used)

    def changed(self, model: nn.Module, report: QuantReport | None) -> None:
        """Set quantizer and configuration as `from_pretrained` would for a model with these layers."""
        if not isinstance(model, PreTrainedModel):
            return
        layers, quantizer = packed_formats(model), getattr(model, "hf_quantizer", None)
        if quantizer is not None and not isinstance(quantizer, IsqHfQuantizer):
            foreign = find_foreign(model)
            if foreign is not None and report is not None:
                report.notes.append(f"{foreign}, and save_pretrained records only that. Save with isqtorch.checkpoint.")
            if foreign is not None or not layers:
                return
            quantizer.remove_quantization_config(model)  # it only read the file: all other layers are plain floats
            quantizer = None
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
            requested = report.requested  # a string; IsqConfig takes a number of bits as int
            isq = int(requested) if requested is not None and requested.isdecimal() else requested
            quantizer.quantization_config = IsqConfig(isq, imatrix=report.imatrix, rule=report.rule, layers=layers)
        model.isq_report = report
        model.hf_quantizer = quantizer
        model.is_quantized = True
        model.quantization_method = METHOD
        record(model, quantizer)
        _assign_is_quantized(model)


def records(model: object) -> bool:
    """Whether `save_pretrained` of a model writes the formats of its packed layers into config.json."""
    return isinstance(model, PreTrainedModel) and isinstance(getattr(model, "hf_quantizer", None), IsqHfQuantizer)


def _about(model: PreTrainedModel, incoming: Incoming) -> str:
    """What the report says about the weights of another program's checkpoint."""
    held = [found for name in model.state_dict(keep_vars=True) if (found := incoming.held(name)) is not None]
    formats = sorted({fmt.name for each in held if (fmt := each.fmt or each.instead) is not None})
    if not formats:
        return ""
    return f"they are quantized there ({', '.join(formats)}), their errors stay, and more bits gain nothing"


def tied(model: PreTrainedModel) -> None:
    """Update the record of a model after tying has changed the kind of some layers."""
    TransformersHost().changed(model, None)
    if packed_formats(model):
        model.isq_report = QuantReport.of_packed(inspect_model(model))
