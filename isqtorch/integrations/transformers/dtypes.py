"""`model.dtype` of a model that has only packed weights, such as OLMo, whose norms have none.

transformers takes the type of the first parameter of floats, and raises StopIteration if there is none, also when it
saves a model. So `ModuleUtilsMixin.dtype` is wrapped here. If transformers moves it, `install` raises, and every test
with transformers notices.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_utils import ModuleUtilsMixin

from isqtorch.modules import PackedModule


def install() -> None:
    """Wrap the property, once in a process."""
    read = ModuleUtilsMixin.dtype.fget
    if hasattr(read, "_isqtorch_wrapped"):
        return

    def dtype(self: Any) -> torch.dtype:
        try:
            return read(self)  # type: ignore[no-any-return]
        except StopIteration:
            packed = next((module for module in self.modules() if isinstance(module, PackedModule)), None)
            if packed is None:
                raise
            return packed.dtype

    dtype._isqtorch_wrapped = read  # type: ignore[attr-defined]
    ModuleUtilsMixin.dtype = property(dtype, doc=ModuleUtilsMixin.dtype.__doc__)
