"""The model card that `isqtorch quantize` writes: README.md, with what was done and how to load the model."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from isqtorch._version import __version__
from isqtorch.files.binary import read_bytes
from isqtorch.integrations.hub import is_id
from isqtorch.report.report import QuantReport
from isqtorch.text import human_size, markdown_table

CARD = "README.md"
_MARK = "<!-- written by isqtorch quantize -->"
_MOST = 1 << 20  # bytes of a card that is looked at


def is_ours(path: Path) -> bool:
    """Whether a card was written here and not edited beyond its mark, so that it may be replaced. False if there is none."""
    if not path.is_file() or path.is_symlink() or path.stat().st_size > _MOST:
        return False
    return _MARK.encode() in read_bytes(path, _MOST)


def card(report: QuantReport, model_class: str, source: str, arguments: Sequence[str]) -> str:
    """The text of the card.

    Args:
        report: the report of the packed model.
        model_class: name of the class of transformers.
        source: the folder, file or id that the model was loaded from.
        arguments: those of the command.
    """
    known = is_id(source) and not os.path.exists(source)
    name = source if known else Path(source).name  # a path of this machine means nothing elsewhere
    front = ["library_name: transformers", *([f"base_model: {source}"] if known else []), "tags:", "- isqtorch"]
    shown = [
        "isqtorch",
        *(name if word == source else Path(word).name if os.path.isabs(word) else word for word in arguments),
    ]
    parts = [
        "---\n" + "\n".join(front) + "\n---",
        _MARK,
        f"# {name}, packed",
        f"{len(report.quantized)} of {len(report.layers)} weights are packed: {human_size(report.bytes_before)} -> "
        f"{human_size(report.bytes_after)}, {report.bits_per_weight:.2f} bits per weight over the whole model.",
        _formats(report),
        "## How to load it",
        "```python\nimport isqtorch  # before or after transformers: it reads packed weights\n\n"
        f'model, tokenizer, report = isqtorch.load("FOLDER")  # a {model_class}\n```',
        "## How it was made",
        f"```sh\n{shlex.join(shown)}\n```",
        ", ".join(f"{package} {_version(package)}" for package in ("isqtorch", "torch", "transformers")) + ".",
    ]
    if report.imatrix is not None:
        parts.append(f"Importance: {Path(report.imatrix).name}.")
    parts += [f"- {note}" for note in report.notes]
    return "\n\n".join(parts) + "\n"


def _formats(report: QuantReport) -> str:
    """A row for every format: number of weights, bits, size, and the largest error that was measured."""
    rows = []
    for fmt in dict.fromkeys(layer.stored for layer in report.layers if layer.tied_to is None):
        layers = [layer for layer in report.layers if layer.stored == fmt and layer.tied_to is None]
        errors = [layer.error for layer in layers if layer.error is not None]
        bits = 8 * sum(layer.bytes_after for layer in layers) / max(1, sum(layer.numel for layer in layers))
        size = human_size(sum(layer.bytes_after for layer in layers))
        rows.append([fmt or "float", str(len(layers)), f"{bits:.2f}", size, f"{max(errors):.5f}" if errors else "-"])
    return markdown_table(("format", "weights", "bits/weight", "size", "largest error"), rows, right=range(1, 5))


def _version(package: str) -> str:
    if package == "isqtorch":
        return __version__
    try:
        return version(package)
    except PackageNotFoundError:
        return "?"
