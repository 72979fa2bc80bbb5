"""The documentation site: the guide in pages, links that follow, a reference of all public names, calls that exist."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import sys
from pathlib import Path

import pytest

import isqtorch
from isqtorch.cli import build_parser

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))

import pages  # noqa: E402

GUIDE = (ROOT / "docs/guide.md").read_text(encoding="utf-8")


def test_the_guide_is_all_there() -> None:
    parts = pages.sections(GUIDE)
    headings = re.findall(r"^## (.*)$", re.sub(r"^```.*?^```$", "", GUIDE, flags=re.M | re.S), re.M)
    assert [part.title for part in parts] == ["Overview", *headings]
    words = [word for part in parts for word in part.text.split() if not set(word) <= {"#"}]
    assert words == [word for word in GUIDE.split() if not set(word) <= {"#"}]
    for part in parts:
        assert part.text.startswith(f"# {part.title}\n") or part.title == "Overview"
    assert "# a comment" in pages.sections("top\n\n## One\n\n```sh\n# a comment\n```\n\n### Two\n")[1].text
    assert pages.sections("top\n\n## One\n\n### Two\n")[1].text == "# One\n\n## Two\n"


def test_every_heading_is_in_the_contents_once() -> None:
    parts = pages.sections(GUIDE)
    titles = [part.title for part in parts[1:]]
    found = pages.groups(parts[0].text, titles)
    assert sorted(title for group in found.values() for title in group) == sorted(titles) and len(found) > 3
    for wrong in (
        parts[0].text.replace("[Install](#install), ", ""),
        parts[0].text.replace("[Install](#install)", "[a](#install), [Serve](#serve)"),
    ):
        with pytest.raises(ValueError, match="must have each heading once"):
            pages.groups(wrong, titles)


def test_pages_are_written_with_links_that_lead_somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISQTORCH_SOURCE_URL", "https://example.org/group/isqtorch")
    target = tmp_path / "docs"
    pages.write(target)
    written = {path.relative_to(target).as_posix() for path in target.rglob("*.md")}
    navigation = re.findall(r": ([\w/-]+\.md)$", (tmp_path / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    assert written == set(navigation) and len(navigation) == len(written)
    for page in target.rglob("*.md"):
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        for link in re.findall(r"\]\(([^)#\s]+)", text):
            if not link.startswith("https:"):
                assert (page.parent / link).resolve().is_relative_to(target), (page.name, link)
                assert (page.parent / link).exists(), (page.name, link)
    lora = (target / "coming-from.md").read_text(encoding="utf-8")
    assert "(guide/lora-on-a-quantized-model.md)" in lora
    assert "(https://example.org/group/isqtorch/blob/main/examples/tensor_parallel.py)" in (
        target / "guide/several-devices-or-processes.md"
    ).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "page", "moved"),
    [
        ("[a](#serve)", "guide/install.md", "[a](serve.md)"),
        ("[a](guide.md#fp8-activations)", "formats.md", "[a](guide/on-an-nvidia-gpu.md#fp8-activations)"),
        ("[a](guide.md)", "formats.md", "[a](guide/overview.md)"),
        ("[a](../README.md)", "formats.md", "[a](index.md)"),
        ("![a](quality.png)", "guide/install.md", "![a](../images/quality.png)"),
        ("[a](../examples/tour.py)", "formats.md", "a"),
        ("[a](https://example.org)", "formats.md", "[a](https://example.org)"),
        ("```\n[a](#nothing)\n```", "formats.md", "```\n[a](#nothing)\n```"),
    ],
)
def test_links_are_moved(text: str, page: str, moved: str) -> None:
    links = pages.Links(pages.anchors(pages.sections(GUIDE)), None)
    assert links.moved(text, "docs/guide.md", page) == moved


@pytest.mark.parametrize("text", ["[a](nothing.md)", "[a](#no-such-heading)", "[a](guide.md#no-such-heading)"])
def test_a_broken_link_is_an_error(text: str) -> None:
    links = pages.Links(pages.anchors(pages.sections(GUIDE)), None)
    with pytest.raises(FileNotFoundError, match=r"docs/guide\.md"):
        links.moved(text, "docs/guide.md", "guide/install.md")


def test_the_reference_has_every_public_name() -> None:
    assert set(pages.public_names()) == set(isqtorch.__all__) - {"__version__"} | {"IsqConfig"}
    places = re.findall(r"^::: (.*)$", "\n".join(pages.reference().values()), re.M)
    assert len(places) == len(set(places)) == len(pages.public_names())
    assert "isqtorch.formats.formats" in places and "isqtorch.explain.explain" in places


def ours() -> list[str]:
    """The calls in the right columns of the tables for users of other libraries."""
    text = (ROOT / "docs/coming-from.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[-1] for line in text.splitlines() if line.startswith("| ") and "`isqtorch" in line]
    return [call for row in rows for call in re.findall(r"`([^`]+)`", row)]


@pytest.mark.parametrize("call", ours())
def test_calls_for_users_of_other_libraries_exist(call: str, tmp_path: Path) -> None:
    """A command parses; a call of Python names a public function, its arguments, and a format."""
    if call.startswith("isqtorch "):
        args = build_parser().parse_args(shlex.split(call)[1:])
        isq = getattr(args, "isq", None)
    else:
        pytest.importorskip("transformers")
        (node,) = ast.parse(call).body
        assert isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        function = getattr(isqtorch, ast.unparse(node.value.func).removeprefix("isqtorch."))
        values = [None if isinstance(arg, ast.Name) else ast.literal_eval(arg) for arg in node.value.args]
        options = {str(word.arg): ast.literal_eval(word.value) for word in node.value.keywords}
        bound = inspect.signature(function).bind(*values, **options).arguments
        isq = bound.get("isq", bound.get("fmt"))
    if isq is not None and isq != "q4k_m":
        assert isqtorch.resolve_format(isq)


def test_every_library_has_calls() -> None:
    text = (ROOT / "docs/coming-from.md").read_text(encoding="utf-8")
    for name in ("bitsandbytes", "torchao", "hqq", "llama.cpp", "MLX"):
        part = text.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        assert part.count("`isqtorch") >= 6, name
