"""The quantization_config of config.json: of a request, and of a saved model."""

from __future__ import annotations

from random import Random
from typing import Any

from fuzz import mutate
from fuzz.targets import Target
from isqtorch.integrations.transformers import IsqConfig

REQUEST = {
    "quant_method": "isq",
    "isq": "q4k",
    "topology": {"0-2": "q8_0", "/lm_head/": None},
    "organization": "default",
    "include": ["mlp"],
    "exclude": "lm_head",
    "modules_to_not_convert": ["gate"],
    "fallback": "up",
    "rule": None,
    "activations": None,
    "target_bpw": None,
    "max_size": None,
    "formats": None,
}
AUTO = REQUEST | {"isq": "auto", "target_bpw": 4.5, "formats": [4, "q8_0"]}
SAVED = {
    "quant_method": "isq",
    "format_version": 1,
    "isqtorch_version": "0.1.0",
    "isq": "fp8",
    "include": ["mlp"],
    "activations": ["a.b"],
    "layers": {"a.b": "fp8", "c": "q4k"},
}


def make(rng: Random) -> dict[str, Any]:
    found = mutate.tree(rng, rng.choice((REQUEST, AUTO, SAVED)))
    return found if isinstance(found, dict) else {"isq": found}


def run(source: dict[str, Any]) -> None:
    config = IsqConfig.from_dict(dict(source))
    config.to_dict()
    repr(config)


TARGET = Target(make, run)
