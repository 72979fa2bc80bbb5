"""/v1/embeddings: a vector for each text.

How the states of the tokens become one vector is what the folder of the model says, in the files of
sentence-transformers. Without them an encoder takes the mean, and a decoder the last token, whose state alone has seen
the whole text.
"""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from starlette.responses import JSONResponse, Response
from torch import Tensor

from isqtorch.files.checkpoints import read_json

from .prompts import tokens_of
from .served import ApiError, Served

_MODES = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_lasttoken": "last"}


class Embeddings:
    """The endpoint."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.pooling = pooling_of(served.loaded.source) or ("last" if served.loaded.continues else "mean")

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Response:
        """The vectors of a checked body, one step after the other: replies go on between them."""
        served = self.served
        served.check_name(body.get("model"))
        prompts = await served.reader.async_submit(lambda: [tokens_of(served, text) for text in body["input"]])
        for inputs in prompts:
            served.admit(inputs["input_ids"].shape[-1], None)
        vectors = []
        for inputs in prompts:
            vectors.append(await asyncio.wrap_future(served.generations.scheduler.between(self._vector, inputs)))
        tokens = sum(inputs["input_ids"].shape[-1] for inputs in prompts)
        as_text = body.get("encoding_format") == "base64"
        data = [
            {"object": "embedding", "index": i, "embedding": _base64(vector) if as_text else vector.tolist()}
            for i, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "data": data, "model": served.name, "usage": usage})

    @torch.inference_mode()
    def _vector(self, inputs: Any) -> Tensor:
        """The vector of one text, of length 1; runs on the generating thread."""
        model = self.served.loaded.model
        trunk = model.base_model
        try:
            states = trunk(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])[0][0].float()
        except TypeError as error:
            raise ApiError(400, f"this model gives no embeddings: {error}") from None
        if self.pooling == "mean":
            pooled = states.mean(0)
        else:
            pooled = states[0 if self.pooling == "cls" else -1]
        vector: Tensor = torch.nn.functional.normalize(pooled, dim=0).cpu()
        return vector


def pooling_of(source: str) -> str | None:
    """What the folder of a model says; None: nothing.

    Raises:
        ValueError: it asks for what is not known here.
    """
    path = Path(source) / "1_Pooling" / "config.json"
    if not path.is_file():
        return None
    config = read_json(path)
    modes = {name for name, on in config.items() if name.startswith("pooling_mode_") and on is True}
    if len(modes) != 1 or not modes <= set(_MODES):
        raise ValueError(f"{path} asks for {json.dumps(sorted(modes))}; known is one of {', '.join(_MODES)}")
    return _MODES[modes.pop()]


def _base64(vector: Tensor) -> str:
    return base64.b64encode(vector.numpy().astype(np.float32).tobytes()).decode()
