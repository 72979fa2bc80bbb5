"""Rotary embeddings: `rope_parameters` of a config, and the keys and tensors of a file that mean the same."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .facts import MOST, Facts
from .parts import HeadDim, Part, Values

FACTORS = "rope_freqs.weight"  # factors of Llama 3, one for each frequency
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"  # of Phi 3
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_HEAD = HeadDim()
_NEVER = 1e30
_YARN = {"beta_fast": "rope.scaling.yarn_beta_fast", "beta_slow": "rope.scaling.yarn_beta_slow"}
_USUAL = {"beta_fast": 32.0, "beta_slow": 1.0}


@dataclass(frozen=True)
class Rope(Part):
    """The rotary embedding of a model.

    Attributes:
        head: the part that knows the width of a head.
        partial: only rope.dimension_count columns of a head are turned.
        theta: the base, if the file does not have it.
        local: the base of layers with a sliding window; None: all layers have the same rotary embedding.
        always: parameters that the file does not state.
    """

    head: HeadDim = _HEAD
    partial: bool = False
    theta: float = 10000.0
    local: float | None = None
    always: Mapping[str, Any] | None = None

    def read(self, facts: Facts, values: Values) -> None:
        parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": facts.number("rope.freq_base", self.theta)}
        width = facts.integer("attention.key_length", values[self.head.hidden] // values[self.head.heads], least=1)
        turned = facts.integer("rope.dimension_count", width, least=1)
        if self.partial:
            parameters["partial_rotary_factor"] = turned / width
        elif turned != width:
            raise facts.wrong("rope.dimension_count", turned, f"{width}, the width of a head")
        parameters |= self._scaling(facts, values)
        if self.local is None:
            values["rope_parameters"] = parameters
        else:
            base = facts.number("rope.freq_base_swa", self.local)
            values["rope_parameters"] = {
                "sliding_attention": {"rope_type": "default", "rope_theta": base},
                "full_attention": parameters,
            }

    def _scaling(self, facts: Facts, values: Values) -> dict[str, Any]:
        kind = facts.text("rope.scaling.type", "none")
        factor = facts.number("rope.scaling.factor", None)
        if factor is None and facts.number("rope.scale_linear", None) is not None:  # an old name
            kind, factor = "linear", facts.number("rope.scale_linear")
        original = facts.integer("rope.scaling.original_context_length", None, least=1, most=MOST)
        attention = facts.number("rope.scaling.attn_factor", None)
        if kind in ("linear", "none") and (factor in (None, 0.0, 1.0) or kind == "none"):
            return {}
        if factor is not None and factor <= 0:
            raise facts.wrong("rope.scaling.factor", factor, "a positive number")
        if kind == "linear":
            return {"rope_type": "linear", "factor": factor}
        if kind == "yarn":
            found: dict[str, Any] = {"rope_type": "yarn", "factor": factor or 1.0}
            if original is not None:
                found["original_max_position_embeddings"] = original
            for name, key in _YARN.items():
                value = facts.number(key, None)
                if value is not None:
                    found[name] = value
            if attention is not None and attention != 1.0:  # times the usual factor
                found["attention_factor"] = float(f"{attention * _by_length(found['factor']):.7g}")
            return found | dict(self.always or {})
        if kind == "longrope":
            if attention is not None:
                return {"rope_type": "longrope", "attention_factor": attention}
            return {"rope_type": "longrope"}
        raise facts.wrong("rope.scaling.type", kind, "none, linear, yarn or longrope")

    def write(self, config: Any, keys: Values) -> None:
        parameters = dict(config.rope_parameters or {})
        if self.local is not None:
            local = parameters.get("sliding_attention", {})
            if local.get("rope_type", "default") != "default":
                raise ValueError("layers with a sliding window have scaled positions, and a file cannot say so")
            if float(local.get("rope_theta", self.local)) != self.local:
                keys["rope.freq_base_swa"] = float(local["rope_theta"])
            parameters = dict(parameters.get("full_attention", {}))
        width = self.head.of(config)
        keys["rope.freq_base"] = float(parameters.get("rope_theta", self.theta))
        share = parameters.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0))
        keys["rope.dimension_count"] = int(width * (share or 1.0)) if self.partial else width
        kind = parameters.get("rope_type", "default")
        if kind in ("default", "llama3", "longrope", "proportional"):  # the last three are tensors: `tensors_of`
            if kind == "longrope":
                keys["rope.scaling.attn_factor"] = attention_factor(parameters, config)
            return
        if kind not in ("linear", "yarn"):
            raise ValueError(
                f"rope_type is {kind!r}, and a GGUF file can only say default, linear, yarn, llama3 or longrope"
            )
        keys["rope.scaling.type"], keys["rope.scaling.factor"] = kind, float(parameters["factor"])
        if kind == "yarn":
            for name, value in (self.always or {}).items():
                if parameters.get(name, value) != value:
                    raise ValueError(
                        f"{name} of rope_parameters is {parameters[name]!r}, and a file always means {value!r}"
                    )
            original = parameters.get("original_max_position_embeddings")
            keys["rope.scaling.original_context_length"] = int(original or config.max_position_embeddings)
            for name, key in _YARN.items():
                value = parameters.get(name)
                if value is not None and value != _USUAL[name] and not self.always:
                    raise ValueError(
                        f"{name} of rope_parameters is {value!r}, and llama.cpp computes with {_USUAL[name]}"
                    )
                if value is not None:
                    keys[key] = float(value)
            # llama.cpp multiplies this by its own factor. Where mscale is always the same, it has the rule for that.
            attention = attention_factor(parameters, config) / _by_length(float(parameters["factor"]))
            if not self.always and abs(attention - 1.0) > 1e-6:
                keys["rope.scaling.attn_factor"] = attention


def _by_length(factor: float, scale: float = 1.0) -> float:
    """The usual factor of YaRN for attention over texts that are longer by `factor`."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def attention_factor(parameters: Mapping[str, Any], config: Any) -> float:
    """What queries and keys are multiplied by after YaRN or LongRoPE, as transformers computes it."""
    given = parameters.get("attention_factor")
    if given is not None:
        return float(given)
    if parameters["rope_type"] == "yarn":
        factor, scale, all_dim = float(parameters["factor"]), parameters.get("mscale"), parameters.get("mscale_all_dim")
        if scale and all_dim:
            return _by_length(factor, scale) / _by_length(factor, all_dim)
        return _by_length(factor)
    original = parameters.get("original_max_position_embeddings") or config.original_max_position_embeddings
    factor = parameters.get("factor") or config.max_position_embeddings / original
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def llama3_factors(parameters: Mapping[str, Any], width: int) -> NDArray[np.float32]:
    """The factors by which Llama 3 divides its frequencies, f32 `[width / 2]`.

    Args:
        parameters: `rope_parameters` of type "llama3".
        width: columns of a head.
    """
    frequencies = 1.0 / parameters["rope_theta"] ** (np.arange(0, width, 2, dtype=np.float64) / width)
    lengths = 2 * math.pi / frequencies
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    original, factor = parameters["original_max_position_embeddings"], parameters["factor"]
    smooth = np.clip((original / lengths - low) / (high - low), 0.0, 1.0)
    return np.asarray(1.0 / ((1.0 - smooth) / factor + smooth), dtype=np.float32)


def llama3_parameters(factors: NDArray[np.float32], theta: float) -> dict[str, Any] | None:
    """The `rope_parameters` whose `llama3_factors` are these; None if no known ones have them.

    All models so far have the low factor 1 and the high factor 4. The factor is the largest one in the file, or close to
    it in small heads. The original length is one of a few powers of two.
    """
    if not len(factors) or not np.isfinite(factors).all():
        return None
    for factor in dict.fromkeys([float(factors.max()), 8.0, 32.0]):
        for length in (8192, 4096, 2048, 16384, 32768, 65536, 131072):
            found = {
                **_LLAMA3,
                "rope_type": "llama3",
                "rope_theta": theta,
                "factor": factor,
                "original_max_position_embeddings": length,
            }
            if np.allclose(llama3_factors(found, 2 * len(factors)), factors, rtol=1e-4, atol=0):
                return found
    return None


def proportional_factors(share: float, width: int) -> NDArray[np.float32]:
    """The factors of Gemma 4: 1 for the frequencies that turn, and so large a number that the others do not."""
    turning = int(share * width // 2)
    return np.asarray([1.0] * turning + [_NEVER] * (width // 2 - turning), dtype=np.float32)


def proportional_share(factors: NDArray[np.float32]) -> float | None:
    """The share of a head that turns, if these are `proportional_factors`; else None."""
    turning = int((factors == 1.0).sum())
    rest = factors[turning:]
    return (
        turning / len(factors) if len(factors) and np.all(factors[:turning] == 1.0) and np.all(rest >= 1e20) else None
    )


def tensors_of(config: Any, head: HeadDim) -> dict[str, NDArray[np.float32]]:
    """The tensors that a file needs for the rotary embedding of a config, by name."""
    parameters = dict(getattr(config, "rope_parameters", None) or {})
    parameters = dict(parameters.get("full_attention", parameters))
    kind = parameters.get("rope_type", "default")
    if kind == "llama3":
        return {FACTORS: llama3_factors(parameters, head.of(config))}
    if kind == "proportional":
        return {FACTORS: proportional_factors(parameters["partial_rotary_factor"], head.of(config))}
    if kind == "longrope":
        return {
            LONG: np.asarray(parameters["long_factor"], dtype=np.float32),
            SHORT: np.asarray(parameters["short_factor"], dtype=np.float32),
        }
    return {}
