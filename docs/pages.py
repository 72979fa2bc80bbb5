"""Make the pages of the documentation site: the guide in parts, the other pages, and an API reference of the docstrings.

    python docs/pages.py build/docs          the pages, and build/mkdocs.yml for mkdocs
    make docs                                that, and the site in build/site; a broken link ends it

docs/guide.md is one page in the repository, so that one can search in it, and a page for each heading on the site. Its list of
contents says in which order and group. Links are moved along. A link to a file that is no page leads to the repository, if it
is known where that is (ISQTORCH_SOURCE_URL, or the clone's origin); else its text stays. This file needs no package.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GUIDE = "docs/guide.md"
IMAGES = (".png", ".svg")

PAGES = {
    "README.md": ("index.md", "isqtorch"),
    "docs/coming-from.md": ("coming-from.md", "Coming from another library"),
    "docs/formats.md": ("formats.md", "Formats"),
    "docs/models.md": ("models.md", "Models"),
    "docs/quality.md": ("quality.md", "Quality"),
    "benchmarks/README.md": ("speed.md", "Speed"),
    "benchmarks/results/intel-xeon-2026-11-22.md": ("speed-kernels.md", "Kernels, measured"),
    "benchmarks/results/models-amd-epyc-2026-12-01.md": ("speed-models.md", "Whole models, measured"),
    "benchmarks/results/models-amd-epyc-2026-12-01-smollm2.md": ("speed-smollm2.md", "SmolLM2, measured"),
    "docs/architecture.md": ("architecture.md", "Architecture"),
    "CONTRIBUTING.md": ("contributing.md", "Contributing"),
    "SECURITY.md": ("security.md", "Security"),
    "CHANGELOG.md": ("changelog.md", "Changelog"),
}
"""Files of the repository -> (page, title)."""

API = {
    "Quantize": [
        "quantize_",
        "requantize_",
        "dequantize_",
        "IsqConfig",
        "load",
        "Loaded",
        "plan",
        "refine_",
        "Refinement",
        "optimize_",
        "Optimization",
    ],
    "Report": ["QuantReport", "LayerReport", "explain", "Explanation"],
    "Formats and tensors": [
        "formats",
        "get_format",
        "resolve_format",
        "QuantFormat",
        "quantize",
        "QuantizedTensor",
        "Topology",
    ],
    "Importance": [
        "calibrate",
        "Calibration",
        "collect_imatrix",
        "read_imatrix",
        "Imatrix",
        "collect_moments",
        "Moments",
    ],
    "Quality": ["perplexity", "Perplexity", "kl_divergence", "KLResult", "reference_logits"],
    "Files": ["export_gguf", "export_mlx", "checkpoint"],
    "Layers": ["QuantLinear", "QuantEmbedding", "QuantExperts", "QuantizedCache", "metal"],
}
"""Page of the reference -> its public names. A name that is on none is an error."""

_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```.*?^```$", re.M | re.S)


@dataclass(frozen=True)
class Section:
    """A page of the guide."""

    title: str
    text: str  # with its heading as that of a page

    @property
    def page(self) -> str:
        return f"guide/{anchor(self.title)}.md"


def anchor(title: str) -> str:
    """The anchor of a heading, as GitHub and the site make it."""
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip())


def sections(text: str) -> list[Section]:
    """The guide at its headings of the second level. What stands above the first one is the page "Overview"."""
    hidden = _FENCE.sub(
        lambda block: re.sub(r"^#", "\0", block[0], flags=re.M), text
    )  # comments in code are no headings
    parts = [part.replace("\0", "#") for part in re.split(r"^(?=## )", hidden, flags=re.M)]
    found = [Section("Overview", parts[0])]
    for part in parts[1:]:
        title = part.partition("\n")[0].removeprefix("## ").strip()
        found.append(Section(title, _FENCE.sub(lambda block: re.sub(r"^#", "\0", block[0], flags=re.M), part)))
    raised = [re.sub(r"^#(#+ )", r"\1", each.text, flags=re.M).replace("\0", "#") for each in found[1:]]
    return [found[0], *(Section(each.title, text) for each, text in zip(found[1:], raised, strict=True))]


def groups(overview: str, titles: list[str]) -> dict[str, list[str]]:
    """The list of contents: name of a group -> titles of its pages. ValueError if it lacks a page, or names one twice."""
    found = {}
    for name, links in re.findall(r"^- ([\w ]+):((?:[^-].*\n?)+?)(?=^-|\n\n|\Z)", overview, re.M):
        found[name] = [title for title in titles if f"](#{anchor(title)})" in links]
    listed = [title for titles in found.values() for title in titles]
    missing = [title for title in titles if listed.count(title) != 1]
    if missing:
        raise ValueError(f"{GUIDE}: the list of contents must have each heading once; look at {', '.join(missing)}")
    return found


def anchors(parts: list[Section]) -> dict[str, str]:
    """Anchor of the whole guide -> page, or place on a page."""
    found = {}
    for part in parts:
        plain = _FENCE.sub("", part.text)
        for level, title in re.findall(r"^(#+) (.*)$", plain, re.M):
            found[anchor(title)] = part.page if level == "#" else f"{part.page}#{anchor(title)}"
    return found


class Links:
    """Where the links of the repository lead on the site."""

    def __init__(self, guide: Mapping[str, str], source: str | None) -> None:
        self.guide, self.source = guide, source
        self.images: set[Path] = set()

    def moved(self, text: str, file: str, page: str) -> str:
        """The text of a file as a page. FileNotFoundError for a link that leads nowhere."""

        def move(link: re.Match[str]) -> str:
            bang, label, target = link.groups()
            if re.match(r"\w+:", target):
                return link[0]
            path, _, place = target.partition("#")
            found = self._found(path, place, file)
            if found is None:
                return (
                    str(label) if self.source is None else f"{bang}[{label}]({self._outside(path, file, bool(bang))})"
                )
            return f"{bang}[{label}]({_relative(found, page)})"

        kept: list[str] = []

        def keep(block: re.Match[str]) -> str:
            kept.append(block[0])
            return f"\0{len(kept) - 1}\0"

        moved = _LINK.sub(move, _FENCE.sub(keep, text))
        return re.sub(r"\0(\d+)\0", lambda each: kept[int(each[1])], moved)

    def _found(self, path: str, place: str, file: str) -> str | None:
        target = file if not path else os.path.normpath((Path(file).parent / path).as_posix())
        if target == GUIDE:
            if place and place not in self.guide:
                raise FileNotFoundError(f"{file}: {GUIDE} has no heading for #{place}")
            return self.guide[place] if place else "guide/overview.md"
        if not (ROOT / target).exists():
            raise FileNotFoundError(f"{file}: the link {path} leads nowhere")
        if target.endswith(IMAGES):
            self.images.add(Path(target))
            return f"images/{Path(target).name}"
        if target in PAGES:
            return PAGES[target][0] + (f"#{place}" if place else "")
        return None

    def _outside(self, path: str, file: str, shown: bool) -> str:
        target = os.path.normpath((Path(file).parent / path).as_posix())
        kind = "raw" if shown else "tree" if (ROOT / target).is_dir() else "blob"
        return f"{self.source}/{kind}/main/{target}"


def _relative(target: str, page: str) -> str:
    path, found, place = target.partition("#")
    if path == page and place:
        return f"#{place}"
    return Path(os.path.relpath(path, Path(page).parent)).as_posix() + (f"#{place}" if found else "")


def source_url() -> str | None:
    """The web page of the repository, if it is known."""
    given = os.environ.get("ISQTORCH_SOURCE_URL")
    if not given and (ROOT / ".git").exists() and shutil.which("git"):
        git = ["git", "-C", str(ROOT), "config", "remote.origin.url"]
        given = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    page = re.sub(r"^git@([^:]+):", r"https://\1/", given or "").removesuffix(".git")
    return page if re.fullmatch(r"https://[\w.-]+/[\w./-]+", page) else None


def public_names() -> list[str]:
    """`isqtorch.__all__`, without importing the package."""
    tree = ast.parse((ROOT / "isqtorch/__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return [name for name in names if not name.startswith("__")]
    raise ValueError("isqtorch/__init__.py has no __all__")


def reference() -> dict[str, str]:
    """Pages of the API reference. ValueError if a public name is on none of them, or one of them is not public."""
    listed, public = [name for names in API.values() for name in names], public_names()
    if sorted(listed) != sorted(public):
        raise ValueError(f"docs/pages.py: API must have each public name once; look at {set(listed) ^ set(public)}")
    return {
        f"api/{anchor(title)}.md": f"# {title}\n\n" + "\n\n".join(f"::: {_place(name)}" for name in names) + "\n"
        for title, names in API.items()
    }


def _place(name: str) -> str:
    """Where a public name is found. Two functions have the names of the modules that they are in."""
    is_module = name in ("checkpoint", "metal")
    clashes = not is_module and any((ROOT / "isqtorch" / each).exists() for each in (name, f"{name}.py"))
    return f"isqtorch.{name}.{name}" if clashes else f"isqtorch.{name}"


def write(target: Path) -> None:
    """Write all pages, their images and the configuration of mkdocs."""
    shutil.rmtree(target, ignore_errors=True)
    parts = sections((ROOT / GUIDE).read_text(encoding="utf-8"))
    contents = groups(parts[0].text, [part.title for part in parts[1:]])
    links = Links(anchors(parts), source_url())
    pages = {part.page: links.moved(part.text, GUIDE, part.page) for part in parts}
    for file, (page, _) in PAGES.items():
        pages[page] = links.moved((ROOT / file).read_text(encoding="utf-8"), file, page)
    pages |= reference()
    for name, text in pages.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(text, encoding="utf-8")
    for image in links.images:
        (target / "images").mkdir(exist_ok=True)
        shutil.copy(ROOT / image, target / "images")
    shutil.copy(ROOT / "docs/site.css", target)
    (target.parent / "mkdocs.yml").write_text(configuration(parts, contents), encoding="utf-8")


def configuration(parts: list[Section], contents: Mapping[str, list[str]]) -> str:
    """mkdocs.yml beside the pages: docs/mkdocs.yml with the navigation."""
    page = {part.title: part.page for part in parts}

    def of(*files: str) -> list[str]:
        return [f"{PAGES[file][1]}: {PAGES[file][0]}" for file in files]

    lines = [
        "INHERIT: ../docs/mkdocs.yml",
        "docs_dir: docs",
        "site_dir: site",
        "nav:",
        "  - Home: index.md",
        "  - Guide:",
    ]
    lines.append("      - Overview: guide/overview.md")
    for name, titles in contents.items():
        lines += [f"      - {name}:", *(f'          - "{title}": {page[title]}' for title in titles)]
    for name, files in {
        "Choose": ("docs/coming-from.md", "docs/formats.md", "docs/models.md", "docs/quality.md"),
        "Speed": tuple(file for file in PAGES if file.startswith("benchmarks/")),
    }.items():
        lines += [f"  - {name}:", *(f"      - {each}" for each in of(*files))]
    lines += ["  - API:", *(f"      - {title}: api/{anchor(title)}.md" for title in API), "  - Project:"]
    lines += [
        f"      - {each}" for each in of("docs/architecture.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} FOLDER")
    write(Path(sys.argv[1]).absolute())
