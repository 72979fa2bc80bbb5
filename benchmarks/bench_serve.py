"""Clients of `isqtorch serve`: tokens per second of several at once against one after the other, and the wait for the first token.

    python -m benchmarks.bench_serve -m MODEL --isq q4k
    python -m benchmarks.bench_serve -m examples/demo_model/model --isq 4 --clients 4 --tokens 16 --rounds 1

A server process of its own answers streams over HTTP, with greedy decoding. Both ways take turns; medians of all rounds count.
The texts must be the same in both ways.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple


class Reply(NamedTuple):
    """A streamed reply.

    Attributes:
        text: of all parts.
        tokens: their number, as the server counts.
        first: seconds until the first part.
    """

    text: str
    tokens: int
    first: float


@contextmanager
def served(model: str, isq: str | None) -> Iterator[str]:
    """The address of a server process."""
    command = [sys.executable, "-m", "isqtorch", "serve", "--json", "--port", "0", "-m", model]
    process = subprocess.Popen([*command, *(["--isq", isq] if isq else [])], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"bench_serve: the server of {model} has ended")
        yield json.loads(line)["url"].removeprefix("http://")
    finally:
        process.terminate()
        process.wait()


def ask(address: str, prompt: str, tokens: int) -> Reply:
    """One reply."""
    connection = http.client.HTTPConnection(address, timeout=600)
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    began = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body))
    answer = connection.getresponse()
    if answer.status != 200:
        raise SystemExit(f"bench_serve: {answer.read().decode()}")
    text, made, first = "", 0, 0.0
    for line in answer:
        if not line.startswith(b"data: {"):
            continue
        first = first or time.perf_counter() - began
        part = json.loads(line.removeprefix(b"data: "))
        text += part["choices"][0]["text"]
        made = part.get("usage", {}).get("completion_tokens", made)
    connection.close()
    return Reply(text, made, first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("--isq", help="format or number of bits; left out: as the model is stored")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="of each reply")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    prompts = [f"Story number {i}: once upon a time in a land far away there lived a" for i in range(args.clients)]
    one, all_, waits = [], [], []
    with served(args.model, args.isq) as address, ThreadPoolExecutor(args.clients) as pool:
        ask(address, prompts[0], args.tokens)  # the first reply also touches all weights
        for _ in range(args.rounds):
            began = time.perf_counter()
            alone = [ask(address, prompt, args.tokens) for prompt in prompts]
            middle = time.perf_counter()
            together = list(pool.map(lambda prompt: ask(address, prompt, args.tokens), prompts))
            end = time.perf_counter()
            if [reply.text for reply in alone] != [reply.text for reply in together]:
                raise SystemExit("bench_serve: replies differ from those that a client gets alone")
            one.append(sum(reply.tokens for reply in alone) / (middle - began))
            all_.append(sum(reply.tokens for reply in together) / (end - middle))
            waits += sorted(reply.first for reply in together)
    ratio = statistics.median(many / single for many, single in zip(all_, one, strict=True))
    p95 = sorted(waits)[int(0.95 * (len(waits) - 1))]
    print(
        f"one after the other: {statistics.median(one):.0f} tokens/s; {args.clients} clients: {statistics.median(all_):.0f} tokens/s, "
        f"{ratio:.2f} times; first token: median {statistics.median(waits):.3f} s, p95 {p95:.3f} s"
    )


if __name__ == "__main__":
    main()
