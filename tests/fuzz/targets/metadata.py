"""The metadata of our own checkpoints, and what config.json records of a saved model."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from fuzz import mutate
from fuzz.targets import Target
from isqtorch.checkpoint import read_header
from isqtorch.integrations.record import checked_activations, checked_layers, checked_version

LAYER = {"kind": "linear", "format": "q8_0", "in_features": 64, "out_features": 8, "dtype": "float32"}
METADATA = {
    "format_version": 1,
    "layers": {"0": LAYER, "1": LAYER | {"kind": "embedding"}, "2": LAYER | {"kind": "experts", "experts": 4}},
    "shared": {"3.weight": "1.weight"},
}
RECORD = {"format_version": 1, "layers": {"a": "fp8", "b": "q4k"}, "activations": ["a"]}


def make(rng: Random) -> tuple[str, Any]:
    text = json.dumps(mutate.tree(rng, METADATA))
    if rng.random() < 0.2:
        text = mutate.text(rng, text, ("{", "}", "[", '"', "\0", "[" * 3000, "NaN", "9" * 5000))
    return text, mutate.tree(rng, RECORD)


def run(source: tuple[str, Any]) -> None:
    text, record = source
    if isinstance(record, dict):
        try:
            checked_version("op", record.get("format_version"))
            layers = checked_layers("op", record.get("layers"))
            checked_activations("op", record.get("activations"), layers)
        except ValueError:
            pass
    for entry in read_header({"isqtorch": text}, Path("file")).layers.values():
        assert all(size >= 0 for size in entry.packed_shape)


TARGET = Target(make, run)
