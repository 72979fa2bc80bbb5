"""What transformers contributes to models that change in place: the checkpoint they came from, and a record that stays true."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.quantizers.base import _assign_is_quantized

from isqtorch.files.checkpoints import checkpoint_files, read_json
from isqtorch.inplace.source import Source
from isqtorch.integrations.record import METHOD
from isqtorch.report.report import QuantReport

from .config import IsqConfig
from .quantizer import IsqHfQuantizer, record
from .skeleton import packed_formats
from .source import ConvertedSource

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


class TransformersHost:
    """See `isqtorch.inplace.host.Host`."""

    def files(self, model: nn.Module) -> list[str] | None:
        quantizer = getattr(model, "hf_quantizer", None)
        if not isinstance(model, PreTrainedModel) or not (quantizer is None or isinstance(quantizer, IsqHfQuantizer)):
            return None
        name = str(model.config.name_or_path or "")
        try:
            if Path(name).is_dir():
                return [str(path) for path in checkpoint_files(Path(name), name)] if name else None
            return _cached(name, getattr(model.config, "_commit_hash", None))
        except (OSError, ValueError):  # ValueError: also of names that no repository can have
            return None

    def open(self, model: nn.Module, files: Sequence[str], remembered: bool) -> Source | None:
        if not isinstance(model, PreTrainedModel):
            return None
        # What loading these very files used may be the user's own mapping; for others it may lack what they need.
        used = getattr(model, "_weight_conversions", None) if remembered else None
        return ConvertedSource(model, files, get_model_conversion_mapping(model) if used is None else used)

    def changed(self, model: nn.Module, report: QuantReport | None) -> None:
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


def _cached(name: str, revision: str | None) -> list[str] | None:
    """The files of a model in the Hub's local cache, without asking the network."""
    index = try_to_load_from_cache(name, _INDEX, revision=revision) if name else None
    if not isinstance(index, str):
        single = try_to_load_from_cache(name, _SINGLE, revision=revision) if name else None
        return [single] if isinstance(single, str) else None
    mapping = read_json(Path(index)).get("weight_map")
    names = sorted(set(mapping.values())) if isinstance(mapping, dict) else []
    found = [try_to_load_from_cache(name, file, revision=revision) for file in names]
    return [str(file) for file in found] if found and all(isinstance(file, str) for file in found) else None
