"""The documentation is true: snippets run, commands parse, generated tables are up to date, links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from isqtorch.cli import COMMANDS, build_parser
from isqtorch.formats import formats, get_format

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / name
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "docs/guide.md",
        "docs/coming-from.md",
        "docs/formats.md",
        "docs/quality.md",
        "docs/architecture.md",
    )
]
DOCS = [*PAGES, ROOT / "examples/demo_model/README.md", ROOT / "SECURITY.md", ROOT / "CHANGELOG.md"]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md"])
def test_python_snippets_run(page: str, tmp_path: Path) -> None:
    """One page, one program: a later snippet may use what an earlier one made."""
    pytest.importorskip("transformers")
    program = "\n".join(blocks(ROOT / page, "python"))
    if "import peft" in program or "from peft" in program:
        pytest.importorskip("peft")
    assert "quantize_" in program
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def commands() -> list[str]:
    found = [line for page in PAGES for block in blocks(page, "sh") for line in block.splitlines()]
    for command in COMMANDS:
        module = __import__(f"isqtorch.cli.{command}", fromlist=["x"])
        found += [line.strip() for line in (module.__doc__ or "").splitlines() if line.startswith("    ")]
    return [line for line in found if re.match(r"(\S+=\S+ )*(isqtorch|python -m isqtorch) ", line)]


@pytest.mark.parametrize("line", commands())
def test_commands_parse(line: str) -> None:
    words = shlex.split(re.split(r"\s{2,}|\|", line.split("#")[0])[0])
    while "=" in words[0]:
        words.pop(0)
    words = words[1:] if words[0] == "isqtorch" else words[3:]
    build_parser().parse_args(words)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in DOCS:
        for target in re.findall(r"^make ([a-z0-9-]+)|`make ([a-z0-9-]+)", page.read_text(encoding="utf-8"), re.M):
            assert re.search(rf"^{''.join(target)}:", makefile, re.M), f"{name_of(page)}: make {''.join(target)}"


def test_generated_tables_are_up_to_date() -> None:
    subprocess.run([sys.executable, ROOT / "docs/tables.py", "--check"], check=True, timeout=120)


@pytest.mark.parametrize("page", ["README.md", "docs/formats.md"])
def test_format_table_has_every_format(page: str) -> None:
    table = (
        (ROOT / page)
        .read_text(encoding="utf-8")
        .partition("<!-- formats:begin -->")[2]
        .partition("<!-- formats:end")[0]
    )
    for name in formats():
        assert f"| `{name}` | {get_format(name).bits_per_weight:g} |" in table


@pytest.mark.parametrize("page", DOCS, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http:", "https:", "mailto:")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_named_in_code_exist(page: Path) -> None:
    for path in re.findall(
        r"`((?:isqtorch|csrc|docs|examples|tests|\.ci)/[\w./-]+)`", page.read_text(encoding="utf-8")
    ):
        assert (ROOT / path).exists(), f"{name_of(page)} names {path}"
