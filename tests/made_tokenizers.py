"""Small tokenizers of every kind that GGUF has, trained on a few lines."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

PAGE = [
    "Hello world",
    " two  spaces",
    "I'm sure he'll say we've, they'D and I'M",
    "3 33 333 3333 33333 12345678 3.14 1,000",
    "CamelCase snake_case HTTPServer iOS",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich",
    "日本語のテキストと中文文本 and 한국어",
    "emoji 🚀🦙 😶‍🌫️ done",
    "tabs\t\tand\n\nnew\r\nlines\n \n  end  ",
    "def f(x):\n    return x**2  # comment!!! ...",
    "<s> special </s> tokens and a <tool> call",
    "--==__~~ \"quotes\" 'single' (a)[b]{c}",
    "Привет мир! Ελληνικά عربى",
    "½ ² Ⅷ ٣٤",
    "",
    "a",
]
"""Where rules that split text differ, it shows on this page."""

P = pre_tokenizers
_SPACE = "\u2581"


def _wrapped(tokenizer: Tokenizer, **special: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def byte_level(steps: list[str], *, ignore_merges: bool = False, bos: bool = False) -> Any:
    """Byte-level BPE that splits text by these steps, as `splits.py` writes them."""
    parts: list[Any] = []
    for step in steps:
        name, _, behavior = step.partition(" ")
        known = name == "Punctuation"
        parts.append(P.Punctuation(behavior.lower()) if known else P.Split(Regex(step), "isolated"))
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = P.Sequence([*parts, P.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=P.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(PAGE * 5, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return _wrapped(tokenizer, bos_token="<s>", eos_token="</s>")


def with_byte_fallback(prefix: bool) -> Any:
    """BPE as Llama 2 (with a space before the text) and Gemma have it."""
    replace = normalizers.Replace(" ", _SPACE)
    trained = Tokenizer(models.BPE())
    trained.normalizer = replace
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    trained.train_from_iterator([line.replace("  ", " ") for line in PAGE[:6] * 5], trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab=model["vocab"], merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if prefix else replace
    tokenizer.add_special_tokens(special[:3])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _wrapped(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def unigram() -> Any:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = P.Sequence([P.WhitespaceSplit(), P.Metaspace(prepend_scheme="always")])
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(PAGE * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return _wrapped(tokenizer, eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


def word_piece(lowercase: bool) -> Any:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = P.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(PAGE * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return _wrapped(tokenizer, mask_token="[MASK]", **names)
