"""The configuration of GGUF files: rotary embeddings, keys that change the numbers, absurd values, generation settings."""

from __future__ import annotations

import math
import re
import resource
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import isqtorch
from isqtorch.integrations.checkpoints.gguf.architectures import ARCHITECTURES, of_config
from isqtorch.integrations.checkpoints.gguf.checkpoint import GgufCheckpoint
from tests.gguf_files import U32, encode, f32, write
from tests.integrations.gguf_models import logits, tiny_model, write_model
from tests.integrations.test_gguf_models import decoded, mixed, opened

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
GEMMA = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
}
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0 + i / 64 for i in range(32)], "partial_rotary_factor": 1.0,
    "long_factor": [2.0 + i / 8 for i in range(32)], "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "rope", "options"),
    [
        ("llama", LLAMA3, {"max_position_embeddings": 131072}),
        ("llama", LLAMA3 | {"factor": 32.0}, {"max_position_embeddings": 131072}),
        ("qwen2", YARN, {}),
        ("llama", {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}, {}),
        ("gemma3_text", GEMMA, {}),
        ("phi3", LONG, {"original_max_position_embeddings": 64}),
        ("stablelm", {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}, {}),
    ],
    ids=["llama3", "llama3.2", "yarn", "linear", "gemma3", "longrope", "partial"],
)
def test_rotary_embeddings_come_back(kind: str, rope: dict[str, Any], options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(kind, rope_parameters=rope, **options)
    packed, report = opened(write_model(tmp_path / "x.gguf", model, mixed))
    found = packed.config.rope_parameters
    for name, value in rope.items():
        if isinstance(value, (str, dict)):
            assert found[name] == value, name
        else:
            assert found[name] == pytest.approx(value, rel=1e-6), name
    assert not any("no place" in note for note in report.notes)
    model.load_state_dict(decoded(packed))
    long = torch.arange(96)[None]  # longer than the original length of some
    assert torch.allclose(logits(packed, long), logits(model, long), rtol=1e-5, atol=1e-5)


def test_all_settings_of_yarn_are_read(tmp_path: Path) -> None:
    """llama.cpp multiplies the factor of attention by its own one, 1 + ln(factor) / 10."""
    keys = {"yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0, "attn_factor": 1.25}
    metadata = {f"qwen3.rope.scaling.{key}": value for key, value in keys.items()}
    config = GgufCheckpoint(
        write_model(tmp_path / "x.gguf", tiny_model("qwen3", rope_parameters=YARN), metadata=metadata)
    ).config()
    found = config.rope_parameters
    assert (found["beta_fast"], found["beta_slow"]) == (16.0, 2.0)
    assert found["attention_factor"] == pytest.approx(1.25 * (1 + 0.1 * math.log(4.0)), rel=1e-6)


def test_factors_that_no_configuration_has_are_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "x.gguf", tiny_model("llama"), tensors={"rope_freqs.weight": f32([1.0, 3.0] * 16)})
    with pytest.raises(ValueError, match="factors that are not those of Llama 3's rule"):
        GgufCheckpoint(path).config()


def test_factors_of_one_change_nothing(tmp_path: Path) -> None:
    path = write_model(tmp_path / "x.gguf", tiny_model("llama"), tensors={"rope_freqs.weight": f32([1.0] * 32)})
    assert GgufCheckpoint(path).config().rope_parameters["rope_type"] == "default"


@pytest.mark.parametrize("kind", ["phi3", "starcoder2"])
def test_a_window_of_zero_is_none(kind: str, tmp_path: Path) -> None:
    for window, expected in ((0, None), (64, 64)):
        metadata = {f"{kind}.attention.sliding_window": window}
        path = write_model(tmp_path / "x.gguf", tiny_model(kind, sliding_window=None), metadata=metadata)
        assert GgufCheckpoint(path).config().sliding_window == expected


def test_the_largest_gemma_has_another_scale(tmp_path: Path) -> None:
    """transformers' own reader leaves it at 256."""
    options = {"num_hidden_layers": 46, "head_dim": 32, "intermediate_size": 32, "hidden_size": 32}
    model = tiny_model("gemma2", query_pre_attn_scalar=8, **options)
    config = GgufCheckpoint(write_model(tmp_path / "x.gguf", model)).config()
    assert (config.query_pre_attn_scalar, config.head_dim) == (8, 32)


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("llama", "rope.scaling.type", "magic"),
        ("llama", "attn_logit_softcapping", 30.0),
        ("llama", "final_logit_softcapping", 30.0),
        ("llama", "attention.sliding_window", 128),
        ("llama", "attention.scale", 0.5),
        ("llama", "attention.clamp_kqv", 8.0),
        ("llama", "logit_scale", 0.25),
        ("qwen3_moe", "expert_gating_func", 2),
        ("qwen3_moe", "expert_weights_scale", 2.5),
        ("qwen3_moe", "expert_shared_count", 1),
        ("llama", "attention.value_length", 32),
        ("falcon", "tensor_data_layout", "other"),
    ],
)
def test_a_key_that_changes_the_numbers_is_never_dropped(kind: str, key: str, value: Any, tmp_path: Path) -> None:
    model = tiny_model(kind)
    name = {"qwen3_moe": "qwen3moe"}.get(kind, kind)
    path = write_model(tmp_path / "x.gguf", model, metadata={f"{name}.{key}": value})
    with pytest.raises(ValueError, match=key.split(".")[-1]):
        GgufCheckpoint(path).config()


def test_values_without_effect_are_no_fault_and_unknown_words_are_told(tmp_path: Path) -> None:
    metadata = {
        "llama.attn_logit_softcapping": 0.0, "llama.expert_count": 0, "llama.rope.scaling.type": "none", "llama.logit_scale": 1.0,
        "llama.colour": "green",
    }  # fmt: skip
    _, report = opened(write_model(tmp_path / "x.gguf", tiny_model("llama"), metadata=metadata))
    assert [note for note in report.notes if "llama.colour" in note]
    assert not [note for note in report.notes if "softcapping" in note]


def test_an_unknown_architecture_lists_the_known_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", {"general.architecture": "wavtokenizer-dec"}, {"token_embd.weight": f32([[1.0]])})
    with pytest.raises(ValueError, match=r"'wavtokenizer-dec'.*Known are .*gemma3.*llama.*qwen3moe"):
        GgufCheckpoint(path)


def test_the_vision_part_asks_for_the_text_model(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mmproj.gguf", {"general.architecture": "clip", "general.type": "mmproj"}, {"v.x": f32([1.0])}
    )
    with pytest.raises(ValueError, match="Give the text model's file"):
        GgufCheckpoint(path)


@pytest.mark.parametrize("metadata", [{}, {"general.architecture": 5}, {"general.type": "imatrix"}], ids=str)
def test_other_files_are_no_models(metadata: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no model"):
        GgufCheckpoint(write(tmp_path / "x.gguf", metadata, {}))


NUMBERS = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv",
           "attention.key_length", "rope.dimension_count", "context_length")  # fmt: skip
WRONG: list[Any] = [
    1 << 31,
    10**9,
    0,
    -1,
    "7",
    2.5,
    True,
    [1, 2],
    [],
    ["a"],
    struct.pack("<IQ", 10, 1 << 40),
    struct.pack("<IQ", 10, (1 << 64) - 1),
    None,
]


@pytest.mark.parametrize("key", NUMBERS)
def test_absurd_sizes_are_refused_before_a_model_is_built(key: str, tmp_path: Path) -> None:
    path = write_model(tmp_path / "x.gguf", tiny_model("llama"))
    for wrong in WRONG:
        if wrong is None and key not in ("block_count", "embedding_length", "feed_forward_length", "context_length"):
            continue  # these have a default
        if key == "context_length" and wrong == 10**9:
            continue
        metadata = {f"llama.{key}": wrong}
        write_model(path, tiny_model_once(), metadata=metadata if wrong is not None else None)
        if wrong is None:
            path.write_bytes(path.read_bytes().replace(f"llama.{key}".encode(), f"llamA.{key}".encode()))
        checkpoint = GgufCheckpoint(path)
        began = time.process_time()
        with pytest.raises(ValueError, match=f"llama.{key}") as raised:
            checkpoint.config()
        assert time.process_time() - began < 0.1, wrong
        assert len(str(raised.value)) < 600


@pytest.mark.parametrize(("kind", "key"), [("llama", "llama.block_count"), ("t5", "t5.decoder_block_count")])
def test_blocks_are_counted_and_not_taken_from_a_name(kind: str, key: str, tmp_path: Path) -> None:
    more = {"blk.999999.attn_q.weight": f32([1.0]), "dec.blk.888888.attn_q.weight": f32([1.0])}
    for count in (999999, 500, 5):
        path = write_model(tmp_path / "x.gguf", tiny_model(kind, vocab_size=640), metadata={key: count}, tensors=more)
        began = time.process_time()
        with pytest.raises(ValueError, match=key):
            GgufCheckpoint(path).config()
        assert time.process_time() - began < 0.5


@pytest.mark.parametrize("kind", ["gpt2", "gpt_bigcode"])
def test_positions_are_the_rows_of_their_table(kind: str, tmp_path: Path) -> None:
    name = {"gpt_bigcode": "starcoder"}.get(kind, kind)
    model = tiny_model(kind, max_position_embeddings=64)
    path = write_model(tmp_path / "x.gguf", model, metadata={f"{name}.context_length": 96})
    with pytest.raises(ValueError, match="64, the rows of position_embd.weight"):
        GgufCheckpoint(path).config()
    assert GgufCheckpoint(write_model(path, model)).config().n_positions == 64


_MODELS: list[Any] = []


def tiny_model_once() -> Any:
    if not _MODELS:
        _MODELS.append(tiny_model("llama"))
    return _MODELS[0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.layer_norm_rms_epsilon", "x"),
        ("attention.layer_norm_rms_epsilon", struct.pack("<If", 6, float("nan"))),
        ("rope.freq_base", struct.pack("<If", 6, float("inf"))),
        ("rope.scaling.factor", -2.0),
        ("rope.scaling.type", 3),
    ],
)
def test_wrong_types_and_numbers_are_refused(key: str, value: Any, tmp_path: Path) -> None:
    metadata = {"llama.rope.scaling.type": "yarn"} | {f"llama.{key}": value}
    path = write_model(tmp_path / "x.gguf", tiny_model_once(), metadata=metadata)
    with pytest.raises(ValueError, match=f"llama.{key}"):
        GgufCheckpoint(path).config()


@pytest.mark.parametrize("kind", ["gemma3_text", "gemma4_text", "gpt_oss"])
def test_flags_of_layers_are_one_for_each(kind: str, tmp_path: Path) -> None:
    name = {"gemma3_text": "gemma3", "gemma4_text": "gemma4", "gpt_oss": "gpt-oss"}[kind]
    model = tiny_model(kind)
    count = model.config.num_hidden_layers
    for wrong in ([True] * (count + 1), [2] * count, ["a"] * count, "x", 1.5, True, [0.5] * count, [], -1):
        metadata = {f"{name}.attention.sliding_window_pattern": wrong}
        path = write_model(tmp_path / "x.gguf", model, metadata=metadata)
        with pytest.raises(ValueError, match="attention.sliding_window_pattern"):
            GgufCheckpoint(path).config()
    flags = [True] * (count - 1) + [False]
    path = write_model(tmp_path / "x.gguf", model, metadata={f"{name}.attention.sliding_window_pattern": flags})
    if kind != "gemma4_text":  # its last layers reuse the keys of layers of the same kind
        kinds = GgufCheckpoint(path).config().layer_types
        assert kinds == ["sliding_attention"] * (count - 1) + ["full_attention"]


@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id", "padding_token_id"])
def test_ids_of_tokens_are_rows_of_the_table(key: str, tmp_path: Path) -> None:
    for wrong in (96, 1 << 31, "a", True, 1.5):
        value = struct.pack("<II", U32, wrong) if isinstance(wrong, int) and not isinstance(wrong, bool) else wrong
        path = write_model(tmp_path / "x.gguf", tiny_model_once(), metadata={f"tokenizer.ggml.{key}": value})
        with pytest.raises(ValueError, match=f"tokenizer.ggml.{key}"):
            GgufCheckpoint(path).config()
    path = write_model(tmp_path / "x.gguf", tiny_model_once(), metadata={f"tokenizer.ggml.{key}": 0xFFFFFFFF})
    GgufCheckpoint(path).config()


def test_settings_for_generation(tmp_path: Path) -> None:
    tokens = [f"t{number}" for number in range(96)]
    tokens[7], tokens[8], tokens[9] = "<|eot_id|>", "<|im_end|>", "<|im_end|>"
    kinds = [3 if number in (1, 2, 7, 8) else 1 for number in range(96)]
    metadata = {
        "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds, "tokenizer.ggml.eot_token_id": 5,
        "general.sampling.temp": 0.6, "general.sampling.top_k": 20,
    }  # fmt: skip
    path = write_model(tmp_path / "x.gguf", tiny_model_once(), metadata=metadata)
    assert GgufCheckpoint(path).generation() == {
        "bos_token_id": 1,
        "eos_token_id": [2, 5, 7, 8],
        "pad_token_id": 0,
        "temperature": 0.6,
        "top_k": 20,
        "do_sample": True,
    }


def test_the_guide_lists_every_architecture() -> None:
    guide = (Path(__file__).resolve().parents[2] / "docs" / "guide.md").read_text(encoding="utf-8")
    listed = guide.partition("GGUF files of these architectures can be opened:")[2].partition('"mmproj"')[0]
    names = {record.name for record in ARCHITECTURES}
    assert names == names & set(re.split(r"[\s,;.]+", listed)), names - set(re.split(r"[\s,;.]+", listed))


def test_every_record_is_reached_and_has_one_reader() -> None:
    for record in ARCHITECTURES:
        same = [each for each in ARCHITECTURES if each.name == record.name]
        assert len(same) == 1 or all(each.when is not None for each in same[:-1]), record.name
    types = [kind for record in ARCHITECTURES for kind in record.model_types]
    assert len(types) == len(set(types))


def test_a_file_without_its_table_of_embeddings_is_incomplete(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", {"general.architecture": "llama"}, {"blk.0.attn_q.weight": f32([[1.0]])})
    with pytest.raises(ValueError, match="has no tensor 'token_embd.weight'"):
        GgufCheckpoint(path).config()
    (tmp_path / "y.gguf").write_bytes(encode({"general.architecture": "llama"}, {"token_embd.weight": f32([1.0])}))
    with pytest.raises(ValueError, match="must have two dimensions"):
        GgufCheckpoint(tmp_path / "y.gguf").config()


def test_the_blocks_of_tensors_are_counted(tmp_path: Path) -> None:
    """The name of one tensor can have any number, and a file of tiny tensors any number of them."""
    one = {"blk.999998.attn_q.weight": f32([[1.0]])}
    many = {f"blk.{number}.x": f32([1.0]) for number in range(2000)}
    for tensors, count in ((one, 999999), (many, 2000)):
        metadata = {"llama.block_count": count}
        path = write_model(tmp_path / "x.gguf", tiny_model_once(), metadata=metadata, tensors=tensors)
        with pytest.raises(ValueError, match=f"llama.block_count is {count}, must be an integer from 1 to (3|512)"):
            GgufCheckpoint(path).config()
    path = write_model(tmp_path / "x.gguf", tiny_model("t5"), metadata={"t5.decoder_block_count": 3})
    with pytest.raises(ValueError, match=r"t5.decoder_block_count is 3, must be an integer from 1 to 2"):
        GgufCheckpoint(path).config()


@pytest.mark.parametrize(
    ("kind", "key", "value", "message"),
    [
        ("qwen3_moe", "expert_count", 10**6, "numbers in its weights, and the files have"),
        ("qwen3_moe", "attention.head_count", 10**6, "numbers in its weights, and the files have"),
        ("gpt_oss", "expert_count", 10**6, "numbers in its weights, and the files have"),
        ("gpt_oss", "rope.freq_base", 1.0, r"makes no model of its configuration \(ZeroDivisionError"),
        ("llama", "embedding_length", 7, "refuses its configuration"),
    ],
)
def test_a_model_that_no_file_fills_is_never_built(
    kind: str, key: str, value: Any, message: str, tmp_path: Path
) -> None:
    name = of_config(tiny_model(kind).config).name
    large = {"large.weight": f32([[0.0] * 10**6])}  # one dimension that is large enough for any setting
    path = write_model(tmp_path / "x.gguf", tiny_model(kind), metadata={f"{name}.{key}": value}, tensors=large)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=message) as raised:
        isqtorch.load(path)
    assert "\n" not in str(raised.value) and "x.gguf" in str(raised.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({"temp": 0.0, "top_k": 40}, {"do_sample": False}),
        ({"temp": -1.0}, {"do_sample": False}),
        ({"temp": 0.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0}, {"temperature": 0.5, "top_k": 0, "top_p": 1.0}),
        ({"top_k": -5, "top_p": 7.5, "min_p": "x"}, {"top_k": 0}),
        ({"temp": float("nan"), "top_p": True}, {}),
    ],
)
def test_settings_for_sampling_are_those_of_llama_cpp(
    stated: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    metadata = {f"general.sampling.{key}": value for key, value in stated.items()}
    path = write_model(tmp_path / "x.gguf", tiny_model_once(), metadata=metadata)
    found = GgufCheckpoint(path).generation()
    wanted = {"do_sample": True} | expected if expected else {}
    named = ("do_sample", "temperature", "top_k", "top_p", "min_p")
    assert {name: found[name] for name in named if name in found} == wanted
    model = isqtorch.load(path).model
    model.generate(torch.tensor([[1, 5]]), max_new_tokens=2)  # transformers refuses values that it does not know
