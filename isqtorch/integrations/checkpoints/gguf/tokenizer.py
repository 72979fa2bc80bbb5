"""The tokenizer of a GGUF file: vocabulary, merges, special tokens and chat template, as a fast tokenizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from .charsmap import charsmap_fault
from .config import special_id
from .facts import MOST, Facts
from .pieces import GPT2, SPLITS, STARTED, WHOLE_TOKENS

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
_NAMED = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
    "sep_token": "seperator_token_id",  # ggml's spelling
    "mask_token": "mask_token_id",
}
_SPACE = "\u2581"
_MOST_WORK = 1 << 30  # letters to copy; a vocabulary of 256,000 tokens needs a twentieth


def read_tokenizer(facts: Facts) -> Any:
    """The tokenizer of a file, with its chat template.

    Raises:
        ValueError: the file has none, one of an unknown kind, or a damaged one.
    """
    from transformers import TokenizersBackend

    tokens, kinds = _tokens(facts)
    kind = _text(facts, "model", None)
    if kind not in _BUILDERS:
        raise facts.error(f"has a tokenizer of the kind {kind!r:.40}. Known are {', '.join(_BUILDERS)}.")
    try:
        backend = _BUILDERS[kind](facts, tokens, kinds)
        _add_special(backend, tokens, kinds)
    except ValueError:
        raise
    except Exception as error:  # `tokenizers` raises plain exceptions for merges without tokens and the like
        raise facts.error(f"its tokenizer is damaged: {error!s:.300}") from None
    ids = {name: special_id(facts, key) for name, key in _NAMED.items()}
    named = {name: tokens[number] for name, number in ids.items() if number is not None and number < len(tokens)}
    starts = kind in ("llama", "gemma4") or _text(facts, "pre", "") in STARTED
    # The class is built around the backend: given one, it would copy it, which takes seconds for a large vocabulary.
    tokenizer = TokenizersBackend.__new__(TokenizersBackend)
    tokenizer._tokenizer = backend
    tokenizer.__init__(
        **{"bos_token": None, "eos_token": None, **named},
        add_bos_token=_flag(facts, "add_bos_token", starts) and "bos_token" in named,
        add_eos_token=_flag(facts, "add_eos_token", kind == "t5") and "eos_token" in named,
        clean_up_tokenization_spaces=False,
        model_max_length=facts.integer("context_length", None, most=MOST) or int(1e30),
    )
    tokenizer.chat_template = _templates(facts)
    return tokenizer


# ---- kinds of vocabularies -------------------------------------------------------------------------------------------


def _byte_level(facts: Facts, tokens: list[str], kinds: np.ndarray[Any, Any]) -> Any:
    """Byte-level BPE: every byte has a letter."""
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    rule = _text(facts, "pre", "default")
    if rule == "default":
        warnings.warn(
            f"{facts.where}: does not say how its tokenizer splits a text (tokenizer.ggml.pre), so GPT-2's rule is taken. If the "
            "model had another one, some texts get other tokens.",
            stacklevel=5,
        )
    elif rule not in SPLITS:
        raise facts.error(
            f"its tokenizer splits texts by the rule {rule!r:.40} (tokenizer.ggml.pre), which is not known here. Known are "
            f"{', '.join(sorted(SPLITS))}."
        )
    merges = _merges(facts)
    if merges is None:
        raise facts.error("its tokenizer has no merges (tokenizer.ggml.merges). The file is incomplete.")
    backend = Tokenizer(BPE(vocab=_numbered(tokens), merges=merges, ignore_merges=rule in WHOLE_TOKENS))
    splits = [pre_tokenizers.Split(Regex(each), "isolated") for each in SPLITS.get(rule, (GPT2,))]
    level = pre_tokenizers.ByteLevel(add_prefix_space=_flag(facts, "add_space_prefix", False), use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, level])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(facts: Facts, tokens: list[str], kinds: np.ndarray[Any, Any]) -> Any:
    """BPE of sentencepiece: spaces are a letter, and unknown letters are bytes."""
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    merges = _merges(facts) or _implied_merges(facts, tokens, kinds, _scores(facts, tokens))
    unknown = next((tokens[number] for number in np.flatnonzero(kinds == _UNKNOWN)), None)
    backend = Tokenizer(
        BPE(
            vocab=_numbered(tokens),
            merges=merges,
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=bool(np.any(kinds == _BYTE)),
        )
    )
    prefixed = _flag(facts, "add_space_prefix", _text(facts, "model", "") == "llama")
    replaced = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replaced]) if prefixed else replaced
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixed else steps)
    return backend


def _unigram(facts: Facts, tokens: list[str], kinds: np.ndarray[Any, Any]) -> Any:
    """Unigram of sentencepiece, as T5 has it. The converter loses the names of the tokens for blanks."""
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import Unigram

    scores = _scores(facts, tokens)
    blanks = [number for number, token in enumerate(tokens) if token.startswith("[PAD") and token[4:-1].isdigit()][:100]
    for offset, number in enumerate(blanks):
        tokens[number] = f"<extra_id_{len(blanks) - 1 - offset}>"
        kinds[number] = _CONTROL
    unknown = special_id(facts, "unknown_token_id")
    backend = Tokenizer(Unigram(list(zip(tokens, scores, strict=True)), unk_id=2 if unknown is None else unknown))
    charsmap = facts.metadata.get("tokenizer.ggml.precompiled_charsmap")
    if isinstance(charsmap, np.ndarray) and charsmap.dtype.itemsize == 1 and len(charsmap):
        why = charsmap_fault(charsmap.tobytes())
        if why is not None:
            raise facts.error(f"tokenizer.ggml.precompiled_charsmap {why}. The file is damaged.")
        backend.normalizer = normalizers.Precompiled(charsmap.tobytes())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(_SPACE, "always", True)]
    )
    backend.decoder = decoders.Metaspace(_SPACE, "always", True)
    return backend


_BUILDERS: dict[Any, Callable[[Facts, list[str], np.ndarray[Any, Any]], Any]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
    "gemma4": _sentencepiece,
    "t5": _unigram,
}


def _implied_merges(
    facts: Facts, tokens: list[str], kinds: np.ndarray[Any, Any], scores: list[float]
) -> list[tuple[str, str]]:
    """The merges that a vocabulary with scores implies: all pairs of tokens that make a token, the best score first.

    Raises:
        ValueError: tokens are so long that it would take minutes; the work grows with the square of their lengths.
    """
    whole = (kinds == _CONTROL) | (kinds == _USER_DEFINED) | (kinds == _UNKNOWN) | (kinds == _BYTE)
    made = [tokens[number] for number in np.argsort(-np.asarray(scores), kind="stable") if not whole[number]]
    known = frozenset(made)
    if sum(len(token) ** 2 for token in made) > _MOST_WORK:
        longest = max(map(len, made))
        raise facts.error(
            f"has tokens of up to {longest} letters, too long for merges to be found. The file is damaged."
        )
    merges = []
    for token in made:
        for at in range(1, len(token)):
            first, second = token[:at], token[at:]
            if first in known and second in known:
                merges.append((first, second))
    return merges


# ---- the parts of the metadata ---------------------------------------------------------------------------------------


def _add_special(backend: Any, tokens: list[str], kinds: np.ndarray[Any, Any]) -> None:
    """Add the tokens that are found in a text before it is split: control tokens, and those of the user."""
    from tokenizers import AddedToken

    control = [tokens[number] for number in np.flatnonzero((kinds == _CONTROL) | (kinds == _UNKNOWN)) if tokens[number]]
    plain = [tokens[number] for number in np.flatnonzero(kinds == _USER_DEFINED) if tokens[number]]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in plain])


def _tokens(facts: Facts) -> tuple[list[str], np.ndarray[Any, Any]]:
    """The texts of all tokens, and their types."""
    tokens = facts.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise facts.error("has no tokenizer (tokenizer.ggml.tokens). Give the tokenizer of the original model.")
    rows = facts.shape("token_embd.weight")[0]
    if len(tokens) > rows:
        raise facts.error(f"has {len(tokens)} tokens, and its table of embeddings {rows} rows. The file is damaged.")
    kinds = facts.metadata.get("tokenizer.ggml.token_type")
    if kinds is None:
        return list(tokens), np.ones(len(tokens), dtype=np.int32)
    if not isinstance(kinds, np.ndarray) or kinds.dtype.kind not in "iu" or len(kinds) != len(tokens):
        raise facts.error(
            f"tokenizer.ggml.token_type must be {len(tokens)} integers, one for each token. The file is damaged."
        )
    return list(tokens), kinds.copy()


def _numbered(tokens: list[str]) -> dict[str, int]:
    """Token -> id; of equal tokens the first one."""
    count = len(tokens)
    return dict(zip(reversed(tokens), range(count - 1, -1, -1), strict=True))


def _scores(facts: Facts, tokens: list[str]) -> list[float]:
    scores = facts.metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or len(scores) != len(tokens) or not np.isfinite(scores).all():
        raise facts.error(
            f"tokenizer.ggml.scores must be {len(tokens)} numbers, one for each token. The file is damaged."
        )
    return [float(each) for each in scores]


def _merges(facts: Facts) -> list[tuple[str, str]] | None:
    merges = facts.metadata.get("tokenizer.ggml.merges")
    if merges is None:
        return None
    pairs = [tuple(each.split(" ")) for each in merges] if isinstance(merges, list) else [()]
    wrong = next((number for number, pair in enumerate(pairs) if len(pair) != 2), None)
    if wrong is not None:
        raise facts.error(f"tokenizer.ggml.merges: entry {wrong} is no pair of tokens. The file is damaged.")
    return pairs  # type: ignore[return-value]


def _templates(facts: Facts) -> Any:
    """The chat template, or {name: template} if the file has several."""
    start = "tokenizer.chat_template."
    named = {key.removeprefix(start): value for key, value in facts.metadata.items() if key.startswith(start)}
    main = facts.metadata.get("tokenizer.chat_template")
    if any(not isinstance(value, str) for value in (*named.values(), main or "")):
        raise facts.error("tokenizer.chat_template must be a text. The file is damaged.")
    return {"default": main, **named} if named and main is not None else main


def _flag(facts: Facts, key: str, default: bool) -> bool:
    value = facts.metadata.get(f"tokenizer.ggml.{key}", default)
    if not isinstance(value, bool) and value not in (0, 1):
        raise facts.error(f"tokenizer.ggml.{key} is {value!r:.40}, must be true or false. The file is damaged.")
    return bool(value)


def _text(facts: Facts, key: str, default: Any) -> Any:
    value = facts.metadata.get(f"tokenizer.ggml.{key}", default)
    if value is not default and not isinstance(value, str):
        raise facts.error(f"tokenizer.ggml.{key} is {value!r:.40}, must be a text. The file is damaged.")
    return value
