"""Rewrite the generated parts of README.md, docs/formats.md and docs/guide.md, between their `<!-- name:begin -->` and `<!-- name:end -->`.

python docs/tables.py                 the tables of formats and of methods of other libraries, from their registries
python docs/tables.py --check         exit 1 if a file is out of date, write nothing
python docs/tables.py --demo FILE     also the demo table: FILE is the output of `isqtorch demo --markdown`
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the tables of this source tree, whatever is installed

from isqtorch.cli.formats import markdown  # noqa: E402
from isqtorch.formats.stored.methods import METHODS  # noqa: E402
from isqtorch.text import markdown_table  # noqa: E402

FILES = [ROOT / "README.md", ROOT / "docs" / "formats.md", ROOT / "docs" / "guide.md"]


def stored() -> str:
    """The table of the methods by which other libraries quantize checkpoints; names for one method share a row."""
    names: dict[tuple[str, str], list[str]] = {}
    for name, method in METHODS.items():
        names.setdefault((method.reads, method.held), []).append(f"`{name}`")
    rows = [(", ".join(each), *facts) for facts, each in names.items()]
    return markdown_table(("`quant_method`", "what is read", "taken over as"), rows)


COST = ("bf16", "q8_0", "q6k", "q5k", "q4k", "q3k", "q2k")


def cost(demo: str) -> str:
    """The first rows that a reader sees: the demo's table for the formats that a number of bits means."""
    rows = {line.split(" | ")[0].removeprefix("| "): line.strip("| \n").split(" | ") for line in demo.splitlines()}
    headers = ("format", "size MB", "perplexity", "KL from bf16", "same first choice %", "tokens/s")
    chosen = [[name, *(rows[name][column] for column in (1, 3, 4, 5, 6))] for name in COST]
    return markdown_table(headers, chosen, right=range(1, 6))


def replace(text: str, name: str, content: str) -> str:
    """`text` with the part between the markers of `name` replaced; unchanged if it has no such markers."""
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    head, found, rest = text.partition(begin)
    if not found:
        return text
    _, found, tail = rest.partition(end)
    if not found:
        raise SystemExit(f"docs/tables.py: {begin.strip()} without {end}")
    return head + begin + content.strip() + "\n" + end + tail


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--demo", type=Path, metavar="FILE")
    args = parser.parse_args()
    parts = {"formats": markdown(), "stored": stored()}
    if args.demo:
        parts["demo"] = args.demo.read_text(encoding="utf-8")
    readme = FILES[0].read_text(encoding="utf-8")
    parts["cost"] = cost(parts.get("demo") or readme.partition("<!-- demo:begin -->")[2].partition("<!-- demo:end")[0])
    stale = []
    for path in FILES:
        old = new = path.read_text(encoding="utf-8")
        for name, content in parts.items():
            new = replace(new, name, content)
        if new != old:
            stale.append(str(path.relative_to(ROOT)))
            if not args.check:
                path.write_text(new, encoding="utf-8")
    if args.check and stale:
        print(f"out of date: {', '.join(stale)}; run `make tables`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
