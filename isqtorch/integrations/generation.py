"""`optimize_`: choose the fastest settings of transformers' `generate` for the device of a model.

On a GPU, Python needs more time to launch the kernels of a decode step than a small or quantized model needs to run
them. transformers can run such a step as one CUDA graph, through torch.compile, if the key-value cache has fixed
addresses (a static cache). `optimize_` switches this on. The layers of the model do not change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_SAVED = "_isqtorch_generation"
"""Attribute of the model that holds the previous settings of its generation_config."""


@dataclass(frozen=True)
class Optimization:
    """What `optimize_` did.

    Attributes:
        device: type of the model's device ("cpu", "cuda", "mps").
        changes: the settings of `model.generation_config` that were changed, with their new values; may be empty.
        why: the reason, in one sentence.

    Example:
        done = isqtorch.optimize_(model)
        print(done.device, done.changes, done.why)
    """

    device: str
    changes: dict[str, Any]
    why: str

    def __str__(self) -> str:
        changed = ", ".join(f"{name}={value!r}" for name, value in self.changes.items()) or "nothing changed"
        return f"{self.device}: {changed}; {self.why}"


def optimize_(model: Any, enable: bool = True) -> Optimization:
    """Set up `model.generate` for the device of the model, in place.

    On CUDA it uses a static cache, and torch.compile turns the decode step into a CUDA graph. This happens in the first
    call of `generate` and takes about a minute; a call with other lengths of prompt and reply compiles again. On a CPU
    and on MPS nothing changes, and the result gives the reason.

    Args:
        model: a transformers model that can generate.
        enable: False restores the settings from before.

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


_REASONS = {
    "cpu": "on a CPU a static cache makes a token slower, and compiling takes longer than most replies",
    "mps": "CUDA graphs are for CUDA, and transformers compiles nothing for MPS",
}


def _restore(model: Any) -> None:
    saved = model.__dict__.pop(_SAVED, {})
    for name, value in saved.items():
        setattr(model.generation_config, name, value)
