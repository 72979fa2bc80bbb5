"""IsqConfig: what `from_pretrained` is asked for, and what config.json says about a model that was saved."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from isqtorch._version import __version__
from isqtorch.auto import Budget
from isqtorch.formats import QuantFormat, Spec
from isqtorch.importance.imatrix import imatrix_name, load_imatrix
from isqtorch.integrations.record import FORMAT_VERSION, METHOD, checked_activations, checked_layers, checked_version
from isqtorch.policy.options import Activations, Fallback, ImatrixLike, Names, Options, Organization, listed
from isqtorch.policy.request import Request
from isqtorch.policy.topology import Topology, TopologyLike
from isqtorch.quantizers import Rule

from .meter import Meter

_OP = "IsqConfig"


class IsqConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is not typed
    """Quantize a transformers model while it is loaded.

        model = AutoModelForCausalLM.from_pretrained(name, quantization_config=isqtorch.IsqConfig(4))

    Each weight is packed as it is read, so memory peaks at the packed model plus one weight. The result is the same, bit for
    bit, as that of `isqtorch.quantize_` on the loaded model. The options are those of `quantize_`, where they are explained.

    Args:
        isq: a format name ("q4k", "afq4", "hqq8", "fp8", ...) or a number of bits. None quantizes only what the topology
            names.
        topology, organization, imatrix, include, exclude, fallback, rule, activations: see `isqtorch.quantize_`. A topology places no
            layer on a device; `device_map` does.
        target_bpw, max_size, formats: for "auto", see `isqtorch.quantize_`. The checkpoint is then read twice: once to measure
            (with nothing to run, so without `probe`), once to pack. Memory peaks as for any format.
        modules_to_not_convert: modules to leave, with all that is in them: full paths, or any run of components of one
            ("lm_head", "self_attn.q_proj").
        format_version, layers, isqtorch_version: written by `save_pretrained`, not for users. `layers` maps the path of every
            packed layer to its format; in a saved model it alone decides. There `activations` may also be a list: the layers
            that it holds for, if it is not all in fp8.

    Raises:
        ValueError: an option that is unknown or has a bad value.
        OSError: a topology or imatrix file that cannot be read.
    """

    def __init__(
        self,
        isq: Spec | None = None,
        *,
        topology: TopologyLike | None = None,
        organization: Organization = "default",
        imatrix: ImatrixLike | None = None,
        include: Names | None = None,
        exclude: Names | None = None,
        modules_to_not_convert: Names | None = None,
        fallback: Fallback = "up",
        rule: Rule | None = None,
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
            include=include,
            exclude=exclude,
            modules_to_not_convert=modules_to_not_convert,
            fallback=fallback,
            rule=rule,
            activations=activations,  # type: ignore[arg-type]  # of a saved model it may be a list; see below
            target_bpw=target_bpw,
            max_size=max_size,
            formats=formats,
        )
        self.measuring: Meter | None = None  # set while the checkpoint is read for the first time
        self.layers = None if layers is None else checked_layers(_OP, layers)
        if self.layers is not None:  # the other options are a record of what was asked for; they act no more
            self.activations = checked_activations(_OP, activations, self.layers)
            return
        if unknown:
            raise ValueError(f"{_OP}: unknown option {min(unknown)!r}. Options are {', '.join(_OPTIONS)}.")
        if activations is not None and not isinstance(activations, str):
            raise ValueError(f'{_OP}: activations must be None or "fp8"; got {activations!r}')
        self.activations = self.options.activations
        # Files are read once: they need not be there any more when the model is saved.
        self.options = self.request().options.changed(imatrix=load_imatrix(imatrix))
        self.budget()

    def request(self) -> Request:
        """The options as the policy takes them."""
        request = Request(self.isq, self.options, _OP)
        for entry in request.topology.entries:
            if entry.device is not None:
                raise ValueError(
                    f"{_OP}: topology entry {entry.key!r} names a device; from_pretrained places layers by its device_map"
                )
        return request

    def budget(self) -> Budget | None:
        """What "auto" is allowed; None for other formats."""
        return Budget.of(_OP, self.isq, self.options)

    def to_dict(self) -> dict[str, Any]:
        """What config.json gets: everything that is not at its default, as JSON."""
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
        """A copy that says what the layers of a model are, without the importance, which may be large."""
        config = copy.copy(self)
        config.layers, config.activations = layers, activations
        if config.options.imatrix is not None:
            config.options = config.options.changed(imatrix=imatrix_name(config.options.imatrix))
        return config


register_quantization_config(METHOD)(
    IsqConfig
)  # as a decorator, which has no types, it would hide the class from editors

_OPTIONS = [
    name
    for name in inspect.signature(IsqConfig.__init__).parameters
    if name == "isq" or name in {field.name for field in fields(Options)}
]
"""What a user may give."""


def _recorded(options: Options) -> dict[str, Any]:
    """The options that are not at their defaults, as JSON. Those read from a config.json are a record, which need not parse."""
    content = {}
    for field in fields(options):
        value = getattr(options, field.name)
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
