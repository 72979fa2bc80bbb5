"""Budgets: sizes such as "6GB", and numbers of bits per weight."""

from __future__ import annotations

from random import Random
from typing import Any

from fuzz import mutate
from fuzz.targets import Target
from isqtorch.auto.budget import Budget
from isqtorch.policy.options import Options

SEEDS = ("6GB", "5.5GiB", "800 MB", "1000000", "3TB", "0.5 kib")
WORDS = (
    "1e9",
    "e",
    ".",
    "-",
    "+",
    "/",
    "_",
    " ",
    "GB",
    "gb",
    "Ti",
    "B",
    "9" * 50,
    "0x10",
    "٣",
    "²",
    "\0",
    "\n",
    "inf",
    "nan",
)


def make(rng: Random) -> dict[str, Any]:
    size = mutate.text(rng, rng.choice(SEEDS), WORDS) if rng.random() < 0.8 else mutate.tree(rng, 10**9)
    if rng.random() < 0.8:
        return {"max_size": size}
    return {"target_bpw": mutate.tree(rng, 4.5), "formats": mutate.tree(rng, [4, "q8_0"])}


def run(options: dict[str, Any]) -> None:
    budget = Budget.of("op", "auto", Options(**options))
    assert budget is not None
    if budget.max_bytes is not None:
        assert budget.max_bytes > 0
    str(budget)


TARGET = Target(make, run)
