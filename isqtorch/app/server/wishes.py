"""What a request wants of its replies beyond the generation settings of transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .body import Body
from .grammar import Form

_OWN = {"top_k": int, "min_p": float, "repetition_penalty": float}  # settings of transformers with the same names
_SAMPLING = ("top_p", "top_k", "min_p")


@dataclass(frozen=True)
class Wishes:
    """Wishes for each reply to one request.

    Attributes:
        n: replies to each prompt.
        seed: of sampling; the second reply has the next seed, and so on.
        stops: a reply ends before any of these.
        chances: for how many of the likeliest tokens the log probabilities are wanted; None: for no token.
        frequency: penalty for each time that a token was said in the reply.
        presence: penalty for a token that was said in the reply.
        form: the form of a reply.
    """

    n: int = 1
    seed: int | None = None
    stops: tuple[str, ...] = ()
    chances: int | None = None
    frequency: float = 0.0
    presence: float = 0.0
    form: Form | None = None


def wishes_of(body: Body) -> Wishes:
    """Take the wishes out of a checked body; transformers would read some of these fields in another way."""
    stops = body.pop("stop", ())
    logprobs, top = body.pop("logprobs", None), body.pop("top_logprobs", None)
    chances = None if logprobs in (None, False) and type(logprobs) is not int else int(top or 0)
    if type(logprobs) is int:  # of completions: a number
        chances = logprobs
    return Wishes(
        n=body.pop("n", 1),
        seed=body.pop("seed", None),
        stops=(stops,) if isinstance(stops, str) else tuple(stops),
        chances=chances,
        frequency=float(body.pop("frequency_penalty", 0)),
        presence=float(body.pop("presence_penalty", 0)),
        form=_form(body),
    )


def set_sampling(config: Any, body: Mapping[str, Any]) -> None:
    """Set what transformers' handlers do not set. A temperature or another setting of sampling switches it on."""
    for name, number in _OWN.items():
        if name in body:
            setattr(config, name, number(body[name]))
    if config.top_k is not None and config.top_k < 0:  # "all", for other servers
        config.top_k = 0
    asked = any(name in body for name in _SAMPLING)
    if body.get("temperature") or (asked and "temperature" not in body):
        config.do_sample = True


def _form(body: Body) -> Form | None:
    wanted = body.pop("response_format", None) or {}
    forms = []
    if wanted.get("type") == "json_object":
        forms.append(Form("json", '{"type": "object"}'))
    elif wanted.get("type") == "json_schema":
        forms.append(Form("json", json.dumps(wanted["json_schema"].get("schema", {}))))
    for kind in ("json", "regex", "choice", "grammar"):
        value = body.pop(f"guided_{kind}", None)
        if value is not None:
            forms.append(Form(kind, value if isinstance(value, str) else json.dumps(value)))
    if len(forms) > 1:
        raise ValueError("a request can ask for one form: response_format or one of the guided_ fields")
    return forms[0] if forms else None
