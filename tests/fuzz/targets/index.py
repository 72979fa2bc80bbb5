"""Folders of checkpoints: the index, and config.json."""

from __future__ import annotations

import json
import struct
from random import Random

from fuzz import mutate
from fuzz.targets import Target
from isqtorch.files.checkpoints import read_headers

INDEX = {
    "metadata": {"total_size": 128},
    "weight_map": {"a.weight": "model.safetensors", "b.weight": "model-00002.safetensors"},
}
CONFIG = {
    "model_type": "llama",
    "hidden_size": 8,
    "tie_word_embeddings": True,
    "quantization_config": {"quant_method": "isq"},
}
LEAVES = (*mutate.LEAVES, "model.safetensors", "../file", "/etc/passwd", "model.safetensors/", ".", "..")


def weights(name: str) -> bytes:
    header = json.dumps({name: {"dtype": "F32", "shape": [4, 8], "data_offsets": [0, 128]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(128)


FIRST, SECOND = weights("a.weight"), weights("b.weight")


def make(rng: Random) -> tuple[str, str]:
    texts = []
    for source in (INDEX, CONFIG):
        text = json.dumps(mutate.tree(rng, source, LEAVES))
        texts.append(
            mutate.text(rng, text, ("{", "}", "[", '"', "\0", "[" * 2000, "NaN")) if rng.random() < 0.2 else text
        )
    return texts[0], texts[1]


def run(source: tuple[str, str]) -> None:
    mutate.written(FIRST, "model.safetensors")
    mutate.written(SECOND, "model-00002.safetensors")
    mutate.written(source[0], "model.safetensors.index.json")
    mutate.written(source[1], "config.json")
    read_headers(mutate.folder())


TARGET = Target(make, run)
