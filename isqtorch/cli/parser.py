"""The parser of the command line: what other programs call a command or an option is answered with its name here."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

_COMMANDS = {
    "chat": "run",
    "generate": "run",
    "server": "serve",
    "api": "serve",
    "convert": "export, or quantize",
    "pack": "quantize",
    "save": "quantize",
    "eval": "perplexity",
    "evaluate": "perplexity",
    "ppl": "perplexity",
    "benchmark": "bench",
    "calibrate": "imatrix",
    "estimate": "plan",
    "info": "plan",
    "inspect": "plan",
    "list": "formats",
    "check": "doctor",
}
_OPTIONS = {
    **dict.fromkeys(
        "--bits --wbits --w-bit --q-bits --quant --quantize --quantization --qtype --quant-type --format --dtype-weights "
        "--load-in-4bit --load-in-8bit --load_in_4bit --load_in_8bit --isq-bits --nbits".split(),
        "--isq 4",
    ),
    **dict.fromkeys("--group-size --q-group-size --groupsize".split(), "--isq afq4g32, where the group is 32"),
    **dict.fromkeys("--output --out --outfile --save --save-path --output-dir --mlx-path".split(), "-o"),
    **dict.fromkeys("--model-id --model-path --hf-path --repo -mf --gguf".split(), "-m"),
    **dict.fromkeys(
        "--dataset --calib --calibration --calibration-data --calib-data".split(), "--calibration-file FILE"
    ),
    **dict.fromkeys("--overwrite --yes -f".split(), "--force"),
    **dict.fromkeys("--importance --imatrix-file".split(), "--imatrix FILE"),
    **dict.fromkeys("--outtype --to-format".split(), "--to gguf or --to mlx"),
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and say what was probably meant.

    Attributes:
        instead: (positional argument, option that takes its place, as a regex of the word that gives it).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.instead: list[tuple[argparse.Action, str]] = []

    def add_model_first(self) -> None:
        """Let a command take the model as its first argument, or as -m like the others."""
        what = "a model folder, a .gguf file, an MLX folder, or a model id"
        self.instead.append((self.add_argument("model", metavar="MODEL", help=what), r"-m|--model(?:=|$)"))
        self.add_argument(
            "-m",
            "--model",
            dest="model",
            default=argparse.SUPPRESS,
            metavar="MODEL",
            help="the same, as other commands take it",
        )

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As ArgumentParser does. With -m among the arguments, none of the others is the model."""
        for action, option in self.instead:
            named = any(re.match(option, arg) for arg in args or ())
            action.nargs = action.default = argparse.SUPPRESS if named else None
            action.required = not named
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print the error, and end with status 2."""
        hint = _hint(message)
        self.exit(2, f"{self.prog}: {message}{hint and f'. {hint}'}. See {self.prog} --help.\n")


def _hint(message: str) -> str:
    """What a misplaced word of the command line probably means; "" if it is not clear."""
    for option in re.findall(r"(?<![\w-])--?[a-z][\w-]*", message):
        if "unrecognized" in message and option in _OPTIONS:
            return f"Here {option} is {_OPTIONS[option]}"
    chosen = re.search(r"argument COMMAND: invalid choice: '([\w-]+)'", message)
    if chosen is not None and chosen[1] in _COMMANDS:
        return f"Here {chosen[1]} is {_COMMANDS[chosen[1]]}"
    return ""
