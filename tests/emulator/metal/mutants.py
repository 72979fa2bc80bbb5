"""Removes each barrier and each address space of shaders, one at a time, and wants something to object each time.

`python -m emulator.metal.mutants` (`make mutants`) runs the tests of the package's shaders, records their launches, and then
does the same launches with changed shaders. A mutant is killed by lint or the compiler, by an error of a launch, by an output
of other bits in some order of threads, or by ThreadSanitizer; the last kills it in the test suite because the suite looks for
races in the same launches. A mutant that survives means that the tests, or the shader, have a line too few, or too many.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import compiler, races, runner
from .machine import Machine, MetalError, bound_memory
from .tokens import closing, places, tokenize
from .translate import SPACES

BARRIERS = {"threadgroup_barrier", "simdgroup_barrier"}
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
MOST_LAUNCHES = 4  # that are tried per mutant
LARGEST_LAUNCH = 1 << 20  # bytes of its tensors
TESTS = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Site:
    """Something to remove: the same line of a header is one site, in whatever sources it is included."""

    what: str
    place: str  # file:line
    nth: int  # of its kind in that line

    def __str__(self) -> str:
        return f"{self.place}: {self.what}"


@functools.cache  # the same source is looked at for every site
def _spans(source: str) -> dict[Site, tuple[int, int]]:
    """Where in a source the sites are."""
    plain = COMMENT.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), source)
    tokens = tokenize(plain)
    found: dict[Site, tuple[int, int]] = {}
    at = 0
    for i, (token, place) in enumerate(zip(tokens, places(tokens), strict=True)):
        end = at + len(token)
        if token in SPACES or token in BARRIERS:
            if token in BARRIERS:
                end = at + sum(len(t) for t in tokens[i : closing(tokens, i + 1) + 1])
            nth = sum(site.what == token and site.place == place for site in found)
            found[Site(str(token), place, nth)] = (at, end)
        at += len(token)
    return found


def sites(launches: list[runner.Launch]) -> list[Site]:
    """All sites of the sources of some launches."""
    found: dict[Site, None] = {}
    for source in dict.fromkeys(source for source, _, _ in launches):
        found.update(dict.fromkeys(_spans(source)))
    return sorted(
        found, key=lambda site: (site.place.split(":")[0], int(site.place.split(":")[1]), site.what, site.nth)
    )


def killed_by(site: Site, launches: list[runner.Launch]) -> str:
    """What objects to the source without a site: "compiler", "error", "output" or "race"; "" if nothing does."""
    concerned = []
    for source, _, plan in launches:
        span = _spans(source).get(site)
        if span:
            kernel = f"^{re.escape(plan['kernel'])}$"
            concerned.append((source, source[: span[0]] + " " * (span[1] - span[0]) + source[span[1] :], kernel, plan))
    concerned = _spread(concerned, MOST_LAUNCHES)
    for _, mutant, kernel, _ in concerned:
        try:
            compiler.checked(mutant, kernel)
        except compiler.CompileError:
            return "compiler"
    if site.what in SPACES - {"threadgroup"}:
        return ""  # to the code that runs here, these mean nothing
    for source, mutant, kernel, plan in concerned:
        expected = _outputs(source, kernel, plan, "forward")
        for order in ("forward", "reverse", "shuffled"):
            try:
                if _outputs(mutant, kernel, plan, order) != expected:
                    return "output"
            except MetalError:
                return "error"
    if races.available() and races.find([(mutant, kernel, plan) for _, mutant, kernel, plan in concerned]):
        return "race"
    return ""


def _spread(things: list[Any], most: int) -> list[Any]:
    """At most so many, from the whole list."""
    return things if len(things) <= most else [things[i * (len(things) - 1) // (most - 1)] for i in range(most)]


def _outputs(source: str, kernel: str, plan: dict[str, Any], order: str) -> list[bytes]:
    """What memory holds after a launch."""
    machine = Machine(compiler.library(source, only=kernel))
    machine.set_options(order=order, seed=7)
    with bound_memory(machine, plan) as (addresses, buffers):
        machine.kernels[plan["kernel"]].launch(addresses, plan["threads"], plan["group"])
        sizes = [len(memory["data"]) for memory in plan["memories"]]
        return [ctypes.string_at(address, size) for address, size in zip(buffers, sizes, strict=True)]


class _Few(list[runner.Launch]):
    """Keeps of each kernel the smallest launch and the largest one that is not slow."""

    def append(self, launch: runner.Launch) -> None:
        mine = [
            i
            for i, (source, _, plan) in enumerate(self)
            if (source, plan["kernel"]) == (launch[0], launch[2]["kernel"])
        ]
        if len(mine) < 2:
            super().append(launch)
        elif _size(launch) < min(_size(self[i]) for i in mine):
            self[min(mine, key=lambda i: _size(self[i]))] = launch
        elif max(_size(self[i]) for i in mine) < _size(launch) <= LARGEST_LAUNCH:
            self[max(mine, key=lambda i: _size(self[i]))] = launch


def _size(launch: runner.Launch) -> int:
    return sum(len(memory["data"]) for memory in launch[2]["memories"])


def _record(tests: list[Path], chosen: str) -> list[runner.Launch]:
    """Launches of tests that pass."""
    import pytest

    with runner.recording(_Few()) as launches:
        if pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-k", chosen, *map(str, tests)]):
            raise SystemExit("mutants: the tests must pass without mutations first")
    return launches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sample", type=int, help="so many sites, chosen at random; default: all")
    parser.add_argument("--seed", type=int, default=0, help="of the choice")
    parser.add_argument("-k", default="any_order", help="which tests, as pytest has it (default: %(default)s)")
    parser.add_argument("tests", nargs="*", type=Path, default=sorted(TESTS.glob("test_metal*.py")))
    options = parser.parse_args()
    if not options.tests:
        print("mutants: the package has no tests of Metal shaders (tests/test_metal*.py)")
        return
    if compiler.compiler_command() is None:
        raise SystemExit("mutants: no clang++ >= 19: Debian's clang-19, PyPI's ziglang, or ISQTORCH_CLANG")
    launches = _record(options.tests, options.k)
    chosen = sites(launches)
    if options.sample is not None and options.sample < len(chosen):
        chosen = random.Random(options.seed).sample(chosen, options.sample)
    counts: dict[str, int] = {}
    for site in chosen:
        by = killed_by(site, launches) or "nothing"
        counts[by] = counts.get(by, 0) + 1
        if by == "nothing":
            print(f"{site}: removed, and nothing objects", flush=True)
    print(f"mutants: {len(chosen)} of {len(sites(launches))} sites, killed by {counts}")
    if not chosen or "nothing" in counts:
        sys.exit(1)


if __name__ == "__main__":
    main()
