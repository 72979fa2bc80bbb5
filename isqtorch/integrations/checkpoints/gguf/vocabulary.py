"""A tokenizer as metadata of a GGUF file.

llama.cpp has one tokenizer of each kind, in its own code. The file gives it the tokens, their types, merges or scores,
and a few switches. What a tokenizer does beyond that has no place in the file, and is reported as a loss.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from isqtorch.files.gguf_writing import Value
from isqtorch.text import first_names

from .splits import split_names, steps

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of tokens

_SPACE = "\u2581"  # what sentencepiece writes for a space
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_LOWEST = -1e6  # the score of a token that no merge makes
_GEMMA4 = "gemma4"
_LEAVE_OUT = "tokenizer=False writes the file without a tokenizer."


@dataclass
class Vocabulary:
    """What a file says of a tokenizer.

    Attributes:
        texts: the tokens by id. A number without a token is a row of the embedding that no token has.
        kinds: their types by id.
        metadata: for the file.
        losses: what the tokenizer does, and llama.cpp will not do.
    """

    texts: dict[int, str]
    kinds: dict[int, int]
    metadata: dict[str, Value] = field(default_factory=dict)
    losses: list[str] = field(default_factory=list)

    def put(self, key: str, value: Value) -> None:
        self.metadata[f"tokenizer.ggml.{key}"] = value


def vocabulary(
    op: str, tokenizer: Any, rows: int, pre_tokenizer: str | None = None, architecture: str = ""
) -> Vocabulary:
    """Describe a tokenizer.

    Args:
        op: the function that the user called, for messages.
        tokenizer: of transformers, or a processor with one.
        rows: rows of the model's embedding; the file lists as many tokens.
        pre_tokenizer: llama.cpp's name for the rule that splits text; None: look it up. Only for byte-level tokenizers.
        architecture: name in the file. llama.cpp has a tokenizer of its own for Gemma 4.

    Raises:
        ValueError: the tokenizer is of a kind that GGUF or this function does not know, or does not fit the model.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"{op}: the tokenizer is a {type(tokenizer).__name__}, which is not of the tokenizers library, so its merges cannot be "
            f"read. Load it with AutoTokenizer. {_LEAVE_OUT}"
        )
    content = json.loads(backend.to_str())
    kind = _kind(op, content)
    if pre_tokenizer is not None and kind != "gpt2":
        raise ValueError(
            f"{op}: pre_tokenizer is for byte-level tokenizers, and this one is {content['model']['type']} of another kind"
        )
    found = _tokens(op, content, rows)
    found.put("model", kind)
    if kind == "gpt2":
        _byte_level(op, content, found, pre_tokenizer)
    elif kind == "bert":
        _word_piece(content, found)
    else:
        _sentencepiece(content, found, rows)
        if kind == "llama" and architecture == _GEMMA4:  # the same, by merges in place of scores
            found.put("model", _GEMMA4)
            found.put("merges", [" ".join(pair) for pair in _merges(content["model"])])
    texts = [found.texts.get(i, _padding(i)) for i in range(rows)]
    _check_unique(op, texts)
    found.put("tokens", texts)
    found.put("token_type", np.array([found.kinds.get(i, UNUSED) for i in range(rows)], np.int32))
    _special_tokens(tokenizer, rows, found)
    _templates(tokenizer, found)
    return found


def _kind(op: str, content: Mapping[str, Any]) -> str:
    """llama.cpp's name of the kind of tokenizer."""
    model = content["model"]
    names = {part["type"] for part in [*_parts(content["pre_tokenizer"]), *_parts(content["decoder"])]}
    if model["type"] == "BPE" and model.get("byte_fallback"):
        return "llama"
    if model["type"] == "BPE" and "ByteLevel" in names:
        return "gpt2"
    if model["type"] in ("Unigram", "WordPiece"):
        return {"Unigram": "t5", "WordPiece": "bert"}[model["type"]]
    raise ValueError(
        f"{op}: the tokenizer is {model['type']} that does not work on bytes. GGUF has byte-level BPE, BPE with byte fallback, Unigram "
        f"and WordPiece. {_LEAVE_OUT}"
    )


def _parts(node: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, also those of sequences."""
    if node is None:
        return []
    inner = [node[key] for key in ("normalizers", "pretokenizers", "decoders") if key in node]
    return [part for child in inner[0] for part in _parts(child)] if inner else [node]


def _tokens(op: str, content: Mapping[str, Any], rows: int) -> Vocabulary:
    vocab = content["model"]["vocab"]
    found = Vocabulary({}, {})
    for number, text in (
        enumerate(text for text, _ in vocab) if isinstance(vocab, list) else ((i, t) for t, i in vocab.items())
    ):
        found.texts[number], found.kinds[number] = text, NORMAL
        if text == _padding(number):  # a row without a token, of a model that was read from a GGUF file
            found.kinds[number] = UNUSED
    for entry in content["added_tokens"]:
        found.texts[entry["id"]] = entry["content"]
        found.kinds[entry["id"]] = CONTROL if entry["special"] else USER_DEFINED
    last = max(found.texts, default=-1)
    if last >= rows:
        raise ValueError(
            f"{op}: the tokenizer has {found.texts[last]!r} with number {last}, and the model's embedding has {rows} rows. Give the "
            "tokenizer of this model, or call resize_token_embeddings first."
        )
    return found


def _padding(number: int) -> str:
    """The text of a row of the embedding that no token has."""
    return f"[PAD{number}]"


def _check_unique(op: str, texts: list[str]) -> None:
    seen: dict[str, int] = {}
    twice = [f"{text!r} ({seen[text]} and {i})" for i, text in enumerate(texts) if seen.setdefault(text, i) != i]
    if twice:
        raise ValueError(
            f"{op}: llama.cpp cannot load a file in which tokens have the same text: {first_names(twice)}. {_LEAVE_OUT}"
        )


# ---- byte-level BPE --------------------------------------------------------------------------------------------------


def _byte_level(op: str, content: Mapping[str, Any], found: Vocabulary, pre_tokenizer: str | None) -> None:
    model = content["model"]
    merges = _merges(model)
    name = pre_tokenizer or _split_name(content, merges)
    if name is None:
        rule = " then ".join(steps(content["pre_tokenizer"])) or "not at all"
        raise ValueError(
            f"{op}: the tokenizer splits text in a way for which no name of llama.cpp is known here: {rule}"
            f"{' (with ignore_merges)' if model.get('ignore_merges') else ''}. If llama.cpp has one, give it: pre_tokenizer='...'. "
            f"pre_tokenizer='default' gives an approximation: other tokens in places. {_LEAVE_OUT}"
        )
    found.put("pre", name)
    found.put("merges", [" ".join(part.replace(" ", "\u0120") for part in pair) for pair in merges])
    found.put("add_space_prefix", False)
    if any(part["type"] == "ByteLevel" and part.get("add_prefix_space") for part in _parts(content["pre_tokenizer"])):
        found.losses.append("puts a space before the text (add_prefix_space)")
    _note_normalizers(content, found, "NFC")  # nearly all text is NFC; llama.cpp has never normalized it


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The pairs of pieces, the first merge first."""
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    return [(first, second) for first, second in pairs]


def _split_name(content: Mapping[str, Any], merges: list[tuple[str, str]]) -> str | None:
    """llama.cpp's name of the rule by which the tokenizer splits text, or None."""
    model = content["model"]
    merging, ignoring = split_names(content["pre_tokenizer"])
    name, other = (ignoring, merging) if model.get("ignore_merges") else (merging, ignoring)
    if name is not None or other is None:
        return name
    from tokenizers.models import BPE

    bpe = BPE(vocab=model["vocab"], merges=merges)
    added = {entry["id"] for entry in content["added_tokens"]}
    # If the merges make every token of its bytes, then `ignore_merges` changes nothing.
    return (
        other
        if all(len(bpe.tokenize(text)) == 1 for text, number in model["vocab"].items() if number not in added)
        else None
    )


# ---- sentencepiece: BPE with byte fallback, and Unigram --------------------------------------------------------------


def _sentencepiece(content: Mapping[str, Any], found: Vocabulary, rows: int) -> None:
    model = content["model"]
    unigram = model["type"] == "Unigram"
    scores = np.full(rows, _LOWEST, np.float32)
    if unigram:
        scores[: len(model["vocab"])] = [score for _, score in model["vocab"]]
        unknown = model.get("unk_id")
    else:  # llama.cpp merges the pair with the highest score; tokenizers the one with the earliest merge
        for rank, pair in reversed(list(enumerate(_merges(model)))):
            scores[model["vocab"]["".join(pair)]] = -rank
        unknown = model["vocab"].get(model.get("unk_token"))
    for number, text in found.texts.items():
        if number == unknown:
            found.kinds[number] = UNKNOWN
        elif found.kinds[number] == NORMAL and _BYTE.fullmatch(text):
            found.kinds[number] = BYTE
        elif found.kinds[number] == USER_DEFINED:
            found.texts[number] = text.replace(_SPACE, " ")  # llama.cpp looks for these in the text as it is
    found.put("pre", "default")
    found.put("scores", scores)
    found.put("add_space_prefix", _has_space_prefix(content))
    if unigram:
        _unigram_normalizer(content, found)
    else:
        _note_normalizers(content, found, "Prepend", "Replace")


def _has_space_prefix(content: Mapping[str, Any]) -> bool:
    for part in [*_parts(content["normalizer"]), *_parts(content["pre_tokenizer"])]:
        if part["type"] == "Prepend" and part["prepend"] == _SPACE:
            return True
        if part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never":
            return True
    return False


def _unigram_normalizer(content: Mapping[str, Any], found: Vocabulary) -> None:
    parts = _parts(content["normalizer"])
    table = next((part["precompiled_charsmap"] for part in parts if part["type"] == "Precompiled"), None)
    if table:
        found.put("precompiled_charsmap", np.frombuffer(base64.b64decode(table), np.uint8))
    # Runs of spaces become one: by a normalizer, or by a pre-tokenizer that throws spaces away.
    collapses = any(part["type"] == "Replace" and "Regex" in part["pattern"] for part in parts)
    collapses |= any(part["type"] == "WhitespaceSplit" for part in _parts(content["pre_tokenizer"]))
    found.put("remove_extra_whitespaces", collapses)
    _note_normalizers(content, found, "Precompiled", "Replace", "Prepend", "Strip")


# ---- WordPiece -------------------------------------------------------------------------------------------------------


def _word_piece(content: Mapping[str, Any], found: Vocabulary) -> None:
    """llama.cpp marks the beginnings of words; WordPiece marks the other pieces."""
    prefix = content["model"].get("continuing_subword_prefix", "##")
    for number, text in found.texts.items():
        if found.kinds[number] == NORMAL:
            found.texts[number] = text.removeprefix(prefix) if text.startswith(prefix) else _SPACE + text
    for part in _parts(content["normalizer"]):
        if part["type"] == "BertNormalizer":
            accents = part.get("strip_accents")
            found.metadata["tokenizer.ggml.normalizer.lowercase"] = bool(part["lowercase"])
            found.metadata["tokenizer.ggml.normalizer.strip_accents"] = bool(
                part["lowercase"] if accents is None else accents
            )
    found.put("token_type_count", 2)
    _note_normalizers(content, found, "BertNormalizer")


# ---- all kinds -------------------------------------------------------------------------------------------------------


def _note_normalizers(content: Mapping[str, Any], found: Vocabulary, *known: str) -> None:
    others = [part["type"] for part in _parts(content["normalizer"]) if part["type"] not in known]
    if others:
        found.losses.append(f"normalizes text ({first_names(others)})")


_IDS = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}  # sic


def _special_tokens(tokenizer: Any, rows: int, found: Vocabulary) -> None:
    """The numbers of special tokens, and which of them stand before and after every text."""
    numbers: dict[str, int | None] = {name: getattr(tokenizer, f"{name}_token_id", None) for name in (*_IDS, "cls")}
    text = "a"
    plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    whole = list(tokenizer(text)["input_ids"])
    at = next((i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain), None)
    before, after = ([], []) if at is None else (whole[:at], whole[at + len(plain) :])
    if numbers["bos"] is None:
        numbers["bos"] = numbers["cls"]
    if len(before) == 1 and before[0] == numbers["cls"]:
        numbers["bos"] = numbers["cls"]
    for name, key in _IDS.items():
        number = numbers[name]
        if number is not None and number < rows:
            found.put(f"{key}_token_id", int(number))
    found.put("add_bos_token", before == [numbers["bos"]])
    found.put("add_eos_token", after == [numbers["eos"]] != [numbers["sep"]])
    found.put("add_sep_token", after == [numbers["sep"]])
    if at is None or before not in ([], [numbers["bos"]]) or after not in ([], [numbers["eos"]], [numbers["sep"]]):
        tokens = [found.texts.get(i, str(i)) for i in (whole if at is None else [*before, *after])]
        found.losses.append(f"adds special tokens ({first_names(tokens)})")


def _templates(tokenizer: Any, found: Vocabulary) -> None:
    """The chat template: "default" of several ones under its own key, the others by name."""
    template = getattr(tokenizer, "chat_template", None)
    named = dict(template) if isinstance(template, Mapping) else {"default": template} if template else {}
    if "default" in named:
        found.metadata["tokenizer.chat_template"] = str(named.pop("default"))
    if named:
        found.metadata["tokenizer.chat_templates"] = sorted(named)
        for name, text in sorted(named.items()):
            found.metadata[f"tokenizer.chat_template.{name}"] = str(text)
