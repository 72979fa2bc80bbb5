"""`optimize_`: how transformers' `generate` runs a model fastest on the device that it is on.

On a GPU a decode step of a small or quantized model takes less time than Python takes to start its kernels. transformers can run
such a step as one CUDA graph, if the keys and values have a fixed place: with a static cache, through torch.compile. This switches
that on. Nothing of the model's layers changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_SAVED = "_isqtorch_generation"
"""Attribute of the model: what its generation_config had before."""


@dataclass(frozen=True)
class Optimization:
    """What `optimize_` did.

    Attributes:
        device: type of the model's device.
        changes: settings of `generation_config`, now; empty if nothing was changed.
        why: in a sentence.
    """

    device: str
    changes: dict[str, Any]
    why: str

    def __str__(self) -> str:
        changed = ", ".join(f"{name}={value!r}" for name, value in self.changes.items()) or "nothing changed"
        return f"{self.device}: {changed}; {self.why}"


def optimize_(model: Any, enable: bool = True) -> Optimization:
    """Set up `model.generate` for the device that the model is on, in place.

    On CUDA: a static cache, and the decode step compiled by torch.compile into a CUDA graph, at the first call with prompts and
    replies of about that length; that takes a minute. A call with other lengths than before compiles again.
    On a CPU and on MPS nothing is changed, and the result says why.

    Args:
        model: a transformers model that can generate.
        enable: False goes back to what it was before.

    Returns:
        What was done; print it.

    Raises:
        TypeError: the model has no `generate`.
        ValueError: its layers are on several devices, or it cannot have a static cache.
    """
    config = getattr(model, "generation_config", None)
    if config is None or not hasattr(model, "generate"):
        raise TypeError(f"optimize_: {type(model).__name__} is no transformers model that can generate.")
    _restore(model)
    devices = _devices(model)
    device = devices[0].partition(":")[0] if devices else "cpu"
    if not enable:
        return Optimization(device, {}, "generate is as it was before")
    if device != "cuda":
        return Optimization(device, {}, _REASONS.get(device, "CUDA graphs are for CUDA"))
    if len(devices) > 1:
        raise ValueError(f"optimize_: the model is on {', '.join(devices)}; one CUDA graph needs one device.")
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


_REASONS = {
    "cpu": "on a CPU a static cache makes a token slower, and compiling takes longer than most replies",
    "mps": "CUDA graphs are for CUDA, and transformers compiles nothing for MPS",
}


def _restore(model: Any) -> None:
    saved = model.__dict__.pop(_SAVED, {})
    for name, value in saved.items():
        setattr(model.generation_config, name, value)
