"""Tokenizers in files: llama.cpp makes the same tokens of a page of varied text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from llama import Answers, ask
from made_tokenizers import PAGE, byte_level, unigram, with_byte_fallback, word_piece

from isqtorch.files.gguf_writing import write_gguf
from isqtorch.integrations.checkpoints.gguf.splits import NAMES
from isqtorch.integrations.checkpoints.gguf.vocabulary import vocabulary

RULES = [(steps, name, bool(ignore)) for steps, names in NAMES.items() for ignore, name in enumerate(names) if name]
SIZES = {
    "context_length": 64,
    "embedding_length": 64,
    "block_count": 1,
    "feed_forward_length": 64,
    "attention.head_count": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
}


def in_llama(tokenizer: Any, page: list[str], folder: Path, pre: str | None = None, architecture: str = "") -> Answers:
    """llama.cpp's tokens, by a file without weights. Three rows of the embedding have no token."""
    said = vocabulary("export_gguf", tokenizer, len(tokenizer) + 3, pre, architecture)
    assert said.losses == []
    metadata = {"general.architecture": "llama", **{f"llama.{key}": value for key, value in SIZES.items()}}
    write_gguf(folder / "tokens.gguf", metadata | said.metadata, [])
    return ask(folder / "tokens.gguf", page)


def same(tokenizer: Any, page: list[str], folder: Path, architecture: str = "") -> Answers:
    answers = in_llama(tokenizer, page, folder, architecture=architecture)
    assert answers.tokens == tokenizer(page, add_special_tokens=False)["input_ids"]
    assert answers.with_special == tokenizer(page)["input_ids"]
    assert answers.facts["vocabulary"] == len(tokenizer) + 3
    return answers


@pytest.mark.parametrize(("steps", "name", "ignore_merges"), RULES, ids=[name for _, name, _ in RULES])
def test_byte_level(steps: tuple[str, ...], name: str, ignore_merges: bool, tmp_path: Path) -> None:
    tokenizer = byte_level(list(steps), ignore_merges=ignore_merges, bos=ignore_merges)
    answers = same(tokenizer, PAGE, tmp_path)
    assert answers.facts["metadata"]["tokenizer.ggml.pre"] == name


@pytest.mark.parametrize("other", ["smollm", "qwen2", "llama-bpe", "falcon", "gpt-4o", "deepseek-v3"])
def test_the_page_shows_another_rule(other: str, tmp_path: Path) -> None:
    tokenizer = byte_level(next(list(steps) for steps, name, _ in RULES if name == "gpt-2"))
    answers = in_llama(tokenizer, PAGE, tmp_path, other)
    assert answers.tokens != tokenizer(PAGE, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("prefix", [True, False], ids=["Llama 2", "Gemma"])
def test_with_byte_fallback(prefix: bool, tmp_path: Path) -> None:
    page = [text for text in PAGE if text and "  " not in text and "<s>" not in text]
    answers = same(with_byte_fallback(prefix), page, tmp_path)
    assert answers.facts["metadata"]["tokenizer.ggml.model"] == "llama"


def test_gemma_4(tmp_path: Path) -> None:
    page = [text for text in PAGE if text and "  " not in text and "<s>" not in text]
    answers = same(with_byte_fallback(False), page, tmp_path, "gemma4")
    assert answers.facts["metadata"]["tokenizer.ggml.model"] == "gemma4"


def test_unigram(tmp_path: Path) -> None:
    same(unigram(), [text for text in PAGE if text and not set(text) & set("<\n\t")], tmp_path)


@pytest.mark.parametrize("lowercase", [True, False])
def test_word_piece(lowercase: bool, tmp_path: Path) -> None:
    """llama.cpp takes accents off in another way than Unicode's decomposition, which also splits Korean."""
    same(word_piece(lowercase), [text for text in PAGE if text and "한" not in text and "<" not in text], tmp_path)
