"""Arguments of the command line: parsing, and the options that come of them. No model is loaded."""

from __future__ import annotations

import contextlib
import io
from random import Random

from fuzz import mutate
from fuzz.targets import Target
from isqtorch.cli import build_parser
from isqtorch.cli._common import policy_options
from isqtorch.policy.options import Options
from isqtorch.policy.request import Request

SEEDS = (
    ["quantize", "-m", "model", "--isq", "q4k", "-o", "out", "--fallback", "skip"],
    ["quantize", "-m", "model", "--isq", "auto", "--max-size", "6GB", "--formats", "4,8", "-o", "out"],
    ["plan", "-m", "model", "--isq", "4", "--rule", "search", "--organization", "moqe"],
    ["run", "-m", "model", "--isq", "8", "hello", "--topology", "file"],
    ["serve", "-m", "model", "--port", "8000", "--host", "127.0.0.1"],
    ["perplexity", "-m", "model", "--isq", "q8_0"],
    ["imatrix", "-m", "model", "-o", "x.gguf"],
    ["bench", "-m", "model"],
    ["formats", "--json"],
    ["doctor"],
)
LEAVES = (
    *mutate.TEXTS,
    "--isq",
    "-m",
    "--max-size",
    "--target-bpw",
    "--rule",
    "--help",
    "--",
    "-",
    "@file",
    "1e9",
    "nan",
    "q9z",
)
PARSER = build_parser()


def make(rng: Random) -> list[str]:
    words = list(rng.choice(SEEDS))
    for _ in range(rng.randrange(4)):
        at = rng.randrange(len(words))
        kind = rng.randrange(4)
        if kind == 0:
            words[at] = rng.choice(LEAVES)
        elif kind == 1:
            words.insert(at + 1, rng.choice(LEAVES))
        elif kind == 2 and len(words) > 1:
            del words[at]
        else:
            words[at] = mutate.text(rng, words[at], mutate.TEXTS)
    return words


def run(words: list[str]) -> bool:
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            args = PARSER.parse_args(words)
    except SystemExit as end:
        assert end.code in (0, 2), end.code
        return False
    if hasattr(args, "isq") and hasattr(args, "imatrix"):  # the commands that pack a model
        names = set(Options.__dataclass_fields__)
        options = {name: value for name, value in policy_options(args).items() if name in names}
        spec = int(args.isq) if str(args.isq).isdecimal() else args.isq
        Request(spec, Options(**options), "isqtorch")
    return True


TARGET = Target(make, run)
