"""What several commands share: model arguments, loading with transformers, tables."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m", "--model", required=True, help="a folder with config.json and safetensors, or a model id on the Hub"
    )


def add_isq(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument(
        "--isq",
        required=required,
        metavar="FORMAT",
        help="bits (2 3 4 5 6 8: the best format for the device) or a name; `isqtorch formats` lists them",
    )


def add_policy(parser: argparse.ArgumentParser) -> None:
    """The options of `quantize_` that decide which layer gets which format."""
    parser.add_argument("--topology", metavar="FILE", help="YAML file with a format per layer, range or /regex/")
    parser.add_argument(
        "--organization", choices=["default", "moqe"], default="default", help="moqe: quantize only the experts"
    )
    parser.add_argument(
        "--fallback",
        choices=["up", "skip", "error"],
        default="up",
        help="where a format's blocks do not divide a layer: a larger format, leave the layer, or stop",
    )


def add_imatrix(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--imatrix", metavar="FILE", help="importance matrix: .imatrix, .gguf or .cimatrix")


def add_json(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


@contextlib.contextmanager
def needs_transformers() -> Iterator[None]:
    """Turn a missing transformers into one line that says what to do."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in ("transformers", "accelerate"):
            raise
        raise ImportError("this command loads models with transformers: pip install 'isqtorch[hf]'") from error


def load_model(model: str) -> tuple[Any, Any]:
    """A causal language model in evaluation mode and its tokenizer.

    A folder that `isqtorch quantize` wrote is built from its configuration and then filled with the packed weights; anything
    else goes through `from_pretrained`.
    """
    with needs_transformers():
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, utils

    utils.logging.disable_progress_bar()
    _check_folder(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    if is_checkpoint(model):
        from accelerate import init_empty_weights

        from .. import checkpoint

        with init_empty_weights():  # buffers, which no file has, are real
            net = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
        checkpoint.load_(net, Path(model))
    else:
        net = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    return net.eval(), tokenizer


def _check_folder(model: str) -> None:
    """A path that does not exist would be looked up on the Hub, with a confusing message."""
    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") > 1
    if looks_like_path and not Path(model).is_dir():
        raise FileNotFoundError(f"no folder {model}: give a folder with config.json and safetensors, or a model id")
    if os.path.isdir(model) and not Path(model, "config.json").is_file():
        raise FileNotFoundError(f"{model} has no config.json: it is not a model folder")


def is_checkpoint(model: str) -> bool:
    """Whether a folder holds weights packed by isqtorch."""
    from safetensors import safe_open

    path = Path(model, "model.safetensors")
    if not path.is_file():
        return False
    with safe_open(path, framework="pt") as file:
        return any(key.startswith("isqtorch") for key in file.metadata() or {})


def read_text(path: str) -> str:
    """A UTF-8 text file; ValueError if it is not one."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from error
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text


def text_table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """Columns aligned with spaces; `right` are the indices of right-aligned columns."""
    widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]
    lines = []
    for row in [headers, ["-" * width for width in widths], *rows]:
        cells = [
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """The same as a Markdown table."""
    rule = ["--:" if i in right else "---" for i in range(len(headers))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [headers, rule, *rows])
