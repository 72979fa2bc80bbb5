"""Topology files, and which layers they match."""

from __future__ import annotations

from pathlib import Path
from random import Random

from fuzz import mutate
from fuzz.targets import Target
from isqtorch.policy.topology import Topology

SEEDS = (
    "0-8: q5k\n12: {isq: q8_0, device: \"cuda:1\"}\n'/\\.mlp\\.down_proj$/': 6\n'/lm_head/': null\n",
    "'/^model\\.layers\\.(0|1|2)\\.mlp\\.(up|down)_proj$/': afq4\n3: hqq8\n",
    "{0: q4k, 1-3: 8, /attn/: {isq: null}}\n",
)
WORDS = ("!!timestamp ", "!!bool ", "!!python/object:os.system ", "&a ", "*a ", "<<: ", "? ", "- ", "|\n", "> ", "%YAML 1.1\n", "---\n",
         "...\n", "{", "}", "[", "]", ": ", "'", '"', "0", "00", "'0'", "9" * 30, "-", "1-1", "8-2", "/(a+)+$/", "/a{99999999999}/",
         "/[/", "/(?P<n>x)(?P=n)/", "null", "true", "1e400", "q4k", "auto", "device: ", "isq: ", "cuda:-1",
         "\0", "\t", "\ud800")  # fmt: skip
LAYERS = ("model.layers.0.mlp.down_proj", "model.layers.12.self_attn.q_proj", "lm_head", "h.3.attn", "a" * 40 + "!")


def make(rng: Random) -> str:
    return mutate.text(rng, rng.choice(SEEDS), WORDS)


def run(source: str) -> None:
    path: Path = mutate.written(source)
    topology = Topology.load(path)
    for name in LAYERS:
        topology.find(name)
    assert Topology.load(topology.to_dict()).to_dict() == topology.to_dict()


TARGET = Target(make, run)
