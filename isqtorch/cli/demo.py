"""Quantize a small trained model to every kind of format and compare size, quality, speed and text.

    isqtorch demo                                   the model in examples/demo_model, a few formats of every family
    isqtorch demo --plot quality.png
    isqtorch demo --formats 4 q5_1 afq4g32 --tokens 4096
    isqtorch demo --model ./my-model --text my.txt --json

All numbers are measured in this run. Each format starts from a fresh copy of the unquantized model.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from isqtorch.text import markdown_table

from ._common import add_json, load_model, read_text
from .doctor import machine_facts

HELP = "compare formats on the demo model: size, quality, speed, text"
FORMATS = ["8", "6", "5", "4", "3", "2", "q4_0", "q5_1", "afq4", "hqq4", "fp8", "iq4_xs", "mxfp4"]

_EXAMPLE = Path("examples/demo_model")
_CONTEXT = 512  # tokens per window of the quality measurements
_PROMPT = "The function returns"
_DECODE_TOKENS, _DECODE_REPEATS = 48, 3
_DECODE_SECONDS = 4.0  # no further repeat after this time

_TEXT_WIDTH = 100  # characters of generated text shown

_HEADERS = ("format", "size MB", "bits/weight", "perplexity", "KL", "top-1 %", "tokens/s")
_WIDTHS = (8, 8, 11, 10, 9, 8, 8)


@dataclass(frozen=True)
class Row:
    """One format's line of the table."""

    format: str
    size_mb: float  # all parameters and saved buffers, 10^6 bytes
    bits_per_weight: float  # of the whole model, norms included
    perplexity: float
    kl: float  # mean KL(unquantized || this), nats
    top1_agreement: float  # %
    tokens_per_second: float  # greedy decoding, one sequence
    text: str

    def cells(self) -> list[str]:
        kl = "0" if self.kl == 0 else f"{self.kl:.5f}"
        numbers = f"{self.size_mb:.2f} {self.bits_per_weight:.2f} {self.perplexity:.3f} {kl} {self.top1_agreement:.2f}"
        return [self.format, *numbers.split(), f"{self.tokens_per_second:.1f}"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="a model for transformers; default: the demo model")
    parser.add_argument("--text", help="held-out text, UTF-8; default: the demo model's")
    parser.add_argument("--formats", nargs="+", default=FORMATS, metavar="FORMAT", help="numbers of bits or names")
    parser.add_argument("--tokens", type=int, default=16384, help="held-out tokens to measure quality on (%(default)s)")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw quality against size (needs matplotlib)")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--markdown", action="store_true", help="print Markdown, for the README")
    add_json(group)


def run(args: argparse.Namespace) -> int:
    began = time.perf_counter()
    names = _check(args)
    model, tokenizer = load_model(args.model or _example("model"), "continues", "demo")
    ids = tokenizer(read_text(args.text or _example("heldout.txt")), verbose=False)["input_ids"][: args.tokens]
    measure = Measure(model, tokenizer, ids)
    facts = [
        *machine_facts(),
        f"{len(ids)} held-out tokens in windows of {_CONTEXT}; greedy decoding of {_DECODE_TOKENS}",
    ]
    live = not (args.json or args.markdown)
    if live:
        print("\n".join(facts), end="\n\n")
        print(_line(_HEADERS))

    rows = []
    for name in names:
        rows.append(measure(name))
        if live:
            print(_line(rows[-1].cells()), flush=True)
    seconds = time.perf_counter() - began

    if args.json:
        print(json.dumps({"machine": facts, "seconds": seconds, "rows": [asdict(row) for row in rows]}, indent=2))
    elif args.markdown:
        print(_markdown(rows, facts))
    else:
        print(f"\n{_texts(rows)}\n\n{len(rows)} models in {seconds:.0f} s")
    if args.plot:
        draw_demo(rows, args.plot)
        if live:
            print(f"plot: {args.plot}")
    return 0


def _check(args: argparse.Namespace) -> list[str]:
    """Check all arguments before anything slow happens; returns the canonical format names."""
    from isqtorch.formats import resolve_format

    if args.tokens < 2:
        raise ValueError(f"--tokens must be 2 or more, got {args.tokens}")
    if args.plot:
        if not args.plot.absolute().parent.is_dir():
            raise FileNotFoundError(f"no folder {args.plot.absolute().parent} for the plot")
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            raise ImportError("--plot draws with matplotlib: pip install 'isqtorch[plot]'") from error
    resolved = [resolve_format(spec).name for item in args.formats for spec in item.split(",") if spec]
    return ["", *dict.fromkeys(resolved)]  # "" is the model as it is


def _example(name: str) -> str:
    """The path of a file of the demo model, below the current folder or in the source tree of this package."""
    for root in (Path(), Path(__file__).resolve().parents[2]):
        path = root / _EXAMPLE / name
        if path.exists():
            return str(path)
    raise FileNotFoundError(
        f"{_EXAMPLE / name} not found: run this in a clone of the repository, or give --model and --text"
    )


class Measure:
    """Quantizes copies of a model and compares each with the original."""

    def __init__(self, model: nn.Module, tokenizer: Any, ids: list[int]) -> None:
        self.model, self.tokenizer, self.ids = model, tokenizer, ids
        self.name = str(model.dtype).removeprefix("torch.").replace("bfloat16", "bf16").replace("float", "f")
        self.numel = model_size(model)[1]
        self.prompt = tokenizer(_PROMPT, return_tensors="pt")
        self.reference: Tensor | None = None  # the unquantized model's logits, from the first call

    def __call__(self, name: str) -> Row:
        """Measure one format. The first call must be with "", the unquantized model."""
        from isqtorch.evaluation import Recorded, kl_divergence, perplexity, reference_logits
        from isqtorch.inplace.quantize import quantize_

        model = self.model
        if name:
            model = copy.deepcopy(self.model)
            quantize_(model, name, progress=False)
        size, _ = model_size(model)
        logits = reference_logits(model, self.ids, self.tokenizer, context=_CONTEXT)  # [scored positions, vocabulary]
        if self.reference is None:
            self.reference = logits
        divergence = kl_divergence(Recorded(logits), self.reference, self.ids, self.tokenizer, context=_CONTEXT)
        speed, text = self.decode(model)
        return Row(
            format=name or self.name,
            size_mb=size / 1e6,
            bits_per_weight=8 * size / self.numel,
            perplexity=float(perplexity(Recorded(logits), self.ids, self.tokenizer, context=_CONTEXT)),
            kl=divergence.mean,
            top1_agreement=divergence.top1_agreement,
            tokens_per_second=speed,
            text=text,
        )

    def decode(self, model: Any) -> tuple[float, str]:
        """Tokens per second of greedy decoding after a short prompt (median), and the generated text in one line."""
        settings = {"do_sample": False, "min_new_tokens": _DECODE_TOKENS, "max_new_tokens": _DECODE_TOKENS}
        model.generate(**self.prompt, do_sample=False, max_new_tokens=2)  # warm up
        seconds: list[float] = []
        while len(seconds) < _DECODE_REPEATS and sum(seconds) < _DECODE_SECONDS:
            began = time.perf_counter()
            ids = model.generate(**self.prompt, **settings)
            seconds.append(time.perf_counter() - began)
        new = ids[0, self.prompt["input_ids"].shape[1] :]
        return _DECODE_TOKENS / statistics.median(seconds), " ".join(self.tokenizer.decode(new).split())


def model_size(model: nn.Module) -> tuple[int, int]:
    """Size in bytes and number of elements of a state dict; shared tensors count once."""
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    return sum(t.nbytes for t in tensors.values()), sum(t.numel() for t in tensors.values())


def _line(cells: tuple[str, ...] | list[str]) -> str:
    first, *rest = [
        cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, _WIDTHS, strict=True))
    ]
    return "  ".join([first, *rest])


def _markdown(rows: list[Row], facts: list[str]) -> str:
    table = markdown_table(_HEADERS, [row.cells() for row in rows], right=range(1, len(_HEADERS)))
    return f"{table}\n\n{'; '.join(facts)}.\n\n```text\n{_texts(rows)}\n```"


def _texts(rows: list[Row]) -> str:
    lines = [f"{row.format:<8}  {row.text[:_TEXT_WIDTH]}" for row in rows]
    return "\n".join([f"{_PROMPT!r} goes on:", *lines])


def draw_demo(rows: list[Row], path: Path) -> None:
    """Plot divergence (log scale) against size, one labelled point per quantized format."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    from isqtorch.formats import get_format
    from isqtorch.report.labels import Label, place_labels

    base, *quantized = rows
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained", facecolor="white")
    solvers = list(dict.fromkeys(get_format(row.format).solver for row in quantized))
    colors = {row.format: f"C{solvers.index(get_format(row.format).solver) % 10}" for row in quantized}
    for row in quantized:
        marker = "osD^vP*X"[solvers.index(get_format(row.format).solver) % 8]  # families differ without colours, too
        axes.scatter(row.size_mb, row.kl, s=36, color=colors[row.format], marker=marker)
    axes.set_yscale("log")
    axes.margins(x=0.08, y=0.08)  # room for the labels
    axes.set_xlabel(f"size of the model, MB ({base.format}: {base.size_mb:.1f} MB)")
    axes.set_ylabel(f"mean KL divergence from {base.format}, nats")
    axes.set_title("Quality against size: lower left is better")
    axes.grid(True, which="both", alpha=0.25)
    place_labels(axes, [Label(row.size_mb, row.kl, row.format, colors[row.format]) for row in quantized])
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
