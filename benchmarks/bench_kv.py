"""Packed keys and values (`isqtorch.QuantizedCache`): what they cost in quality, and how fast attention is with them.

    python -m benchmarks.bench_kv                              the demo model, and attention of one token
    python -m benchmarks.bench_kv --model FOLDER --text FILE   another model
    python -m benchmarks.bench_kv --no-speed --tokens 8192

Quality: a text is read in windows through the cache, so that every token but the first ones sees packed states. The KL divergence is
that of the next token's distribution from the one with a cache of floats; perplexities are of the same tokens. Speed: attention of one
token to 4,096 others, the caches of several layers in turns so that they come from memory, against torch's attention in bf16 as
transformers calls it for one token (heads that share keys as rows of one query), medians.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import isqtorch
from isqtorch.formats.kv import kv_formats
from isqtorch.text import markdown_table

from .ours import Here
from .timing import interleave

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "examples" / "demo_model"
CACHES = ("q8_0", "q8_0/q5_1", "q8_0/q4_0", "q5_1", "q4_1", "iq4_nl", "q4_0")
SHAPES = {
    "Llama-3.2-1B": (32, 8, 64),
    "Llama-3.1-8B": (32, 8, 128),
    "SmolLM2-135M": (9, 3, 64),
    "Gemma-3-1B": (4, 1, 256),
}
CONTEXT = 4096
_FIRST, _PIECE = 16, 64  # tokens that a window begins with, and that are read at a time after them
_BYTES = 256 << 20  # of all layers that take turns: more than caches hold


def logits(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """Log probabilities of the next token after each token but the first ones, `[T - 1 - first, vocabulary]`."""
    parts = []
    ends = [_FIRST, *range(_FIRST + _PIECE, ids.shape[1], _PIECE), ids.shape[1]]
    start = 0
    for end in ends:
        parts.append(model(ids[:, start:end], cache=cache, use_cache=True).logits[0].float())
        start = end
    return torch.cat(parts)[_FIRST:-1].log_softmax(-1)


@torch.no_grad()
def quality(model: Any, ids: Tensor, window: int, names: tuple[str, ...]) -> list[tuple[str, float, float, float]]:
    """(cache, perplexity, mean KL divergence, share of tokens whose likeliest next one is the same)."""
    from transformers import DynamicCache

    loss = dict.fromkeys(("floats", *names), 0.0)
    kl, same, count = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0), 0
    for part in ids.split(window, 1):
        if part.shape[1] < window:
            break
        targets = part[0, _FIRST + 1 :]
        floats = logits(model, part, DynamicCache(config=model.config))
        loss["floats"] += float(functional.nll_loss(floats, targets, reduction="sum"))
        count += len(targets)
        for name in names:
            packed = logits(model, part, isqtorch.QuantizedCache(model.config, name))
            loss[name] += float(functional.nll_loss(packed, targets, reduction="sum"))
            kl[name] += float(functional.kl_div(packed, floats, log_target=True, reduction="sum"))
            same[name] += float((packed.argmax(-1) == floats.argmax(-1)).sum())
    rows = [("floats", float(torch.tensor(loss["floats"] / count).exp()), 0.0, 1.0)]
    return rows + [
        (name, float(torch.tensor(loss[name] / count).exp()), kl[name] / count, same[name] / count) for name in names
    ]


class Turns:
    """Calls with the caches of several layers in turns."""

    def __init__(self, call: Any, layers: list[Any]) -> None:
        self._call, self._layers, self._next = call, layers, 0

    def __call__(self) -> None:
        self._next = (self._next + 1) % len(self._layers)
        self._call(*self._layers[self._next])


def speed(shape: tuple[int, int, int], rounds: int) -> dict[str, float]:
    """Microseconds of attention of one token, by the cache."""
    heads, groups, dim = shape
    layers = max(2, min(16, _BYTES // (4 * groups * CONTEXT * dim)))
    states = [tuple(torch.randn(2, 1, groups, CONTEXT, dim)) for _ in range(layers)]
    q = torch.randn(1, heads, 1, dim).bfloat16()
    together = q.view(1, groups, heads // groups, dim)

    def torchs(k: Tensor, v: Tensor) -> None:
        functional.scaled_dot_product_attention(together, k, v)

    calls = {"bf16": Turns(torchs, [(k.bfloat16(), v.bfloat16()) for k, v in states])}
    for name in CACHES:
        fmts = kv_formats(name)
        packed = [tuple(isqtorch.ops.quantize(s, fmt) for s, fmt in zip(pair, fmts, strict=True)) for pair in states]

        def ours(k: Tensor, v: Tensor, fmts: tuple[str, str] = fmts) -> None:
            isqtorch.ops.attention(q, k, v, *fmts, dim**-0.5, None)

        calls[name] = Turns(ours, packed)
    threads = torch.get_num_threads()
    contenders = {name: Here(call, threads=threads) for name, call in calls.items()}
    samples = interleave(contenders, rounds=rounds, seconds=0.01)
    return {name: 1e6 * sample.median(threads) for name, sample in samples.items()}


def bits(name: str) -> float:
    """Bits of a number of keys and values."""
    return sum(isqtorch.get_format(fmt).bits_per_weight for fmt in kv_formats(name)) / 2


def quality_table(rows: list[tuple[str, float, float, float]]) -> str:
    cells = [
        [name, f"{bits(name):.2f}" if name != "floats" else "16", f"{ppl:.3f}", f"{kl:.5f}", f"{100 * same:.2f} %"]
        for name, ppl, kl, same in rows
    ]
    return markdown_table(["cache", "bits", "perplexity", "KL divergence", "same next token"], cells)


def speed_table(found: dict[str, dict[str, float]]) -> str:
    names = ["bf16", *CACHES]
    cells = [
        [shape, *(f"{times[name]:.0f} ({times['bf16'] / times[name]:.1f}x)" for name in names)]
        for shape, times in found.items()
    ]
    return markdown_table(["us", *names], cells)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO / "model"), help="a folder or file, as for isqtorch.load")
    parser.add_argument("--text", type=Path, default=DEMO / "heldout.txt")
    parser.add_argument("--tokens", type=int, default=4096, help="of the text (%(default)s)")
    parser.add_argument("--window", type=int, default=1024, help="tokens that share a cache (%(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="of the timing (%(default)s)")
    parser.add_argument("--no-quality", action="store_true")
    parser.add_argument("--no-speed", action="store_true")
    args = parser.parse_args()
    if not args.no_quality:
        loaded = isqtorch.load(args.model)
        ids = loaded.tokenizer(args.text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[:, : args.tokens]
        print(quality_table(quality(loaded.model, ids, min(args.window, ids.shape[1]), CACHES)), flush=True)
    if not args.no_speed:
        print(f"\nattention of one token at {CONTEXT} tokens, {torch.get_num_threads()} threads:\n")
        print(speed_table({name: speed(shape, args.rounds) for name, shape in SHAPES.items()}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
