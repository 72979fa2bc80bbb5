"""IsqConfig: what `from_pretrained` is asked for, and what config.json says about a model that was saved."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from isqtorch._version import __version__
from isqtorch.auto import Budget
from isqtorch.formats import QuantFormat, Spec
from isqtorch.importance.imatrix import ImatrixLike, imatrix_name, load_imatrix
from isqtorch.integrations.record import FORMAT_VERSION, METHOD, checked_activations, checked_layers, checked_version
from isqtorch.policy.decide import Request
from isqtorch.policy.topology import Topology, TopologyLike

if TYPE_CHECKING:
    from .meter import Meter

_OP = "IsqConfig"


@register_quantization_config(METHOD)
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
        organization: str = "default",
        imatrix: ImatrixLike | None = None,
        include: Sequence[str] | str | None = None,
        exclude: Sequence[str] | str | None = None,
        modules_to_not_convert: Sequence[str] | str | None = None,
        fallback: str = "up",
        rule: str | None = None,
        activations: str | Sequence[str] | None = None,
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
        self.topology = topology
        self.organization = organization
        self.imatrix = imatrix
        self.include = include
        self.exclude = exclude
        self.modules_to_not_convert = modules_to_not_convert
        self.fallback = fallback
        self.rule = rule
        self.activations = activations
        self.target_bpw = target_bpw
        self.max_size = max_size
        self.formats = formats
        self.measuring: Meter | None = None  # set while the checkpoint is read for the first time
        self.layers = None if layers is None else checked_layers(_OP, layers)
        if self.layers is not None:  # the other options are a record of what was asked for; they act no more
            self.activations = checked_activations(_OP, activations, self.layers)
        else:
            if unknown:
                raise ValueError(f"{_OP}: unknown option {min(unknown)!r}. Options are {', '.join(_OPTIONS)}.")
            if topology is not None:
                self.topology = Topology.load(topology)  # a file need not be there any more when the model is saved
            self.request()
            self.budget()
            self.imatrix = load_imatrix(imatrix)

    def request(self) -> Request:
        """The options as the policy takes them."""
        excluded = [*_listed(self.exclude), *_exact_patterns(self.modules_to_not_convert)]
        if self.activations is not None and not isinstance(self.activations, str):
            raise ValueError(f'{_OP}: activations must be None or "fp8"; got {self.activations!r}')
        request = Request(
            self.isq,
            self.topology,
            self.organization,
            self.include,
            excluded or None,
            self.fallback,
            _OP,
            activations=self.activations,
        )
        for entry in request.entries.entries:
            if entry.device is not None:
                raise ValueError(
                    f"{_OP}: topology entry {entry.key!r} names a device; from_pretrained places layers by its device_map"
                )
        return request

    def budget(self) -> Budget | None:
        """What "auto" is allowed; None for other formats."""
        return Budget.parse(_OP, self.isq, self.target_bpw, self.max_size, self.formats, None)

    def in_user_words(self, notes: list[str]) -> list[str]:
        """Notes that name a module of `modules_to_not_convert`, not the exclude pattern that stands for it."""
        names = _listed(self.modules_to_not_convert)
        for name, pattern in zip(names, _exact_patterns(names), strict=True):
            notes = [
                note.replace(f"exclude pattern {pattern!r}", f"modules_to_not_convert entry {name!r}") for note in notes
            ]
        return notes

    def to_dict(self) -> dict[str, Any]:
        """What config.json gets: everything that is not at its default, as JSON."""
        content: dict[str, Any] = {
            "quant_method": self.quant_method,
            "format_version": self.format_version,
            "isqtorch_version": self.isqtorch_version,
            "isq": self.isq.name if isinstance(self.isq, QuantFormat) else self.isq,
            "topology": self._topology(),
            "organization": None if self.organization == "default" else self.organization,
            "imatrix": None if self.imatrix is None else imatrix_name(self.imatrix),
            "include": _listed(self.include) or None,
            "exclude": _listed(self.exclude) or None,
            "modules_to_not_convert": _listed(self.modules_to_not_convert) or None,
            "fallback": None if self.fallback == "up" else self.fallback,
            "rule": self.rule,
            "activations": self.activations,
            "target_bpw": self.target_bpw,
            "max_size": self.max_size,
            "formats": None if self.formats is None else [_jsonable(spec) for spec in self.formats],
            "layers": self.layers,
        }
        return {key: value for key, value in content.items() if value is not None}

    def recorded(self, layers: dict[str, str], activations: str | list[str] | None) -> IsqConfig:
        """A copy that says what the layers of a model are, without the importance, which may be large."""
        config = copy.copy(self)
        config.layers, config.activations = layers, activations
        config.imatrix = None if self.imatrix is None else imatrix_name(self.imatrix)
        return config

    def _topology(self) -> Any:
        """The topology as a dict. One that was read from a config.json is a record, which need not parse."""
        if not isinstance(self.topology, Topology):
            return self.topology
        return {entry.key: _jsonable(entry.spec) for entry in self.topology.entries}


_OPTIONS = (
    "isq",
    "topology",
    "organization",
    "imatrix",
    "include",
    "exclude",
    "modules_to_not_convert",
    "fallback",
    "rule",
    "activations",
    "target_bpw",
    "max_size",
    "formats",
)


def _listed(names: Iterable[str] | str | None) -> list[str]:
    return [] if names is None else [names] if isinstance(names, str) else list(names)


def _exact_patterns(names: Sequence[str] | str | None) -> list[str]:
    """Regexes that find these runs of components in a path, and nothing that merely begins like them."""
    return [rf"(?:^|\.){re.escape(name)}(?:\.|$)" for name in _listed(names)]


def _jsonable(spec: Spec | None) -> str | int | None:
    return spec.name if isinstance(spec, QuantFormat) else spec
