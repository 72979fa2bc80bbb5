"""llama.cpp's file types: which format each kind of matrix in a language model gets.

A mix is no format of a weight but a rule for whole models: `q4k_m` is mostly q4k, with q6k for the values and for the
outputs of the MLP in half of the blocks. Kinds of matrices have their GGUF names; `recipes.py` finds them in a model. The rules
are those of llama.cpp's `llama_tensor_get_type` for Llama-like models, without Falcon's exceptions. What they name but
do not fit falls back along the formats' own chain, as in llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .base import register_mix

Rule = Callable[[int, int, int], "str | None"]
"""(index i among n matrices of this kind, n, query heads per key-value head) -> format, or None for the mix's own."""

HEAD = "q6k"  # output.weight, and the table it is tied to
WITH_8_EXPERTS = "q8_0"  # keys and values, which are small there
LAYERS_OF_70B = 80  # with shared key-value heads: values are 8 times smaller than queries


@dataclass(frozen=True)
class Mix:
    """One file type.

    Attributes:
        base: the format of everything that no rule names.
        value: rule for attn_v, attn_qkv and attn_kv_b.
        down: rule for ffn_down and its experts; i is the number of the block.
        output: format of attn_output, or None.
        output_with_8_experts: the same in models of 8 experts.
    """

    name: str
    base: str
    value: Rule
    down: Rule
    output: str | None = None
    output_with_8_experts: str | None = None


def more_bits(i: int, n: int) -> bool:
    """The first and last eighth of the blocks, and every third between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _none(i: int, n: int, gqa: int) -> str | None:
    return None


def _when_more(fmt: str) -> Rule:
    return lambda i, n, gqa: fmt if more_bits(i, n) else None


MIXES = {
    mix.name: mix
    for mix in (
        # llama.cpp's Q2_K, whose name is that of the format here
        Mix("q2k_m", "q2k", lambda i, n, gqa: "q4k" if gqa >= 4 else "q3k", lambda i, n, gqa: "q3k", "q3k", "q5k"),
        Mix(
            "q2k_s",
            "q2k",
            lambda i, n, gqa: "q4k" if gqa >= 4 else None,
            lambda i, n, gqa: "q4k" if i < n // 8 else None,
        ),
        Mix("q3k_s", "q3k", _none, _none, None, "q5k"),
        Mix(
            "q3k_m",
            "q3k",
            lambda i, n, gqa: "q5k" if i < 2 else "q4k",
            lambda i, n, gqa: "q5k" if i < n // 16 else "q4k",
            "q4k",
            "q5k",
        ),
        Mix("q3k_l", "q3k", lambda i, n, gqa: "q5k", lambda i, n, gqa: "q5k", "q5k"),
        Mix(
            "q4k_s",
            "q4k",
            lambda i, n, gqa: "q5k" if i < 4 else None,
            lambda i, n, gqa: "q5k" if i < n // 8 else None,
            None,
            "q5k",
        ),
        Mix("q4k_m", "q4k", _when_more("q6k"), _when_more("q6k"), None, "q5k"),
        Mix("q5k_s", "q5k", _none, _none),
        Mix("q5k_m", "q5k", _when_more("q6k"), _when_more("q6k")),
    )
}

for _mix in MIXES.values():
    register_mix(_mix.name, _mix.name.replace("k_", "_k_"))
