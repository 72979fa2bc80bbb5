"""Chat with a model in the terminal, or continue one prompt.

    isqtorch run -m examples/demo_model/model --isq 4 --prompt "The function returns"
    isqtorch run -m ./my-model --isq q4k --system "Answer in one sentence."
    isqtorch run -m ./my-model-q4k --temperature 0.7 --seed 1
    isqtorch run -m my-model.gguf
    echo "The function returns" | isqtorch run -m examples/demo_model/model --isq q4k --max-new-tokens 20
    isqtorch run -m ./my-model --isq 4 --prompt "Why is the sky blue?" --json

Without --prompt it is a chat if standard input is a terminal; otherwise all of standard input is one prompt. In a chat,
Ctrl-C ends a reply, and Ctrl-D or /exit ends the chat. /clear forgets what was said. /re_isq q8_0 changes the format of
the model; /re_isq q8_0 stored starts from the quantized weights instead of the checkpoint. /imatrix collects importance
from the chat: the next /re_isq uses it, and /imatrix FILE writes it. /help lists the commands. At a terminal the arrow
keys edit the line and bring back earlier ones, and Tab completes a command; nothing of that is written to disk.
The text goes to standard output, everything else to standard error.

A base model has no chat template: it continues what you write, and remembers nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from isqtorch.app.chat import Conversation, Reply, Stop
    from isqtorch.app.model import LoadedModel
    from isqtorch.importance.calibration import Calibration
    from isqtorch.report.report import QuantReport

HELP = "chat with a model, or continue a prompt"
_HELP = "/help lists the commands; Ctrl-C ends a reply, Ctrl-D the chat"
_COMMANDS = {
    "/clear": "forget what was said",
    "/re_isq FORMAT [SOURCE]": "change the format; with /imatrix before, by what it has collected",
    "/imatrix": "collect importance from what is said from now on",
    "/imatrix FILE": "write what was collected so far",
    "/help": "this list",
    "/exit": "end the chat, like Ctrl-D",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_isq(parser, required=False)
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="one message, one reply")
    parser.add_argument("--interactive", action="store_true", help="chat although standard input is no terminal")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="limit of a reply (%(default)s)")
    parser.add_argument(
        "--temperature", type=float, help="0: always the likeliest token; default: the model's settings"
    )
    parser.add_argument("--top-p", type=float, help="sample from the likeliest tokens of this total probability")
    parser.add_argument("--seed", type=int, help="of sampling, for every reply")
    add_kv(parser)
    add_policy(parser)
    add_importance(parser)
    add_auto(parser)
    add_device(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    prompt = _check(args)
    from isqtorch.app.model import LoadedModel, check_request

    options, kv = policy_options(args), kv_of(args)
    opened = check_request(args.model, args.isq, args.device, options)
    opened.check("answers", "run")
    opened.check_tokenizer("run")
    from isqtorch.app.chat import Conversation, Sampling

    loaded = LoadedModel(args.model, args.isq, opened=opened, device=args.device, options=options, kv=kv, fast=True)
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p, args.seed)
    conversation = Conversation(loaded, sampling, args.system)
    _note(f"{args.model}{_format(loaded)}, loaded in {loaded.load_seconds:.1f} s")
    if not conversation.has_template:
        if args.system is not None:
            raise ValueError(f"{args.model} is a base model without a chat template: it takes no --system")
        _note("a base model without a chat template: it continues what you write")
    if prompt is None:
        return _chat(conversation)
    reply = _reply(conversation, prompt, echo=not args.json)
    if args.json:
        print(json.dumps({"model": args.model, "isq": args.isq, **reply.to_dict()}, indent=2))
    else:
        _note(_speed([reply]))
    return 130 if reply.finish == "interrupted" else 0


def _check(args: argparse.Namespace) -> str | None:
    """Check all arguments; returns the prompt, or None for a chat."""
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be 1 or more, got {args.max_new_tokens}")
    if args.temperature is not None and not 0 <= args.temperature < float("inf"):
        raise ValueError(f"--temperature must be 0 or more, got {args.temperature}")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise ValueError(f"--top-p must be above 0 and up to 1, got {args.top_p}")
    prompt: str | None = args.prompt
    chat = args.interactive or (prompt is None and sys.stdin.isatty())
    if chat and (prompt is not None or args.json):
        raise ValueError("--prompt and --json are for one reply, not for a chat")
    if prompt is None and not chat:
        prompt = sys.stdin.read().rstrip("\n")
    if prompt is not None and not prompt.strip():
        raise ValueError("the prompt is empty")
    return prompt


def _chat(conversation: Conversation) -> int:
    """Messages and commands, line by line, until the input ends."""
    if sys.stdin.isatty():
        _edit_lines()
        _note(_HELP)
    watch = _Watch(conversation.loaded)
    replies: list[Reply] = []
    while True:
        try:
            line = _read()
        except KeyboardInterrupt:  # at the prompt: drop the line
            print(file=sys.stderr)
            continue
        if line is None or line == "/exit":
            break
        try:
            if line.startswith("/"):
                _command(conversation, watch, line)
            elif line:
                replies.append(_reply(conversation, line))
        except (ValueError, OSError) as error:  # the line is wrong or too long; the chat goes on
            _note(" ".join(str(error).split()))
    watch.end()
    if replies:
        _note(_speed(replies))
    return 0


def _edit_lines() -> None:
    """Let `input` edit lines, remember them, and complete commands, where Python has readline."""
    try:
        import readline
    except ImportError:  # it is optional in Python
        return
    names = sorted({command.partition(" ")[0] for command in _COMMANDS})

    def complete(text: str, state: int) -> str | None:
        found = [name for name in names if text and name.startswith(text)]
        return found[state] if state < len(found) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" ")  # else a command would begin behind its slash
    libedit = "libedit" in (readline.__doc__ or "")  # on a Mac
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")


class _Watch:
    """The collection of importance from a chat; it begins with the first /imatrix."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._running: contextlib.ExitStack | None = None
        self._imatrix: Calibration | None = None

    def begin(self) -> None:
        """Watch the layers from now on."""
        from isqtorch.importance.calibration import calibrate

        if self._running is not None:
            raise ValueError("importance is being collected already; /imatrix FILE writes it, /re_isq FORMAT uses it")
        with contextlib.ExitStack() as stack:
            self._imatrix = stack.enter_context(calibrate(self._loaded.model))
            self._running = stack.pop_all()
        _note("collecting importance")

    def save(self, path: str) -> None:
        """Write what was collected so far."""
        im = self._collected()
        im.save(path)
        _note(f"wrote {path}: importance of {im.tokens} tokens")

    def requantize(self, isq: str, source: str | None) -> QuantReport:
        """Change the format, by what was collected if there is anything; this ends the collection."""
        options = self._loaded.options
        if self._running is None:
            return self._loaded.requantize(isq, source)
        self._loaded.check(isq)
        im, before = self._collected(), options.get("imatrix")
        self.end()
        options["imatrix"] = im
        try:
            report = self._loaded.requantize(isq, source)
        except BaseException:
            options["imatrix"] = before
            raise
        _note(f"with the importance of {im.tokens} tokens of this chat")
        return report

    def end(self) -> None:
        """Stop watching."""
        running, self._running = self._running, None
        if running is not None:
            with contextlib.suppress(ValueError):  # that nothing ran; `_collected` says it to who wants the numbers
                running.close()

    def _collected(self) -> Calibration:
        if self._imatrix is None:
            raise ValueError("nothing has been collected: /imatrix begins")
        if not self._imatrix.tokens:
            raise ValueError("nothing was said since /imatrix: there is nothing to use")
        if self._running is not None:
            self._imatrix.refresh()
        return self._imatrix


def _read() -> str | None:
    """One line from the user; None at the end of the input. The prompt is printed only at a terminal."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.strip() if line else None
    try:
        return input("> ").strip()
    except EOFError:
        print(file=sys.stderr)
        return None


def _command(conversation: Conversation, watch: _Watch, line: str) -> None:
    name, _, argument = line.partition(" ")
    if name == "/clear":
        conversation.clear()
        _note("forgotten")
    elif name == "/re_isq" and argument.strip():
        isq, _, source = argument.strip().partition(" ")
        report = watch.requantize(isq, source.strip() or None)
        _note("; ".join(report.summary()))
    elif name == "/imatrix":
        if argument.strip():
            watch.save(argument.strip())
        else:
            watch.begin()
    elif name == "/help":
        for command, meaning in _COMMANDS.items():
            _note(f"{command}: {meaning}")
    else:
        raise ValueError(f"{line!r} is not a command. {_HELP}")


def _reply(conversation: Conversation, message: str, *, echo: bool = True) -> Reply:
    """Generate a reply and print it as it is generated; Ctrl-C ends it."""
    from isqtorch.app.chat import Stop

    def write(text: str) -> None:
        print(text, end="", flush=True)

    stop = Stop()
    with _interrupts(stop):
        reply = conversation.say(message, write=write if echo else lambda text: None, stop=stop)
    if echo:
        print(" [interrupted]" if reply.finish == "interrupted" else "", flush=True)
    if reply.finish == "length" and reply.generated_tokens < conversation.sampling.max_new_tokens:
        _note("the context is full; /clear begins again")
    return reply


@contextlib.contextmanager
def _interrupts(stop: Stop) -> Iterator[None]:
    """The first Ctrl-C ends the reply at its next token; a second one raises KeyboardInterrupt."""

    def interrupted(*_: object) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _format(loaded: LoadedModel) -> str:
    report = loaded.report
    return "" if report is None else f" at {report.bits_per_weight:.2f} bits per weight"


def _speed(replies: list[Reply]) -> str:
    """Tokens per second over all replies, separately for prompts and generation."""
    prompt, prompt_seconds = sum(r.prompt_tokens for r in replies), sum(r.prompt_seconds for r in replies)
    later = sum(max(r.generated_tokens - 1, 0) for r in replies)
    seconds = sum(r.generate_seconds for r in replies)
    made = sum(r.generated_tokens for r in replies)
    parts = [f"prompt: {prompt} tokens, {prompt / prompt_seconds:.1f} tokens/s" if prompt_seconds else ""]
    parts.append(f"generation: {made} tokens" + (f", {later / seconds:.1f} tokens/s" if seconds else ""))
    return "; ".join(filter(None, parts))


def _note(text: str) -> None:
    """Print a remark for the user to standard error, separate from the generated text."""
    print(f"[{text}]", file=sys.stderr, flush=True)
