"""GGUF files: metadata, directory, and the tensors in f32."""

from __future__ import annotations

from imatrix_files import GGUF, PAIR, gguf
from test_imatrix_fuzz import mutate

from fuzz.mutate import written
from fuzz.targets import Target
from isqtorch.files.binary import open_binary
from isqtorch.files.gguf import MAGIC, GgufFile

SEEDS = (GGUF, gguf(PAIR), gguf([]), gguf([("a" * 60, [2, 3, 4], [0.5] * 24), ("b", [8], [1.0] * 8)], version=2))


def run(data: bytes) -> None:
    with open_binary(written(data)) as reader:
        file = GgufFile(reader)
        for values in file.read_f32(file.tensors.values()).values():
            assert values.ndim == 1


TARGET = Target(lambda rng: MAGIC + mutate(SEEDS[rng.randrange(len(SEEDS))], rng)[4:], run)
