"""The name that llama.cpp has for the way in which a byte-level tokenizer splits text, by the rule in a tokenizer.json.

A GGUF file does not hold the rule, only a name (`tokenizer.ggml.pre`). `pieces.py` has the rules of the names.
"""

from __future__ import annotations

from typing import Any

from .pieces import GPT2, SPLITS, WHOLE_TOKENS

# Of names with the same rule, these are written.
_WRITTEN = (
    "gpt-2 smollm dbrx llama-bpe qwen2 qwen35 tekken gpt-4o falcon deepseek-v3 deepseek-coder bloom viking seed-coder "
    "bailingmoe"
).split()
_DIGIT, _DIGITS = r"\p{N}", r"\p{N}+"
_FALCON = ("Punctuation Contiguous", GPT2, _DIGITS, "[0-9][0-9][0-9]")  # as its own tokenizer.json has it
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPELLED_OUT = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"  # the same; some files have it so


def _names() -> dict[tuple[str, ...], tuple[str | None, str | None]]:
    names: dict[tuple[str, ...], tuple[str | None, str | None]] = {}
    for name in _WRITTEN:
        merging, whole = names.get(SPLITS[name], (None, None))
        names[SPLITS[name]] = (merging, name) if name in WHOLE_TOKENS else (name, whole)
    return names | {_FALCON: ("falcon", None)}


NAMES = _names()
"""Steps of the pre-tokenizer -> names. The first name is without `ignore_merges`, the second one with; None: there is none."""


def split_names(pre_tokenizer: dict[str, Any] | None) -> tuple[str | None, str | None]:
    """Return llama.cpp's names for the pre-tokenizer of a tokenizer.json, without and with `ignore_merges`."""
    return NAMES.get(tuple(steps(pre_tokenizer)), (None, None))


def steps(pre_tokenizer: dict[str, Any] | None) -> list[str]:
    """The steps of a pre-tokenizer: the regex whose matches become pieces, or the name of another kind of step."""
    if pre_tokenizer is None:
        return []
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        return [step for part in pre_tokenizer["pretokenizers"] for step in steps(part)]
    if kind == "ByteLevel":
        return [GPT2] if pre_tokenizer.get("use_regex", True) else []
    if kind == "Digits":
        return [_DIGIT if pre_tokenizer.get("individual_digits") else _DIGITS]
    if kind == "Split" and "Regex" in pre_tokenizer["pattern"]:
        regex = str(pre_tokenizer["pattern"]["Regex"]).replace(_SPELLED_OUT, _CONTRACTION)
        regex = regex.replace("\r", r"\r").replace("\n", r"\n")  # some files have the characters themselves
        # A regex that matches everything gives the same pieces when what it does not match is removed.
        if (pre_tokenizer["behavior"], bool(pre_tokenizer.get("invert"))) in (("Isolated", False), ("Removed", True)):
            return [regex]
        return [f"Split {pre_tokenizer['behavior']} {regex}"]
    return [" ".join(str(pre_tokenizer[key]) for key in ("type", "behavior") if key in pre_tokenizer)]
