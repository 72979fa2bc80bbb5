"""Check that a tag names the version that is released.

python -m release.version v0.1.0
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def faults(tag: str) -> list[str]:
    """What keeps a tag from being a release; [] if nothing does."""
    text = (ROOT / "isqtorch" / "_version.py").read_text(encoding="utf-8")
    found = re.search(r"""__version__ = ["']([^"']+)["']""", text)
    assert found is not None
    version = found[1]
    wrong = (
        []
        if tag == f"v{version}"
        else [f"the tag is {tag!r:.80}, and isqtorch/_version.py has {version}: expected v{version}"]
    )
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    if not re.search(rf"^## {re.escape(version)}\b", changes, re.M):
        wrong.append(f"CHANGELOG.md has no section '## {version}': rename 'Unreleased'")
    return wrong


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        print("usage: python -m release.version TAG", file=sys.stderr)
        return 2
    found = faults(argv[0])
    for fault in found:
        print(f"isqtorch: {fault}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
