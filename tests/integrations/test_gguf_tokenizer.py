"""The tokenizers of GGUF files: kinds of vocabularies, rules for splitting, special tokens, chat templates, damage."""

from __future__ import annotations

import struct
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer

import isqtorch
from isqtorch.integrations.checkpoints.gguf.charsmap import charsmap_fault
from isqtorch.integrations.checkpoints.gguf.checkpoint import GgufCheckpoint
from isqtorch.integrations.checkpoints.gguf.pieces import SPLITS
from tests.gguf_files import f32, write
from tests.integrations.gguf_models import tiny_model, write_model

TEXT = (
    "Hello world! It's 12345 o'clock, we'RE here.\n\n  def f(x):\n\treturn x**2  # 3.14\n" * 4
    + "Caf\u00e9 na\u00efve \u6f22\u5b57 \U0001f642 <|im_end|> x"
)


def trained() -> tuple[list[str], list[str]]:
    """The vocabulary and merges of a byte-level tokenizer."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([TEXT], BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    import json

    model = json.loads(tokenizer.to_str())["model"]
    vocab = sorted(model["vocab"], key=model["vocab"].get)
    return vocab, [" ".join(merge) for merge in model["merges"]]


VOCAB, MERGES = trained()
SPECIAL = ["<|bos|>", "<|im_start|>", "<|im_end|>", "<think>"]
BYTE_LEVEL: dict[str, Any] = {
    "general.architecture": "llama",
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": [*VOCAB, *SPECIAL],
    "tokenizer.ggml.token_type": [1] * len(VOCAB) + [3, 3, 3, 4],
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": len(VOCAB),
    "tokenizer.ggml.eos_token_id": len(VOCAB) + 2,
}
PIECES = [
    "<unk>",
    "<s>",
    "</s>",
    *(f"<0x{byte:02X}>" for byte in range(256)),
    "\u2581",
    "a",
    "b",
    "ab",
    "\u2581ab",
    "abab",
    "c",
]
SENTENCEPIECE: dict[str, Any] = {
    "general.architecture": "llama",
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": PIECES,
    "tokenizer.ggml.scores": [0.0] * 259 + [-10.0, -11.0, -12.0, -1.0, -2.0, -3.0, -13.0],
    "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 7,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
}


def checkpoint(path: Path, metadata: dict[str, Any], **changes: Any) -> GgufCheckpoint:
    """A file with a tokenizer. `changes` are keys of tokenizer.ggml; None removes a key."""
    metadata = metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    rows = len(metadata.get("tokenizer.ggml.tokens", [])) or 1
    return GgufCheckpoint(write(path / "x.gguf", metadata, {"token_embd.weight": f32([[0.0]] * rows)}))


def test_byte_level_tokens_are_those_of_the_tokenizer_they_come_from(tmp_path: Path) -> None:
    found = checkpoint(tmp_path, BYTE_LEVEL).tokenizer()
    original = Tokenizer(BPE(vocab={t: n for n, t in enumerate(VOCAB)}, merges=[tuple(m.split(" ")) for m in MERGES]))
    original.pre_tokenizer, original.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    original.add_special_tokens(SPECIAL[:3])
    ids = found(TEXT)["input_ids"]
    assert ids == original.encode(TEXT).ids and len(VOCAB) + 2 in ids
    assert found.decode(ids) == TEXT
    assert (found.bos_token, found.eos_token) == ("<|bos|>", "<|im_end|>")
    assert found("<think>x")["input_ids"][0] == len(VOCAB) + 3
    assert found.decode([len(VOCAB) + 3, ids[0]], skip_special_tokens=True).startswith("<think>")
    assert found.decode([len(VOCAB) + 1, ids[0]], skip_special_tokens=True) == found.decode([ids[0]])


@pytest.mark.parametrize(
    ("rule", "pieces"),
    [
        ("gpt-2", ["It", "'s", " 12345", " o", "'", "clock", ",", " we", "'", "RE", "  ", " x", "\n\n", "\ty"]),
        ("smollm", ["It", "'s", " ", "1", "2", "3", "4", "5", " o", "'", "clock", ",", " we", "'", "RE", "  ", " x", "\n\n", "\ty"]),
        ("llama-bpe", ["It", "'s", " ", "123", "45", " o", "'clock", ",", " we", "'RE", "  ", " x", "\n\n", "\ty"]),
        ("qwen2", ["It", "'s", " ", "1", "2", "3", "4", "5", " o", "'clock", ",", " we", "'RE", "  ", " x", "\n\n", "\ty"]),
        ("tekken", ["It", "'s", " ", "1", "2", "3", "4", "5", " o", "'clock", ",", " we", "'RE", "  ", " x", "\n\n", "\ty"]),
        ("gpt-4o", ["It's", " ", "123", "45", " o", "'clock", ",", " we'RE", "  ", " x", "\n\n", "\ty"]),
        ("deepseek-v3", ["It", "'s", " ", "123", "45", " o", "'clock", ",", " we", "'RE", "  ", " x", "\n\n", "\ty"]),
    ],
)  # fmt: skip
def test_rules_split_texts_as_their_models_do(rule: str, pieces: list[str], tmp_path: Path) -> None:
    found = checkpoint(tmp_path, BYTE_LEVEL, pre=rule).tokenizer()
    split = found.backend_tokenizer.pre_tokenizer.pre_tokenize_str("It's 12345 o'clock, we'RE   x\n\n\ty")
    spelled = {letter: byte for byte, letter in bytes_to_letters().items()}
    texts = [bytes(spelled[letter] for letter in piece).decode() for piece, _ in split]
    if rule == "gpt-2":  # GPT-2 has no rule for ends of lines: a tab is a space
        pieces = [*pieces[:-2], "\n\n", "\t", "y"]
    assert "".join(texts) == "It's 12345 o'clock, we'RE   x\n\n\ty"
    assert texts == pieces or texts == [*pieces[:-2], "\n\n", "\t", "y"]


def bytes_to_letters() -> dict[int, str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    found: dict[int, str] = bytes_to_unicode()
    return found


@pytest.mark.parametrize("rule", sorted(SPLITS))
def test_every_rule_is_a_valid_one_and_loses_nothing(rule: str, tmp_path: Path) -> None:
    found = checkpoint(tmp_path, BYTE_LEVEL, pre=rule, add_bos_token=False).tokenizer()
    assert found.decode(found(TEXT)["input_ids"]) == TEXT


def test_a_token_that_is_a_piece_is_taken_whole_where_the_model_does_so(tmp_path: Path) -> None:
    changes = {"tokens": [*VOCAB, "zqz"], "token_type": None, "bos_token_id": None, "eos_token_id": None}
    for rule, whole in (("llama-bpe", True), ("dbrx", False)):
        found = checkpoint(tmp_path, BYTE_LEVEL, pre=rule, **changes).tokenizer()
        assert (found("zqz")["input_ids"] == [len(VOCAB)]) == whole


def test_sentencepiece_merges_come_from_the_scores(tmp_path: Path) -> None:
    found = checkpoint(tmp_path, SENTENCEPIECE).tokenizer()
    assert found.convert_ids_to_tokens(found("ab")["input_ids"]) == ["<s>", "\u2581ab"]
    assert found.convert_ids_to_tokens(found("abab c")["input_ids"]) == ["<s>", "\u2581ab", "ab", "\u2581", "c"]
    assert found.convert_ids_to_tokens(found("a\u00e9</s>")["input_ids"]) == [
        "<s>", "\u2581", "a", "<0xC3>", "<0xA9>", "</s>",
    ]  # fmt: skip
    assert found.decode(found(" ab  c\u00e9", add_special_tokens=False)["input_ids"]) == " ab  c\u00e9"
    bare = checkpoint(
        tmp_path, SENTENCEPIECE, add_space_prefix=False, add_bos_token=False, add_eos_token=True
    ).tokenizer()
    assert bare.convert_ids_to_tokens(bare("abab")["input_ids"]) == ["abab", "</s>"]


def test_a_unigram_vocabulary_of_t5(tmp_path: Path) -> None:
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", "\u2581ab", "c", "[PAD6]", "[PAD7]"]
    metadata = SENTENCEPIECE | {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -2.0, -1.0, -3.0, 0.0, 0.0],
        "tokenizer.ggml.token_type": [3, 3, 2, 1, 1, 1, 5, 5],
        "tokenizer.ggml.bos_token_id": None,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 2,
    }
    found = checkpoint(tmp_path, metadata).tokenizer()
    assert found("abc ab <extra_id_0>")["input_ids"] == [4, 5, 4, 7, 1]


def test_the_first_token_is_added_as_llama_cpp_does(tmp_path: Path) -> None:
    bos = len(VOCAB)
    for changes, added in (({}, False), ({"pre": "llama-bpe"}, True), ({"add_bos_token": True}, True),
                           ({"pre": "llama-bpe", "add_bos_token": False}, False)):  # fmt: skip
        ids = checkpoint(tmp_path, BYTE_LEVEL, **changes).tokenizer()("x")["input_ids"]
        assert (ids[0] == bos) == added, changes
    assert checkpoint(tmp_path, SENTENCEPIECE).tokenizer()("a")["input_ids"][0] == 1


def test_chat_templates(tmp_path: Path) -> None:
    main = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    found = checkpoint(tmp_path, BYTE_LEVEL | {"tokenizer.chat_template": main}).tokenizer()
    chat = [{"role": "user", "content": "Hi"}]
    assert found.apply_chat_template(chat, tokenize=False) == "user: Hi\n"
    named = {"tokenizer.chat_template": main, "tokenizer.chat_template.tool_use": "tools"}
    found = checkpoint(tmp_path, BYTE_LEVEL | named).tokenizer()
    assert found.apply_chat_template(chat, tokenize=False) == "user: Hi\n"
    assert found.apply_chat_template(chat, tokenize=False, chat_template="tool_use") == "tools"
    assert checkpoint(tmp_path, BYTE_LEVEL).tokenizer().chat_template is None


@pytest.mark.parametrize("metadata", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte-level", "sentencepiece"])
def test_a_saved_tokenizer_is_the_same(metadata: dict[str, Any], tmp_path: Path) -> None:
    found = checkpoint(tmp_path, metadata, add_bos_token=True).tokenizer()
    found.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in (TEXT, "abab c", ""):
        assert again(text)["input_ids"] == found(text)["input_ids"]


def test_a_file_without_a_rule_says_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="does not say how its tokenizer splits"):
        checkpoint(tmp_path, BYTE_LEVEL, pre=None).tokenizer()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint(tmp_path, BYTE_LEVEL).tokenizer()


@pytest.mark.parametrize(
    ("metadata", "changes", "message"),
    [
        (BYTE_LEVEL, {"model": "plamo2"}, r"of the kind 'plamo2'. Known are gpt2, llama"),
        (BYTE_LEVEL, {"model": None}, "of the kind None"),
        (BYTE_LEVEL, {"tokens": None}, "has no tokenizer"),
        (BYTE_LEVEL, {"tokens": [1, 2]}, "has no tokenizer"),
        (BYTE_LEVEL, {"pre": "magic"}, r"the rule 'magic' .* Known are .*llama-bpe"),
        (BYTE_LEVEL, {"pre": 3}, "must be a text"),
        (BYTE_LEVEL, {"merges": None}, "has no merges"),
        (BYTE_LEVEL, {"merges": ["ab"]}, "entry 0 is no pair"),
        (BYTE_LEVEL, {"merges": ["a b", "a b c"]}, "entry 1 is no pair"),
        (BYTE_LEVEL, {"merges": [1, 2]}, "no pair"),
        (BYTE_LEVEL, {"merges": ["no such"]}, "its tokenizer is damaged"),
        (BYTE_LEVEL, {"token_type": [1, 2]}, "one for each token"),
        (BYTE_LEVEL, {"token_type": "x"}, "one for each token"),
        (BYTE_LEVEL, {"token_type": [0.5] * (len(VOCAB) + 4)}, "one for each token"),
        (BYTE_LEVEL, {"bos_token_id": 10**6}, "bos_token_id is 1000000"),
        (BYTE_LEVEL, {"mask_token_id": -5}, "mask_token_id is -5"),
        (BYTE_LEVEL, {"add_bos_token": "yes"}, "must be true or false"),
        (BYTE_LEVEL | {"tokenizer.chat_template": 5}, {}, "chat_template must be a text"),
        (SENTENCEPIECE, {"scores": None}, "scores must be"),
        (SENTENCEPIECE, {"scores": [1.0]}, "scores must be"),
        (SENTENCEPIECE, {"scores": [float("nan")] * len(PIECES)}, "scores must be"),
        (SENTENCEPIECE, {"scores": ["a"] * len(PIECES)}, "scores must be"),
    ],
)
def test_damaged_tokenizers_are_refused(
    metadata: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        checkpoint(tmp_path, metadata, **changes).tokenizer()


def test_more_tokens_than_rows_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", BYTE_LEVEL, {"token_embd.weight": f32([[0.0]] * 5)})
    with pytest.raises(ValueError, match="its table of embeddings 5 rows"):
        GgufCheckpoint(path).tokenizer()


def test_a_large_tokenizer_is_built_quickly(tmp_path: Path) -> None:
    """150,000 tokens and merges; `tokenizers` itself takes most of the time."""
    letters = VOCAB[:256]
    pairs = [(first, second) for first in letters for second in letters]
    triples = [(first + second, third) for third in letters[:2] for first, second in pairs]
    merges = [f"{first} {second}" for first, second in [*pairs, *triples][:150_000]]
    tokens = [*letters, *(merge.replace(" ", "") for merge in merges)]
    file = checkpoint(
        tmp_path, BYTE_LEVEL, tokens=tokens, token_type=None, merges=merges, bos_token_id=None, eos_token_id=None
    )
    began = time.process_time()
    file.tokenizer()
    assert time.process_time() - began < 4


def charsmap(nodes: dict[int, int], texts: bytes = b"b\0", count: int = 512) -> bytes:
    """A table for normalizing, as sentencepiece writes it: a trie in an array of nodes, and the texts."""
    array = [nodes.get(number, 0) for number in range(count)]
    return struct.pack(f"<I{count}I", 4 * count, *array) + texts


LEAF, HAS_LEAF = 1 << 31, 1 << 8
A_TO_B = {0: 256 << 10, 256 + ord("a"): 1 << 10 | HAS_LEAF | ord("a"), 256 + ord("a") ^ 1: LEAF | 0}


def test_a_table_for_normalizing_is_used() -> None:
    data = charsmap(A_TO_B)
    assert charsmap_fault(data) is None
    assert normalizers.Precompiled(data).normalize_str("xax") == "xbx"
    assert charsmap_fault(charsmap(A_TO_B | {300: 0xFFFFFE00})) is None  # a node that no text reaches


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "take 0 of its 0 bytes"),
        (b"\xff" * 40, "take 4294967295 of its 40 bytes"),
        (charsmap(A_TO_B)[:100], "take 2048 of its 100 bytes"),
        (charsmap({0: 0xFFFFFFFF}, count=1), "behind the last of its 1 nodes"),
        (charsmap(A_TO_B | {256 + ord("a"): 4096 << 10 | ord("a")}), "behind the last of its 512 nodes"),
        (charsmap(A_TO_B | {256 + ord("a") ^ 1: LEAF | 9}), "no place in its 2 bytes of texts"),
        (charsmap(A_TO_B | {256 + ord("a") ^ 1: LEAF | 1}, "\u00e9\0".encode()), "no place in its 3 bytes of texts"),
        (charsmap(A_TO_B, b"\xff\0"), "texts that are not UTF-8"),
    ],
)
def test_a_table_for_normalizing_that_points_outside_is_refused(data: bytes, message: str, tmp_path: Path) -> None:
    """The library that uses it would panic in the middle of a text."""
    assert message in str(charsmap_fault(data))
    value = struct.pack("<IIQ", 9, 0, len(data)) + data
    metadata = SENTENCEPIECE | {"tokenizer.ggml.model": "t5", "tokenizer.ggml.precompiled_charsmap": value}
    if data:
        with pytest.raises(ValueError, match="precompiled_charsmap .* The file is damaged"):
            checkpoint(tmp_path, metadata).tokenizer()


def test_tokens_without_end_are_refused(tmp_path: Path) -> None:
    tokens = ["a" * 10**6, *PIECES[1:]]
    began = time.process_time()
    with pytest.raises(ValueError, match="tokens of up to 1000000 letters"):
        checkpoint(
            tmp_path, SENTENCEPIECE | {"tokenizer.ggml.token_type": [1] * len(PIECES)}, tokens=tokens
        ).tokenizer()
    assert time.process_time() - began < 1


def test_a_tokenizer_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    """The model loads all the same, but nobody should learn it from a None."""
    path = write_model(tmp_path / "x.gguf", tiny_model("llama"), metadata={"tokenizer.ggml.model": "plamo2"})
    with pytest.warns(
        UserWarning, match=r"load: without a tokenizer: .*x.gguf: has a tokenizer of the kind 'plamo2'"
    ) as told:
        loaded = isqtorch.load(path)
    assert loaded.tokenizer is None and any("plamo2" in note for note in loaded.report.notes)
    assert [each.filename for each in told if "plamo2" in str(each.message)] == [__file__]
