"""`isqtorch plan --recommend`: what to take for the memory at hand, and the commands to type."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from isqtorch.text import human_size

if TYPE_CHECKING:
    from isqtorch.report.recommend import Candidate, Recommendation

_FEW_BITS = 4
"""At so many bits and fewer, error feedback is worth its minutes."""


def run(args: argparse.Namespace) -> int:
    """Print the recommendation. Status 1 if nothing fits."""
    from isqtorch.policy.options import parsed_bytes
    from isqtorch.report.recommend import recommend

    for option in ("isq", "plot", "rule", "activations", "details"):
        if getattr(args, option):
            raise ValueError(f"--recommend chooses a format; leave out --{option}")
    memory = args.memory and parsed_bytes(
        "plan", "--memory", int(args.memory) if args.memory.isdecimal() else args.memory
    )
    options = {"topology": args.topology, "organization": args.organization, "fallback": args.fallback}
    found = recommend(args.model, context=args.context, device=args.device, memory=memory, **options)
    commands = [] if found.best is None else _commands(args, found, found.best)
    if args.json:
        print(json.dumps({**found.to_dict(), "commands": commands}, indent=2))
    else:
        print("\n".join(_lines(found, commands, given=memory is not None)))
    return 0 if found.best is not None else 1


def _lines(found: Recommendation, commands: Sequence[str], *, given: bool) -> list[str]:
    memory, overview = found.memory, found.found
    free = human_size(memory.free) + ("" if given else f" free of {human_size(memory.total)}")
    cache = (
        ""
        if overview.cache_bytes is None
        else f"the cache of {overview.context} tokens {human_size(overview.cache_bytes)}, "
    )
    rest = f"of them {cache}one weight while it is packed {human_size(overview.largest)}"
    lines = [f"{memory.name}: {free}; {rest}.", f"The weights may take {human_size(max(0, found.room))}.", ""]
    if found.best is None:
        smallest = found.smallest
        missing = smallest.nbytes - found.room
        lines += [
            f"Nothing fits: {_named(smallest)} is the smallest, with {human_size(smallest.nbytes)}; {human_size(missing)} are missing.",
            "Take a smaller model, a shorter --context, or a machine with more memory.",
        ]
    else:
        lines += [_line("Take", found.best), *(f"    {command}" for command in commands)]
        if found.faster is not None:
            lines += [
                "",
                _line("Faster and smaller:", found.faster)
                + f". In place of --isq {found.best.bits}: --isq {found.faster.bits}",
            ]
        elif found.best.bits is not None and found.best.bits <= _FEW_BITS:
            lines += [
                "",
                "With --rule feedback --calibration-file TEXT, the loss is about half as large at the same size.",
            ]
    return [*lines, *(f"note: {note}" for note in overview.notes)]


def _line(verb: str, candidate: Candidate) -> str:
    bpw = "" if candidate.report is None else f" ({candidate.report.bits_per_weight:.2f} bits per weight)"
    return f"{verb} {_named(candidate)}: {human_size(candidate.nbytes)}{bpw}, {candidate.worth}"


def _named(candidate: Candidate) -> str:
    return "the weights as they are" if candidate.bits is None else f"{candidate.bits} bits, {candidate.formats}"


def _commands(args: argparse.Namespace, found: Recommendation, best: Candidate) -> list[str]:
    """What to type: to use the model, and to write it. Python where the commands cannot open it."""
    given = [] if best.bits is None else ["--isq", str(best.bits)]
    for option, default in (("topology", None), ("organization", "default"), ("fallback", "up")):
        if getattr(args, option) != default:
            given += [f"--{option}", getattr(args, option)]
    place = [] if found.memory.name == "RAM" else ["--device", found.memory.name]
    opens, continues = _opens(args.model)
    if not opens:
        options = "".join(
            f", {option}={getattr(args, option)!r}"
            for option, default in (("topology", None), ("organization", "default"), ("fallback", "up"))
            if getattr(args, option) != default
        )
        return [f"isqtorch.quantize_(model, {best.bits}{options})"]
    name = Path(args.model.rstrip("/")).name.removesuffix(".gguf").partition(":")[0]
    target = f"{name}-{best.bits}bit" if best.bits else f"{name}-packed"
    commands = [["isqtorch", "run", "-m", args.model, *given, *place]] if continues else []
    if best.bits is not None or not os.path.isdir(args.model):
        commands.append(["isqtorch", "quantize", "-m", args.model, *given, "-o", target])
    return [shlex.join(command) for command in commands]


def _opens(model: str) -> tuple[bool, bool]:
    """Whether the commands can open a model, and whether `isqtorch run` can."""
    from isqtorch.integrations.classes import unable
    from isqtorch.integrations.opening import Opened

    try:
        opened = Opened.of(model)
    except (ValueError, OSError, ImportError) as error:
        print(f"isqtorch: the commands cannot open {model}: {error}", file=sys.stderr)
        return False, False
    return True, unable(opened.cls, opened.config, "answers") is None
