"""Steps of a model with a cache: of one prompt, and of a batch. Whether a model can be batched is tried, not assumed."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from .kv import Batch, new_cache
from .rowwise import attend_rowwise, rows

_TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-2}  # of scores, as a part of their spread
_HALF_TOLERANCE = 0.1  # bfloat16 and float16 round more, and differently for other shapes
_LONG, _SHORT = 9, 4  # tokens of the texts that are tried


class Stepper:
    """A model, called as its forward pass wants to be called."""

    def __init__(self, model: Any) -> None:
        self.model = model
        attend_rowwise(model)
        taken = inspect.signature(model.forward).parameters
        self._positions = "position_ids" in taken
        self._cache = "cache" if "cache" in taken else "past_key_values"  # its name changes in transformers 5.24
        self._keep = {"logits_to_keep": 1} if "logits_to_keep" in taken else {}

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    def read(self, cache: Any, ids: list[int], done: int) -> Tensor:
        """Scores `[1, V]` of the token after `ids`, of which the cache holds the first `done`."""
        new = torch.tensor([ids[done:]], device=self.device)
        return self._scores(
            cache,
            input_ids=new,
            attention_mask=torch.ones((1, len(ids)), dtype=torch.long, device=self.device),
            position_ids=torch.arange(done, len(ids), device=self.device).unsqueeze(0),
        )

    def step(self, batch: Batch, tokens: list[int]) -> Tensor:
        """Scores `[rows, V]` after one more token in each row."""
        with rows([length + 1 for length in batch.tokens]):
            scores = self._scores(batch.cache, **batch.inputs(tokens, self.device))
        batch.stepped()
        return scores

    def _scores(self, cache: Any, **inputs: Tensor) -> Tensor:
        if not self._positions:
            del inputs["position_ids"]
        out = self.model(**inputs, **{self._cache: cache}, use_cache=True, return_dict=True, **self._keep)
        scores: Tensor = out.logits[:, -1].float()  # as `generate` does
        return scores


@torch.inference_mode()
def why_not_batched(model: Any, kv: tuple[str, str] | None = None) -> str | None:
    """Why replies of a model cannot be generated together; None: they can.

    Two texts of different lengths are continued together and alone. A model that ignores the padding, or that keeps a
    state which cannot be joined, gives other scores or fails.

    Args:
        model: the model.
        kv: the formats of keys and of values in the cache; None: floats.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        return "it has an encoder"
    if not hasattr(model, "generate") or not model.can_generate():
        return "it does not continue texts"
    if getattr(model, "_is_stateful", False):
        return "it keeps a recurrent state"
    if not model._supports_default_dynamic_cache():
        return "it has a cache of its own kind"
    if new_cache(model, kv) is None:
        return "it keeps a state that cannot be joined"
    vocabulary = model.config.get_text_config().vocab_size
    long, short = ([(i * step + 7) % vocabulary for i in range(n)] for step, n in ((31, _LONG), (17, _SHORT)))
    try:
        stepper = Stepper(model)

        def begun(ids: list[int]) -> Any:
            cache = new_cache(model, kv)
            stepper.read(cache, ids[:-1], 0)
            return cache

        apart = torch.cat([stepper.step(Batch(begun(ids)), ids[-1:]) for ids in (short, long)])
        batch = Batch(begun(short))
        batch.join(begun(long))
        together = stepper.step(batch, [short[-1], long[-1]])
    except Exception as error:  # any model may be served; one that fails here is called by `generate` as before
        return f"a trial failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    spread = (apart - apart.mean(-1, keepdim=True)).norm(dim=-1)
    off = float(((together - apart).norm(dim=-1) / spread.clamp(min=1e-6)).max())
    if not off < _TOLERANCE.get(model.dtype, _HALF_TOLERANCE):  # also if it is not a number
        return f"its scores change by {off:.3g} of their spread if a longer text is beside it"
    return None
