"""Functions of other libraries that save a model for a class that makes a float model of the file.

`save_pretrained` of diffusers, of a class with `PyTorchModelHubMixin` or of a user's own, and `save_for_hf` of timm and
open_clip: they write the state dict without its metadata, and their `from_pretrained` puts it into float layers. Packed
bytes that they write could not be read again, so a packed layer refuses to be in a state dict that one of them makes.
Such a function is found on the stack, because all of them call `state_dict`, and there is nothing else in common.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

_NAMES = ("save_pretrained", "save_for_hf")
_ADAPTERS = re.compile(r"peft(\.|$)")  # writes adapters, and leaves the model out
_OURS = re.compile(r"isqtorch\.(?!modules\.)")  # writes the formats, or does not write

_recorders: list[Callable[[Any], bool]] = []


def register_recorder(recorder: Callable[[Any], bool]) -> None:
    """Add a function that says of a model whether its `save_pretrained` records the formats of packed layers."""
    _recorders.append(recorder)


def check_saver(name: str, format: str) -> None:
    """Refuse to be in the state dict of a saver that does not record formats.

    Args:
        name: name of a packed weight in the state dict, for the message.
        format: its format.

    Raises:
        ValueError: such a saver is running in this thread.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if _OURS.match(module):
            return
        if frame.f_code.co_name in _NAMES:  # the innermost one: others may call it for a part of their model
            saved = frame.f_locals.get("self", frame.f_locals.get("model"))
            if _ADAPTERS.match(module) or any(recorder(saved) for recorder in _recorders):
                return
            raise ValueError(
                f"{frame.f_code.co_name} of {type(saved).__name__}: {name} is packed as {format}, and what this function writes does "
                "not say so: it could not be read again. Save with isqtorch.checkpoint.save(model, 'model.safetensors') and read "
                "with isqtorch.checkpoint.load_, or call isqtorch.dequantize_(model) first to save floats."
            )
        frame = frame.f_back
