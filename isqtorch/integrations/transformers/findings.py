"""What transformers finds while it loads a model: the keys that are missing, and those that it has no place for.

`from_pretrained(..., output_loading_info=True)` returns it too. But some classes have a `from_pretrained` of their own,
which cannot handle the pair that this returns: those of Qwen2.5-Omni and of the decision models. So
`PreTrainedModel._finalize_model_loading`, through which every load goes, is wrapped here. If transformers renames it,
`install` raises, and every test with transformers notices.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any

from transformers import PreTrainedModel

_SEAM = "_finalize_model_loading"
_found = threading.local()  # .pairs: [(model, what was found)] inside of `loaded`


def install() -> None:
    """Wrap the method, once in a process."""
    method = getattr(PreTrainedModel, _SEAM)
    if hasattr(method, "_isqtorch_wrapped"):
        return

    @wraps(method)
    def noted(model: Any, *args: Any, **options: Any) -> Any:
        info = method(model, *args, **options)
        if getattr(_found, "pairs", None) is not None:
            _found.pairs.append((model, info))
        return info

    noted._isqtorch_wrapped = method  # type: ignore[attr-defined]
    setattr(PreTrainedModel, _SEAM, staticmethod(noted))


def loaded(load: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """Load a model.

    Args:
        load: calls `from_pretrained`.

    Returns:
        The model, and what `output_loading_info=True` would give: {"missing_keys": ..., "unexpected_keys": ..., ...}.

    Raises:
        ValueError: the model was not read by the loader of transformers.
    """
    before, pairs = getattr(_found, "pairs", None), list[tuple[Any, Any]]()
    _found.pairs = pairs
    try:
        model = load()
    finally:
        _found.pairs = before
    if before is not None:
        before.extend(pairs)
    info = next((info for found, info in reversed(pairs) if found is model), None)  # a class may load its parts, too
    if info is None:
        raise ValueError(
            f"{type(model).__name__} reads its files in a way of its own, which does not say whether they have all weights. Load it "
            "with its from_pretrained, and call quantize_."
        )
    return model, info.to_dict()
