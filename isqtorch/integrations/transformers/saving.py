"""`save_pretrained` of a model that got packed layers by hand, such as a quantized trunk in a new model around it.

`quantize_` records packed layers in the configuration of the model that it is given, and not in that of a model that
takes them over later. So `PreTrainedModel.save_pretrained` is wrapped here, to record them before it writes.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from transformers import PreTrainedModel

from .host import TransformersHost, records
from .skeleton import packed_formats


def install() -> None:
    """Wrap the method, once in a process."""
    method = PreTrainedModel.save_pretrained
    if hasattr(method, "_isqtorch_wrapped"):
        return

    @wraps(method)
    def save_pretrained(self: Any, *args: Any, **options: Any) -> Any:
        if not records(self) and packed_formats(self):
            TransformersHost().changed(self, None)
        return method(self, *args, **options)

    save_pretrained._isqtorch_wrapped = method  # type: ignore[attr-defined]
    PreTrainedModel.save_pretrained = save_pretrained
