"""The `isqtorch` command: one file per subcommand, with `HELP`, `add_arguments(parser)` and `run(args) -> status`.

Exit status: 0 success; 1 an error that the user can fix, printed in one line; 2 wrong usage (argparse); 130
interrupted.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from isqtorch._version import __version__

from . import bench, demo, doctor, export, formats, imatrix, perplexity, plan, quantize, run, serve
from .parser import Parser

__all__ = ["COMMANDS", "build_parser", "main"]

COMMANDS = {
    "run": run,
    "serve": serve,
    "bench": bench,
    "demo": demo,
    "perplexity": perplexity,
    "quantize": quantize,
    "export": export,
    "imatrix": imatrix,
    "plan": plan,
    "formats": formats,
    "doctor": doctor,
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line. The docstring of a command's file is its help text."""
    parser = Parser(
        prog="isqtorch",
        description="Quantize PyTorch models in place, and see what it costs and saves.",
        epilog="isqtorch run -m FOLDER --isq 4 loads a model in 4 bits to chat with it. isqtorch COMMAND --help has examples.",
    )
    parser.add_argument("--version", action="version", version=f"isqtorch {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.HELP,
            description=command.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; None reads `sys.argv`.

    Returns:
        The exit status, see the module's docstring.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # A file or pipe whose encoding lacks a letter, as on Windows, gets an escape for it, as standard error does.
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = build_parser()
    args = parser.parse_args(argv)
    args.words = list(sys.argv[1:] if argv is None else argv)  # for records of what was done
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("isqtorch: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `isqtorch formats | head`: the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        if args.debug:
            raise
        print(f"isqtorch: {' '.join(str(error).split())}", file=sys.stderr)  # always one line
        return 1
