"""`optimize_`: make transformers' `generate` fast on the device of a model.

On a GPU, Python needs more time to launch the kernels of a decode step than a small or quantized model needs to run
them. transformers can run such a step as one CUDA graph, through torch.compile, if the key-value cache has fixed
addresses (a static cache). `optimize_` switches this on. The layers of the model do not change.

On a CPU, most of a token of a small model is the work of hundreds of small operators. `optimize_` replaces the forwards
of decoder layers and norms by operators that do the work of five or ten each (`transformers/decoding.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from isqtorch.text import common_name, without_numbers

_SAVED = "_isqtorch_generation"
"""Attribute of the model that holds the previous settings of its generation_config."""


@dataclass(frozen=True)
class Optimization:
    """What `optimize_` did.

    Attributes:
        device: type of the model's device ("cpu", "cuda", "mps").
        changes: the settings of `model.generation_config` that were changed, with their new values; may be empty.
        why: the reason, in one sentence.
        layers: number of decoder layers that compute a token with fewer operators.
        kept: the decoder layers that stay as they are, with the reason.

    Example:
        done = isqtorch.optimize_(model)
        print(done.device, done.changes, done.why)
    """

    device: str
    changes: dict[str, Any]
    why: str
    layers: int = 0
    kept: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.layers:
            return f"{self.device}: {self.why}{self._kept()}"
        changed = ", ".join(f"{name}={value!r}" for name, value in self.changes.items()) or "nothing changed"
        return f"{self.device}: {changed}; {self.why}{self._kept()}"

    def _kept(self) -> str:
        """The layers that stay as they are, for each reason."""
        names: dict[tuple[str, str], list[str]] = {}
        for name, why in self.kept.items():
            names.setdefault((without_numbers(name), why), []).append(name)
        return "".join(f"; {common_name(which)} unchanged: {why}" for (_, why), which in names.items())


def optimize_(model: Any, enable: bool = True, *, exact: bool | None = None) -> Optimization:
    """Set up `model.generate` for the device of the model, in place.

    On a CPU, each decoder layer of a known kind computes a token with a few operators: norms, projections that share an
    input, rotary positions, attention, the gate of the MLP. The cache is written in place instead of being copied for
    each token. Prompts, training, and calls with gradients or hooks go the usual way. The operators give the bits of
    those of torch. In bf16 and f16, attention has sums of its own order, in f32: it is up to ten times as fast as that of
    torch, and as precise. In f32, attention is left to torch, so that replies are the same. A trial compares each layer
    with its own forward; a layer that differs stays as it is, and the result says why.

    On CUDA it uses a static cache, and torch.compile turns the decode step into a CUDA graph. This happens in the first
    call of `generate` and takes about a minute; a call with other lengths of prompt and reply compiles again. On MPS
    nothing changes, and the result gives the reason.

    Args:
        model: a transformers model that can generate.
        enable: False restores the model from before.
        exact: on a CPU, whether to leave attention to torch in every type (True) or in none (False). False makes long
            texts faster in f32, too.

    Returns:
        The changed settings and the reason, to be printed.

    Raises:
        TypeError: the model has no `generate`.
        ValueError: the model is on CUDA, and its layers are on several devices or it cannot have a static cache.

    Example:
        print(isqtorch.optimize_(model))
    """
    config = getattr(model, "generation_config", None)
    if config is None or not hasattr(model, "generate"):
        raise TypeError(f"optimize_: {type(model).__name__} is no transformers model that can generate.")
    _restore(model)
    devices = _devices(model)
    device = devices[0].partition(":")[0] if devices else "cpu"
    if not enable:
        return Optimization(device, {}, "generate is as it was before")
    if device == "cpu" and len(devices) == 1:
        return _on_cpu(model, exact)
    if device != "cuda":
        return Optimization(device, {}, _REASONS.get(device, "CUDA graphs are for CUDA"))
    if len(devices) > 1:
        raise ValueError(f"optimize_: the model is on {', '.join(devices)}; one CUDA graph needs one device.")
    # Breaks if transformers renames this private attribute; test_twice_is_once notices.
    if not getattr(model, "_can_compile_fullgraph", False):
        raise ValueError(
            f"optimize_: transformers cannot compile {type(model).__name__} with a static cache. Generate without optimize_."
        )
    from transformers import CompileConfig

    changes = {
        "cache_implementation": "static",
        "compile_config": CompileConfig(fullgraph=True, mode="reduce-overhead"),
    }
    setattr(model, _SAVED, {name: getattr(config, name, None) for name in changes})
    for name, value in changes.items():
        setattr(config, name, value)
    return Optimization(device, changes, "one CUDA graph per token, compiled at the first call")


def _devices(model: Any) -> list[str]:
    return sorted({str(parameter.device) for parameter in model.parameters()})


def _on_cpu(model: Any, exact: bool | None) -> Optimization:
    from .transformers.decoding import attach, detach

    layers, kept = attach(model, exact)
    if not layers:
        detach(model)  # norms alone gain little
        why = "no decoder layer can be computed with fewer operators"
        return Optimization("cpu", {}, why, 0, kept)
    same = "with the bits of torch"
    same += "" if exact else " but for the sums of attention" + (" in bf16 and f16" if exact is None else "")
    return Optimization(
        "cpu", {}, f"decoder layers that compute a token with few operators: {layers}, {same}", layers, kept
    )


_REASONS = {
    "cpu": "its layers are on several devices",
    "mps": "CUDA graphs are for CUDA, and transformers compiles nothing for MPS",
}


def _restore(model: Any) -> None:
    if hasattr(model, "modules") and "transformers" in sys.modules:
        from .transformers.decoding import detach

        detach(model)
    saved = model.__dict__.pop(_SAVED, {})
    for name, value in saved.items():
        setattr(model.generation_config, name, value)
