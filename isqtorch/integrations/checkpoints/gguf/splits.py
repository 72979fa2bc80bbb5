"""How llama.cpp splits text before the merges of a byte-level tokenizer, by the names it has for that.

A GGUF file does not hold the rule, only a name (`tokenizer.ggml.pre`), and llama.cpp has the rules of the names that it
knows. So the rule of a tokenizer is looked up here. Facts: src/llama-vocab.cpp of llama.cpp.
"""

from __future__ import annotations

from typing import Any

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPELLED_OUT = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"  # the same; some files have it so
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SLASHED = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


def _cased(suffix: str) -> str:
    """Words, split where the case changes."""
    return rf"{_LEAD}{_UPPER}*{_LOWER}+{suffix}|{_LEAD}{_UPPER}+{_LOWER}*{suffix}"


_DIGIT, _DIGITS = r"\p{N}", r"\p{N}+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # that of ByteLevel itself
_LLAMA3 = rf"{_CONTRACTION}|{_LEAD}\p{{L}}+|\p{{N}}{{1,3}}|{_SYMBOLS}|{_SPACES}"
_HAN = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_BLOOM = r" ?[^(\s|.,!?" + "\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"""
    + _SPACES
)

# steps of the pre-tokenizer -> names. The first name has no `ignore_merges`, the second one has; None: there is none.
NAMES: dict[tuple[str, ...], tuple[str | None, str | None]] = {
    (_GPT2,): ("gpt-2", None),
    (_DIGIT, _GPT2): ("smollm", None),
    (_LLAMA3,): ("dbrx", "llama-bpe"),
    (rf"{_CONTRACTION}|{_LEAD}\p{{L}}+|\p{{N}}|{_SYMBOLS}|{_SPACES}",): ("qwen2", None),
    (rf"{_CONTRACTION}|{_LEAD}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",): (
        "qwen35",
        None,
    ),
    (rf"{_cased('')}|\p{{N}}|{_SLASHED}",): (None, "tekken"),
    (rf"{_cased(_CONTRACTION + '?')}|\p{{N}}{{1,3}}|{_SLASHED}",): ("gpt-4o", None),
    ("Punctuation Contiguous", _GPT2, _DIGITS, "[0-9][0-9][0-9]"): ("falcon", None),
    (r"\p{N}{1,3}", _HAN, _DEEPSEEK): ("deepseek-v3", None),
    (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", _DIGIT): (
        "deepseek-coder",
        None,
    ),
    (_BLOOM,): ("bloom", None),
    (_BLOOM, _DIGIT): ("viking", None),
}


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
        return [_GPT2] if pre_tokenizer.get("use_regex", True) else []
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
