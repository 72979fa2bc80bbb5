"""What export_gguf writes, load reads: the same model, its packed weights bit for bit, and the same file again."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import relative_error
from hf import logits
from made_tokenizers import PAGE, byte_level, unigram, with_byte_fallback
from tiny_decoders import CONFIGS, tiny

import isqtorch
from isqtorch.integrations.checkpoints.gguf.splits import NAMES

RULES = [(steps, name, bool(ignore)) for steps, names in NAMES.items() for ignore, name in enumerate(names) if name]
DEMO = Path(__file__).resolve().parent.parent.parent / "examples" / "demo_model"


@pytest.mark.parametrize("isq", [None, "q8_0"])
@pytest.mark.parametrize("case", CONFIGS)
def test_every_architecture(case: str, isq: str | None, tmp_path: Path) -> None:
    model = tiny(case)
    if isq is not None:
        isqtorch.quantize_(model, isq, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is lost
        isqtorch.export_gguf(model, tmp_path / "a.gguf", tokenizer=False)
    back = isqtorch.load(tmp_path / "a.gguf", dtype=torch.float32).model
    assert type(back) is type(model) or case == "mistral"  # whose files are those of Llama
    before, after = model.state_dict(), back.state_dict()
    assert set(before) == set(after)
    for name, value in before.items():
        if value.dtype == torch.uint8 or not name.endswith(("norm.weight", "A_log")):
            assert value.dtype == after[name].dtype and torch.equal(value, after[name]), name
        else:  # the file has 1 + weight, or -exp(A_log), rounded to f32
            torch.testing.assert_close(value, after[name], rtol=1e-6, atol=1e-6)
    # Where those differ in a last bit, the kernels may round an activation to the next of 15 bits.
    assert relative_error(logits(back), logits(model)) < (1e-6 if isq is None else 3e-4)


@pytest.mark.parametrize("isq", [None, "q4k_m"])
def test_the_same_file_again(isq: str | None, tmp_path: Path) -> None:
    """With tokenizer and chat template. A model from a file exports without being given its tokenizer."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(DEMO / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO / "model")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    if isq is not None:
        isqtorch.quantize_(model, isq, progress=False)
    isqtorch.export_gguf(model, tmp_path / "a.gguf", tokenizer, name="x")
    isqtorch.export_gguf(isqtorch.load(tmp_path / "a.gguf", dtype="bfloat16").model, tmp_path / "b.gguf", name="x")
    first, second = tmp_path / "a.gguf", tmp_path / "b.gguf"
    assert _facts(first) == _facts(second)
    assert first.read_bytes()[-first.stat().st_size // 2 :] == second.read_bytes()[-second.stat().st_size // 2 :]


def with_tokenizer(tokenizer: Any) -> Any:
    """A tiny model that has a row for each token, and three without."""
    return tiny("llama", vocab_size=len(tokenizer) + 3)


@pytest.mark.parametrize(("steps", "name", "ignore_merges"), RULES, ids=[name for _, name, _ in RULES])
def test_byte_level_tokenizers(steps: tuple[str, ...], name: str, ignore_merges: bool, tmp_path: Path) -> None:
    """The same tokens, and the same metadata when the model is written again."""
    tokenizer = byte_level(list(steps), ignore_merges=ignore_merges, bos=ignore_merges)
    model = with_tokenizer(tokenizer)
    isqtorch.export_gguf(model, tmp_path / "a.gguf", tokenizer, name="x")
    loaded = isqtorch.load(tmp_path / "a.gguf")
    assert loaded.tokenizer(PAGE)["input_ids"] == tokenizer(PAGE)["input_ids"]
    isqtorch.export_gguf(model, tmp_path / "b.gguf", loaded.tokenizer, name="x")
    assert _facts(tmp_path / "a.gguf") == _facts(tmp_path / "b.gguf")
    assert _facts(tmp_path / "a.gguf")["tokenizer.ggml.pre"] == name


@pytest.mark.parametrize("make", [lambda: with_byte_fallback(True), lambda: with_byte_fallback(False), unigram])
def test_tokenizers_of_sentencepiece(make: Callable[[], Any], tmp_path: Path) -> None:
    tokenizer = make()
    page = [text for text in PAGE if text and "  " not in text and not set(text) & set("<\n\t")]
    isqtorch.export_gguf(with_tokenizer(tokenizer), tmp_path / "a.gguf", tokenizer)
    again = isqtorch.load(tmp_path / "a.gguf").tokenizer
    assert again(page)["input_ids"] == tokenizer(page)["input_ids"]


def test_not_over_the_file_it_was_loaded_from(tmp_path: Path) -> None:
    isqtorch.export_gguf(tiny("llama"), tmp_path / "a.gguf", tokenizer=False)
    loaded = isqtorch.load(tmp_path / "a.gguf").model
    with pytest.raises(FileExistsError, match="was loaded from"):
        isqtorch.export_gguf(loaded, tmp_path / "a.gguf", tokenizer=False)


def _facts(file: Path) -> dict[str, Any]:
    import gguf

    reader = gguf.GGUFReader(file)
    facts = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    return facts | {tensor.name: (tensor.tensor_type, tensor.shape.tolist()) for tensor in reader.tensors}
