"""Measure speed, memory and load time of a model as it is and in each format, each in its own process.

    isqtorch bench -m examples/demo_model/model --isq 4,q8_0
    isqtorch bench -m ./my-model --isq 4,q8_0 --prompt-len 512 --gen-len 128
    isqtorch bench -m ./large-model --isq q4k --no-baseline --json
    isqtorch bench -m ./my-model --isq q4k --kv q8_0 --roofline

Prefill speed is the number of prompt tokens divided by the time until the first new token. Decode speed counts the new
tokens after the first. Both are medians over the repeats of `generate` with one sequence. Peak memory is that of the
process, minus its memory before loading.

--roofline also measures how fast this machine reads memory, and shows which share of that speed a token reaches, and
where its time goes: products, attention, other operators, Python, and what `generate` does around the model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from ._common import add_device, add_importance, add_json, add_kv, add_model, add_policy, kv_of, policy_options
from .doctor import machine_facts

_PACKAGE = Path(__file__).resolve().parents[2]
_START = f"import sys; sys.path[0] = {str(_PACKAGE)!r}; from isqtorch.cli import main; sys.exit(main())"
"""Runs this very package in another process. `python -m isqtorch` would take one in the current directory."""

HELP = "speed and memory of a model in several formats"
_HEADERS = ("format", "size", "load s", "peak memory", "prefill tok/s", "decode tok/s")
_WIDTHS = (10, 9, 7, 11, 18, 18)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--isq", metavar="FORMATS", help="formats or numbers of bits, with commas between them")
    parser.add_argument("--prompt-len", type=int, default=512, metavar="N", help="tokens of the prompt (%(default)s)")
    parser.add_argument("--gen-len", type=int, default=128, metavar="N", help="tokens to generate (%(default)s)")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="timed runs of each (%(default)s)")
    parser.add_argument("--no-baseline", action="store_true", help="not the model as it is")
    parser.add_argument(
        "--roofline", action="store_true", help="where the time of a token goes, and what memory would allow (CPU)"
    )
    parser.add_argument("--in-process", action="store_true", help="one measurement, in this process")
    add_policy(parser)
    add_importance(parser)
    add_device(parser)
    add_kv(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    formats = _check(args)
    if args.in_process:
        rows = [_measure(args, formats[0])]
        if not args.json:
            _print_head()
            _print_row(rows[0])
    else:
        if not args.json:
            print("\n".join(machine_facts()), end="\n\n")
            _print_head()
        rows = []
        for fmt in formats:
            row = _in_a_process(args, fmt)
            if row is not None:
                rows.append(row)
                if not args.json:
                    _print_row(row)
    if args.json:
        print(json.dumps({"machine": machine_facts(), "rows": rows}, indent=2))
    return 0 if len(rows) == len(formats) else 1


def _check(args: argparse.Namespace) -> list[str | None]:
    """The formats to measure_model, None for the model as it is. Checks all arguments before anything slow happens."""
    from isqtorch.app.model import check_request
    from isqtorch.formats import AUTO, mix_name

    for name, least in (("prompt_len", 1), ("gen_len", 2), ("repeat", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be {least} or more, got {getattr(args, name)}")
    names = list(dict.fromkeys(part.strip() for part in (args.isq or "").split(",") if part.strip()))
    options = policy_options(args)
    kv_of(args)
    if args.roofline and (args.device or "cpu").partition(":")[0] != "cpu":
        raise ValueError(f"--roofline knows CPUs, not {args.device}")
    if AUTO in map(mix_name, names):
        raise ValueError(
            "bench takes no 'auto': write the model with `isqtorch quantize --isq auto` and give that folder"
        )
    for name in names:
        check_request(args.model, name, args.device, options)
    if not names:
        check_request(args.model, None, args.device, options)
    formats = [*([] if args.no_baseline else [None]), *names]
    if args.in_process and names:
        formats = [*names]
    if not formats:
        raise ValueError("nothing to measure_model: --no-baseline needs --isq")
    if args.in_process and len(formats) > 1:
        raise ValueError("--in-process measures one format; later ones would find the memory of earlier ones")
    return formats


def _measure(args: argparse.Namespace, fmt: str | None) -> dict[str, Any]:
    from isqtorch.integrations.opening import needs_transformers

    with needs_transformers():
        from isqtorch.app.benchmark import measure_model
    return measure_model(
        args.model,
        fmt,
        prompt_len=args.prompt_len,
        gen_len=args.gen_len,
        repeat=args.repeat,
        device=args.device,
        options=policy_options(args) if fmt is not None else None,
        kv=kv_of(args),
        roofline=args.roofline,
    ).to_dict()


def _in_a_process(args: argparse.Namespace, fmt: str | None) -> dict[str, Any] | None:
    """`_measure` in a fresh process; None if it failed, with the reason on standard error."""
    command = [sys.executable, "-c", _START, "bench", "--in-process", "--json", "-m", args.model]
    command += ["--roofline"] * args.roofline
    given = {"--isq": fmt, "--prompt-len": args.prompt_len, "--gen-len": args.gen_len, "--repeat": args.repeat}
    given |= {"--device": args.device, "--kv": args.kv}
    if fmt is not None:
        given |= {"--" + name.replace("_", "-"): value for name, value in policy_options(args).items()}
    for option, value in given.items():
        if value is not None:
            command += [option, str(value)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        print(f"isqtorch: {fmt or 'the model as it is'}: failed with status {done.returncode}", file=sys.stderr)
        return None
    row: dict[str, Any] = json.loads(done.stdout)["rows"][0]
    return row


def _cells(row: dict[str, Any]) -> list[str]:
    from isqtorch.text import human_size

    def speed(name: str) -> str:
        low, high = row[f"{name}_range"]
        return f"{row[name]:.1f} ({low:.0f}-{high:.0f})"

    memory = human_size(row["peak_bytes"])
    return [
        row["format"],
        human_size(row["bytes"]),
        f"{row['load_seconds']:.1f}",
        memory,
        speed("prefill"),
        speed("decode"),
    ]


def _print_row(row: dict[str, Any]) -> None:
    print(_line(_cells(row)), flush=True)
    if row["roofline"] is not None:
        from isqtorch.app.roofline import lines

        print("\n".join(lines(row["roofline"])), end="\n\n", flush=True)


def _print_head() -> None:
    print(_line(_HEADERS))
    print(_line(["-" * width for width in _WIDTHS]), flush=True)


def _line(cells: list[str] | tuple[str, ...]) -> str:
    first, *rest = zip(cells, _WIDTHS, strict=True)
    return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)])
