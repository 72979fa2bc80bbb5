"""Names of formats in other libraries, for error messages: what was probably meant, and its name here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches

_BITSANDBYTES = "a data type of bitsandbytes"
_TORCHAO = "a name of torchao"
_NO_FLOAT = "a type of floats: give no format to leave weights as they are"

_WORDS: dict[str, tuple[str, str]] = {
    "nf4": (_BITSANDBYTES, '"q4k"'),
    "fp4": (_BITSANDBYTES, '"q4k", or "mxfp4" for 4-bit floats'),
    "nvfp4": ("a type of NVIDIA's tools", '"mxfp4" for 4-bit floats, or "q4k"'),
    "e2m1": ("a type of 4-bit floats", '"mxfp4"'),
    "mxfp8": ("a type of the OCP", '"fp8"'),
    "float8": (_TORCHAO, '"fp8"'),
    "f8": ("a type of 8-bit floats", '"fp8"'),
    "e4m3": ("the type of 8-bit floats in the format fp8", '"fp8"'),
    "e4m3fn": ("the type of 8-bit floats in the format fp8", '"fp8"'),
    "e5m2": ("a type of 8-bit floats", '"fp8" (e4m3)'),
    "w8a8": ("a scheme with 8-bit activations", '8 (weights of 8 bits), or "fp8" with activations="fp8"'),
    "awq": ("a method of other libraries, for 4 bits with importance", "4 with calibration_file=... or imatrix=..."),
    "gptq": ("a method of other libraries, for 4 bits with a calibration text", "4 with calibration_file=..."),
    "autoround": ("a method of other libraries, for 4 bits with a calibration text", "4 with calibration_file=..."),
    "aqlm": ("a method of other libraries, for 2 bits", "2 with calibration_file=..."),
    "hqq": ("a family of formats", '"hqq4" or "hqq8"'),
    "afq": ("a family of formats", '"afq4", or afq2 to afq8'),
    "mlx": ("a program whose formats are named afq here", '"afq4", or afq2 to afq8'),
    "gguf": ("a kind of file", 'a format that it holds: "q4k", or "q4k_m" for llama.cpp\'s mix'),
    "ggml": ("a family of formats", '"q4k", or "q4_0"'),
    "bitsandbytes": ("another library", "4 or 8"),
    "bnb": ("another library", "4 or 8"),
    "torchao": ("another library", "4 or 8"),
    "quanto": ("another library", "4 or 8"),
    "ternary": ("a type of 1.6 bits", '"q2k"'),
}
_FLOATS = {"fp16", "fp32", "bf16", "f16", "f32", "float16", "float32", "bfloat16", "half", "float", "none", "full"}
_BITS = re.compile(
    r"(?:u?int|i|u|q|w|load_in_)?[_-]?([1-8])[_-]?(?:bits?|b|bpw)?(?:a16|wo|_weight_only)?(?:[_-]?(?:asym|sym))?"
)
_IQ = re.compile(r"(?:iq|tq)([1-3])(?:_\w+)?")
_WIDTHS = {1: 2, 7: 8}  # the nearest widths of those that are not here


def meant(word: str, known: Sequence[str]) -> str:
    """Say what an unknown name of a format probably means; "" if that is not clear.

    Args:
        word: the name, as the user gave it.
        known: the names and other spellings of the formats and of the rules for whole models.

    Returns:
        A sentence, with the name or number to give here.
    """
    text = word.strip().lower().replace(" ", "").removeprefix("torch.")
    if len(text) > 40:
        return ""
    if text in _FLOATS:
        return f"{word!r} is {_NO_FLOAT}."
    for part in (re.sub(r"[_-]", "", text), *reversed(re.split(r"[_-]", text))):
        if part in _WORDS:
            what, here = _WORDS[part]
            return f"{part!r} is {what}; the nearest here is {here}."
    levels = _IQ.fullmatch(text)
    if levels is not None:
        bits = max(2, int(levels[1]))
        return f"{word!r} is a type of llama.cpp that is read, not written; the nearest here is {bits} with imatrix=..."
    bits_of = _BITS.fullmatch(text)
    if bits_of is not None:
        bits = int(bits_of[1])
        return f"Did you mean {_WIDTHS.get(bits, bits)}, the best format of that many bits?"
    text = re.sub(r"_?k_?x?l$", "k_m", text.replace("-", "_"))  # mixes of others, with more bits for some layers
    close = get_close_matches(text, known, n=1, cutoff=0.75)
    return f"Did you mean {close[0]!r}?" if close else ""
