"""Dense decoders of which only some models have layers with a sliding window: EXAONE 4, OLMo 3."""

from __future__ import annotations

from typing import Any

from .common import HEAD, HEADS, IMPLIED, decoder, trunk
from .facts import Facts
from .parts import Layers, Part, Present, Values
from .record import Architecture
from .rope import Rope

_FULL, _WINDOW = "full_attention", "sliding_attention"


class _MaybeWindow(Part):
    """Windows in layers that flags name. A file with a window and without flags means all layers but every fourth one."""

    def read(self, facts: Facts, values: Values) -> None:
        if facts.has("attention.sliding_window"):
            Layers(4).read(facts, values)
        else:
            values["sliding_window"] = None
            values["layer_types"] = [_FULL] * values["num_hidden_layers"]

    def write(self, config: Any, keys: Values) -> None:
        kinds = config.layer_types or ()
        if _WINDOW in kinds:
            keys["attention.sliding_window"] = config.sliding_window
            keys["attention.sliding_window_pattern"] = [kind == _WINDOW for kind in kinds]


class _Shown:
    """A config with the rotary embedding of the layers without a window."""

    def __init__(self, config: Any) -> None:
        self.rope_parameters = config.rope_parameters[_FULL]
        self.hidden_size, self.num_attention_heads = config.hidden_size, config.num_attention_heads
        self.max_position_embeddings = config.max_position_embeddings


class _ScaledWhereFull(Part):
    """OLMo 3 scales positions only in the layers without a window."""

    def read(self, facts: Facts, values: Values) -> None:
        _ROPE.read(facts, values)
        full = values["rope_parameters"]
        local = {"rope_type": "default", "rope_theta": full["rope_theta"]}
        values["rope_parameters"] = {_WINDOW: local, _FULL: full}

    def write(self, config: Any, keys: Values) -> None:
        local, full = config.rope_parameters[_WINDOW], config.rope_parameters[_FULL]
        if (local.get("rope_type", "default"), local["rope_theta"]) != ("default", full["rope_theta"]):
            raise ValueError(
                "layers with a window have scaled positions or another base, and a GGUF file cannot say so"
            )
        _ROPE.write(_Shown(config), keys)


_ROPE = Rope(IMPLIED)
_ATTENTION_BIAS = Present("attention_bias", "blk.0.attn_q.bias")

RECORDS = (
    Architecture(
        "olmo2",
        ("olmo3",),
        (*trunk(), *HEADS, IMPLIED, _ScaledWhereFull(), _MaybeWindow(), _ATTENTION_BIAS),
        IMPLIED,
        when=lambda facts: facts.has("attention.sliding_window"),
    ),
    Architecture("exaone4", ("exaone4",), (*decoder(), _MaybeWindow()), HEAD),
)
