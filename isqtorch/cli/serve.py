"""Serve a model over HTTP with OpenAI's API: chat, completions, streaming.

    isqtorch serve --port 1234 --isq 4 -m examples/demo_model/model
    isqtorch serve -m ./my-model-q4k --port 8080
    isqtorch serve -m my-model.gguf
    ISQTORCH_API_KEY=... isqtorch serve -m ./my-model --isq q4k --host 0.0.0.0       also for other machines

The server answers requests whose Host header names an address it listens on, localhost, or a name that was given
(--host, --allow-host). For other machines it wants an API key, which clients send as "Authorization: Bearer KEY".
Give it in the environment: everyone on this machine can read the arguments of a command in the list of processes.

Then, from another shell:

    curl http://127.0.0.1:1234/v1/completions -d '{"prompt": "The function returns", "max_tokens": 32}'
    curl http://127.0.0.1:1234/re_isq -d '{"isq": "q8_0"}'       changes the format of the running model

Replies to several clients are generated together, up to --batch of them; the tokens of a reply do not depend on the
others. A model that cannot do this answers one request at a time, and the command says so at its start. A change of
format waits for the requests before it, and later requests wait for it. It reads the weights from MODEL again; both
models are in memory together for a moment.
Ctrl-C ends the server.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ._common import (
    add_auto,
    add_device,
    add_importance,
    add_isq,
    add_json,
    add_kv,
    add_model,
    add_policy,
    kv_of,
    policy_options,
)

_MOST_AT_ONCE = 64

HELP = "serve a model over HTTP (OpenAI's API)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_isq(parser, required=False)
    add_policy(parser)
    add_importance(parser)
    add_auto(parser)
    add_device(parser)
    add_kv(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s: this machine only)")
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="also answer requests that use this name for the server, for example behind a proxy; can be repeated",
    )
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help="clients must send this key; better: the environment variable ISQTORCH_API_KEY, which others cannot see",
    )
    parser.add_argument(
        "--insecure", action="store_true", help="serve other machines without a key: whoever reaches the port"
    )
    parser.add_argument("--port", type=int, default=1234, help="port (%(default)s); 0: a free one")
    parser.add_argument("--name", help="what clients call the model; default: MODEL, of a folder or file its last part")
    parser.add_argument(
        "--batch", type=int, default=8, metavar="N", help="replies at once (%(default)s); 1: one after the other"
    )
    parser.add_argument(
        "--prefix-cache",
        type=int,
        default=256,
        metavar="MB",
        help="memory for the beginnings of prompts, which later prompts reuse (%(default)s); 0: none",
    )
    parser.add_argument(
        "--save-dir",
        type=Path,
        metavar="DIR",
        help="existing folder into which /calibration/apply may write models; without it clients can write nothing",
    )
    parser.add_argument("--log-level", choices=["info", "warning", "error"], default="warning", help="(%(default)s)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    from isqtorch.app.model import LoadedModel, check_request
    from isqtorch.app.server import Reach, Served, api_key, bind, build_app, check_exposure, serve

    if not 0 <= args.port < 1 << 16:
        raise ValueError(f"--port must be from 0 to 65535, got {args.port}")
    if not 1 <= args.batch <= _MOST_AT_ONCE:
        raise ValueError(f"--batch must be from 1 to {_MOST_AT_ONCE}, got {args.batch}")
    if args.prefix_cache < 0:
        raise ValueError(f"--prefix-cache must be 0 or more megabytes, got {args.prefix_cache}")
    if args.save_dir is not None and not args.save_dir.is_dir():
        raise NotADirectoryError(f"--save-dir {args.save_dir} is not a folder")
    options, kv = policy_options(args), kv_of(args)
    opened = check_request(args.model, args.isq, args.device, options)
    opened.check("reads", "serve")
    if opened.cls is None or getattr(opened.config, "is_encoder_decoder", False):
        opened.check("continues", "serve")  # an encoder alone has embeddings
    opened.check_tokenizer("serve")
    with bind(args.host, args.port) as sock:
        reach = Reach(sock, args.host, args.allow_host, api_key(args.api_key))
        check_exposure(reach, args.insecure)
        loaded = LoadedModel(args.model, args.isq, opened=opened, device=args.device, options=options, kv=kv, fast=True)
        _quiet_transformers(args.log_level)
        path = Path(args.model)
        served = Served(loaded, args.name or _name(path, args.model), args.batch, args.prefix_cache << 20)
        host, port = sock.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        app = build_app(served, reach, args.save_dir)
        sock.listen()  # now clients can connect
        if args.json:
            report = None if loaded.report is None else loaded.report.to_dict()
            print(json.dumps({"url": url, "model": served.name, "isq": loaded.isq, "report": report}), flush=True)
        else:
            if loaded.report is not None:
                print("\n".join(loaded.report.summary()))
            print(f"{served.name} at {url}/v1, loaded in {loaded.load_seconds:.1f} s; Ctrl-C ends", flush=True)
        alone = served.generations.scheduler.alone
        if not loaded.continues:
            print("isqtorch: the model does not continue texts; it has /v1/embeddings only", file=sys.stderr)
        elif alone is not None and args.batch > 1:
            print(f"isqtorch: one reply at a time, because of the model: {alone}", file=sys.stderr)
        if not reach.local:
            who = "with the key" if reach.has_key else "without a key"
            print(f"isqtorch: every machine that reaches this one can use the server, {who}", file=sys.stderr)
        serve(app, sock, args.log_level, ending=served.close)
    return 0


def _name(path: Path, model: str) -> str:
    """What clients call the model if nothing else is given."""
    if path.is_dir():
        return path.resolve().name
    return path.stem if path.exists() else model


def _quiet_transformers(level: str) -> None:
    """Silence transformers, which prints a warning for every request."""
    from transformers.utils import logging

    if level != "info":
        logging.set_verbosity_error()
