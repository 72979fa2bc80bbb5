"""IsqConfig: the options for `from_pretrained`, and the entry of a saved model in config.json."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from isqtorch._version import __version__
from isqtorch.auto import Budget
from isqtorch.files.binary import regular
from isqtorch.formats import AUTO, QuantFormat, Spec, mix_name
from isqtorch.importance.imatrix import imatrix_name
from isqtorch.importance.moments import load_imatrix
from isqtorch.integrations.record import FORMAT_VERSION, METHOD, checked_activations, checked_layers, checked_version
from isqtorch.policy.options import Activations, Fallback, ImatrixLike, ModelRule, Names, Options, Organization, listed
from isqtorch.policy.request import Request, checked_calibration
from isqtorch.policy.topology import Topology, TopologyLike
from isqtorch.policy.words import about
from isqtorch.quantizers.families import FEEDBACK

from .meter import Meter

_OP = "IsqConfig"


class IsqConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is not typed
    """Quantize a transformers model while it is loaded.

    Each weight is packed as it is read, so peak memory is the packed model plus one float weight. The result is the
    same, bit for bit, as that of `isqtorch.quantize_` on the loaded model. `quantize_` explains the options.

    Args:
        isq: a format name ("q4k", "afq4", "hqq8", "fp8", ...), a number of bits, a mix ("q4k_m", ...) or "auto". None
            quantizes only the layers that the topology names. "keep" is for checkpoints that another program has
            quantized: it takes over, without any rounding, what one of our formats holds exactly.
        topology, organization, imatrix, include, exclude, fallback, rule, activations: see `isqtorch.quantize_`. A
            topology cannot place layers on devices; `device_map` does that.
        calibration_file, tokenizer: for `rule="feedback"`: a text to collect moments from, and the tokenizer of the model.
            The decoder layers are read, fed with the text, packed and freed one after the other, so that peak memory is
            the packed model, one float layer with its moments, and the hidden states of the text. The result is that of
            `quantize_`. It works for models whose decoder layers follow each other and get the same masks and positions
            for every window; others raise a ValueError, and `isqtorch.load` knows another way for them.
        target_bpw, max_size, formats: for "auto", see `isqtorch.quantize_`. The checkpoint is then read twice, once to
            measure and once to pack. Peak memory is as for any format. The model cannot run yet, so there is no
            `probe`.
        modules_to_not_convert: modules to leave as they are, with all their children: full paths, or whole components
            of one ("lm_head", "self_attn.q_proj").
        format_version, layers, isqtorch_version, quant_method: written by `save_pretrained`; do not pass them. `layers`
            maps the path of every packed layer to its format. In a saved model only `layers` decides, and `activations`
            may be a list: the layers in fp8 that have the permission, if not all have it.

    `from_pretrained` raises NotImplementedError if the checkpoint is quantized in a way that is not read here.

    Raises:
        ValueError: an option is unknown or has a bad value.
        OSError: a topology or imatrix file cannot be read.

    Example:
        config = isqtorch.IsqConfig(4, exclude="lm_head")
        model = AutoModelForCausalLM.from_pretrained("examples/demo_model/model", quantization_config=config)
        print(model.isq_report)
    """

    def __init__(
        self,
        isq: Spec | None = None,
        *,
        topology: TopologyLike | None = None,
        organization: Organization = "default",
        imatrix: ImatrixLike | None = None,
        calibration_file: str | os.PathLike[str] | None = None,
        tokenizer: Any = None,
        include: Names | None = None,
        exclude: Names | None = None,
        modules_to_not_convert: Names | None = None,
        fallback: Fallback = "up",
        rule: ModelRule | None = None,
        activations: Activations | Sequence[str] | None = None,
        target_bpw: float | None = None,
        max_size: int | str | None = None,
        formats: Sequence[Spec] | None = None,
        format_version: int = FORMAT_VERSION,
        layers: Mapping[str, str] | None = None,
        isqtorch_version: str | None = None,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        self.quant_method = quant_method
        self.format_version = checked_version(_OP, format_version)
        self.isqtorch_version = isqtorch_version or __version__
        self.isq = isq
        self.options = Options(
            topology=topology,
            organization=organization,
            imatrix=imatrix,
            calibration_file=calibration_file,
            tokenizer=tokenizer,
            include=include,
            exclude=exclude,
            modules_to_not_convert=modules_to_not_convert,
            fallback=fallback,
            rule=rule,
            activations=activations,  # type: ignore[arg-type]  # a list in a saved model; see below
            target_bpw=target_bpw,
            max_size=max_size,
            formats=formats,
        )
        self.measuring: Meter | None = None  # set during the first of two readings, which measures
        self.layers = None if layers is None else checked_layers(_OP, layers)
        if self.layers is not None:  # a saved model: the other options only record the request and have no effect
            self.activations = checked_activations(_OP, activations, self.layers)
            return
        if unknown:
            raise ValueError(f"{_OP}: {about(min(unknown), unknown[min(unknown)], _OPTIONS, 'IsqConfig({})')}")
        if activations is not None and not isinstance(activations, str):
            raise ValueError(f'{_OP}: activations must be None or "fp8"; got {activations!r}')
        self.activations = self.options.activations
        self._check_text()
        # Read files now: they may be gone when the model is saved.
        self.options = self.request().options.changed(imatrix=load_imatrix(imatrix))
        self.budget()

    @property
    def feeds(self) -> bool:
        """Whether a text is fed to the model while it is loaded."""
        return self.options.calibration_file is not None and self.measuring is None

    def _check_text(self) -> None:
        """ValueError unless the text can be used, OSError if there is none."""
        text = checked_calibration(_OP, self.options)
        if text is None:
            return
        if self.options.rule != FEEDBACK or mix_name(self.isq) == AUTO:
            raise ValueError(
                f"{_OP}: calibration_file is for rule='feedback' here, and not for 'auto': a model cannot run before it is loaded. Use "
                "isqtorch.load, or quantize_ on the loaded model."
            )
        if self.options.imatrix is not None:
            raise ValueError(f"{_OP}: give either imatrix or calibration_file, not both")
        if self.options.tokenizer is None:
            raise ValueError(f"{_OP}: calibration_file needs tokenizer=..., the model's tokenizer")
        if not isinstance(text, Path):
            raise ValueError(
                f"{_OP}: calibration_file must be the path of a text here. A model cannot write before it is loaded: use "
                "isqtorch.load, or quantize_ on the loaded model."
            )
        if not text.exists():
            raise FileNotFoundError(f"{_OP}: no calibration text {text}")
        regular(text)

    def request(self) -> Request:
        """The checked options, as a Request for the policy."""
        request = Request(self.isq, self.options, _OP)
        for entry in request.topology.entries:
            if entry.device is not None:
                raise ValueError(
                    f"{_OP}: topology entry {entry.key!r} names a device; from_pretrained places layers by its device_map"
                )
        return request

    def budget(self) -> Budget | None:
        """The budget of "auto"; None for other formats."""
        return Budget.of(_OP, self.isq, self.options)

    def to_dict(self) -> dict[str, Any]:
        """The entry for config.json: all values that are not defaults, in types of JSON."""
        content: dict[str, Any] = {
            "quant_method": self.quant_method,
            "format_version": self.format_version,
            "isqtorch_version": self.isqtorch_version,
            "isq": _name(self.isq),
            **_recorded(self.options),
            "activations": self.activations,
            "layers": self.layers,
        }
        return {key: value for key, value in content.items() if value is not None}

    def recorded(self, layers: dict[str, str], activations: str | list[str] | None) -> IsqConfig:
        """A copy that describes the packed layers of a model, for config.json.

        It names the importance matrix but does not hold it.

        Args:
            layers: {path: format} of all packed layers.
            activations: None, "fp8", or the paths of the layers in fp8 that may round x.
        """
        config = copy.copy(self)
        config.layers, config.activations = layers, activations
        options = config.options
        config.options = options.changed(
            imatrix=None if options.imatrix is None else imatrix_name(options.imatrix),
            calibration_file=None if options.calibration_file is None else Path(str(options.calibration_file)).name,
            tokenizer=None,
        )
        return config


register_quantization_config(METHOD)(
    IsqConfig
)  # not as a decorator: it has no types and would hide the class from editors

_OPTIONS = [
    name
    for name in inspect.signature(IsqConfig.__init__).parameters
    if name == "isq" or name in {field.name for field in fields(Options)}
]
"""The arguments that a user may give."""


def _recorded(options: Options) -> dict[str, Any]:
    """The options that are not defaults, in types of JSON. Options of a loaded config.json are passed on unparsed."""
    content = {}
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name == "tokenizer":
            continue
        if field.name == "calibration_file" and value is not None:
            value = Path(value).name
        if isinstance(value, Topology):
            value = value.to_dict() or None
        elif field.name in ("include", "exclude", "modules_to_not_convert"):
            value = listed(value) or None
        elif field.name == "imatrix" and value is not None:
            value = imatrix_name(value)
        elif field.name == "formats" and value is not None:
            value = [_name(spec) for spec in value]
        if value != field.default:
            content[field.name] = value
    return content


def _name(spec: Spec | None) -> str | int | None:
    return spec.name if isinstance(spec, QuantFormat) else spec
