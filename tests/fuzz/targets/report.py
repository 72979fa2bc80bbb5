"""Topologies of reports: what is written for any formats of any layers says the same when it is read."""

from __future__ import annotations

from random import Random

from fuzz import mutate
from fuzz.targets import Target
from isqtorch.policy.topology import Topology

NAMES = (
    "model.layers.{}.mlp.up_proj",
    "h.{}.attn",
    "blocks.{}.a.{}",
    "lm_head",
    "a-b.{}",
    "weird [{}] name",
    "ü.{}",
    "{}",
    "x\ny{}",
)
FORMATS = ("q4k", "q8_0", "afq4g32.f16", "hqq4", "fp8", None)


def make(rng: Random) -> dict[str, str | None]:
    formats = {}
    for _ in range(rng.randrange(1, 12)):
        number = rng.choice((0, 1, 2, 3, 10, 11, 10**9))
        formats[rng.choice(NAMES).format(number, rng.randrange(3))] = rng.choice(FORMATS)
    return formats


def run(formats: dict[str, str | None]) -> None:
    path = mutate.folder() / "topology.yaml"
    Topology.exact(formats).save(path)
    again = Topology.load(path)
    for name, fmt in formats.items():
        entry = again.find(name)
        assert entry is not None and entry.spec == fmt and entry.leave == (fmt is None), name
    assert again.find("another.layer") is None


TARGET = Target(make, run, promised=())
