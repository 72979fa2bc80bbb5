"""Importance matrix files, in all three formats. The changes are those of tests/test_imatrix_fuzz.py."""

from __future__ import annotations

import torch
from test_imatrix_fuzz import SEEDS, mutate

from fuzz.mutate import written
from fuzz.targets import Target
from isqtorch.importance.imatrix import read_imatrix


def run(data: bytes) -> None:
    for values in read_imatrix(written(data)).values():
        assert torch.isfinite(values).all() and (values >= 0).all()


TARGET = Target(lambda rng: mutate(SEEDS[rng.randrange(len(SEEDS))], rng), run)
