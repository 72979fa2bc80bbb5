"""The headers of safetensors files."""

from __future__ import annotations

import json
import struct
from random import Random

from fuzz import mutate
from fuzz.targets import Target
from isqtorch.files.checkpoints import read_headers

HEADER = {
    "__metadata__": {"format": "pt", "isqtorch": "{}"},
    "model.layers.0.mlp.up_proj.weight": {"dtype": "F32", "shape": [4, 8], "data_offsets": [0, 128]},
    "lm_head.weight": {"dtype": "BF16", "shape": [2, 8], "data_offsets": [128, 160]},
    "packed": {"dtype": "U8", "shape": [1, 34], "data_offsets": [160, 194]},
}


def make(rng: Random) -> bytes:
    header = HEADER if rng.random() < 0.1 else mutate.tree(rng, HEADER)
    text = json.dumps(header, ensure_ascii=rng.random() < 0.9)
    if rng.random() < 0.3:
        text = mutate.text(rng, text, ("{", "}", "[", "]", '"', ",", ":", "\0", "9" * 30, "1e999", "NaN", "\\u0000"))
    raw = text.encode("utf-8", "surrogatepass")
    size = len(raw) if rng.random() < 0.9 else rng.choice((0, 1, len(raw) + 1, 2**31, 2**63, 2**64 - 1))
    return struct.pack("<Q", size) + raw + bytes(194)


def run(data: bytes) -> None:
    for dtype, shape in read_headers(mutate.written(data, "model.safetensors")).headers.values():
        assert isinstance(dtype, str) and all(size >= 0 for size in shape)


TARGET = Target(make, run)
