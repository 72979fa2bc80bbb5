"""export_gguf and tokenizers: what it finds, writes, refuses and warns about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import models
import pytest
import transformers
from test_export_gguf import MODEL, refused

import isqtorch


@pytest.fixture
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(MODEL)


def test_the_tokenizer_of_the_folder(tmp_path: Path, tokenizer: Any) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL)
    isqtorch.export_gguf(model, tmp_path / "found.gguf")
    isqtorch.export_gguf(model, tmp_path / "given.gguf", tokenizer)
    assert (tmp_path / "found.gguf").read_bytes() == (tmp_path / "given.gguf").read_bytes()


def test_no_tokenizer_is_found(tmp_path: Path) -> None:
    refused(models.tiny_llama(), tmp_path, "no tokenizer", "tokenizer=False", error=OSError, tokenizer=None)


def test_a_tokenizer_of_another_model(tmp_path: Path, tokenizer: Any) -> None:
    refused(models.tiny_llama(), tmp_path, "number 4095", "512 rows", tokenizer=tokenizer)


def test_a_rule_without_a_name(tmp_path: Path, tokenizer: Any) -> None:
    from tokenizers import Regex, pre_tokenizers

    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL)
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\w{1,7}"), "isolated"), pre_tokenizers.ByteLevel(use_regex=False)]
    )
    refused(model, tmp_path, r"\w{1,7}", "pre_tokenizer='default'", tokenizer=tokenizer)
    with pytest.warns(UserWarning, match="puts a space before the text"):
        isqtorch.export_gguf(model, tmp_path / "x.gguf", tokenizer, pre_tokenizer="default")


def test_normalizers_and_special_tokens_that_are_lost(tmp_path: Path, tokenizer: Any) -> None:
    from tokenizers import normalizers, processors

    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Lowercase()
    backend.post_processor = processors.TemplateProcessing(
        single="<pad> <s> $A", special_tokens=[("<s>", 0), ("<pad>", 2)]
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL)
    with pytest.warns(UserWarning) as caught:
        isqtorch.export_gguf(model, tmp_path / "x.gguf", tokenizer)
    said = " ".join(str(warning.message) for warning in caught)
    assert "normalizes text (Lowercase)" in said and "adds special tokens (<pad>, <s>)" in said


def test_other_kinds_of_tokenizers(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE, WordLevel

    for model in (BPE(), WordLevel({"a": 0}, unk_token="a")):
        words = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))
        refused(models.tiny_llama(), tmp_path, "GGUF has byte-level BPE", "tokenizer=False", tokenizer=words)
    refused(models.tiny_llama(), tmp_path, "is a object", "AutoTokenizer", tokenizer=object())


def test_tokens_with_the_same_text(tmp_path: Path) -> None:
    """WordPiece marks the pieces inside of a word, and llama.cpp the beginnings."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece

    words = Tokenizer(WordPiece({"[UNK]": 0, "a": 1, "##\u2581a": 2}, unk_token="[UNK]"))
    words.add_special_tokens(["[UNK]"])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    refused(models.tiny_llama(), tmp_path, "(1 and 2)", tokenizer=fast)


def test_chat_templates_and_ends(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = {"default": "{{ 1 }}", "tools": "{{ 2 }}"}
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL)
    model.generation_config.eos_token_id = [1, 7]
    isqtorch.export_gguf(model, tmp_path / "x.gguf", tokenizer)
    fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
    said = {
        name: fields[f"tokenizer.{name}"].contents()
        for name in ("chat_template", "chat_template.tools", "chat_templates")
    }
    assert said == {"chat_template": "{{ 1 }}", "chat_template.tools": "{{ 2 }}", "chat_templates": ["tools"]}
    assert fields["tokenizer.ggml.eot_token_id"].contents() == 7
