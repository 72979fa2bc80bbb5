"""The weights of GGUF files: types without a format, parts of different types, floats, rows that are read alone, damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import init_empty_weights

import isqtorch
from isqtorch.formats.gguf_types import GGUF_TYPES, decode
from isqtorch.inplace.source import sampled
from isqtorch.integrations.checkpoints.gguf.checkpoint import GgufCheckpoint
from isqtorch.integrations.checkpoints.gguf.weights import GgufWeights
from isqtorch.modules.convert import owner_of
from isqtorch.modules.parameter import plain_bytes
from tests.gguf_files import TYPES, f32
from tests.integrations.gguf_models import dims_of, logits, rows_of, tiny_model, write_model
from tests.integrations.test_gguf_models import IDS, decoded, mixed, opened

NUMBERS = {row.name: number for number, row in GGUF_TYPES.items()}


def blocks(kind: str, *shape: int) -> tuple[tuple[int, ...], int, bytes]:
    """A tensor of a type that nothing here can write: bytes with small scales."""
    row = GGUF_TYPES[NUMBERS[kind]]
    count = torch.Size(shape).numel() // row.block
    generator = torch.Generator().manual_seed(len(kind))
    data = torch.randint(0, 256, (count, row.block_bytes), dtype=torch.uint8, generator=generator)
    scale = (torch.rand(count, generator=generator) * 0.01 + 0.005).half().view(torch.uint8).view(count, 2)
    if kind == "NVFP4":
        data[:, :4] = torch.randint(40, 56, (count, 4), dtype=torch.uint8, generator=generator)
    elif kind.startswith("TQ"):
        data[:, -2:] = scale
    elif kind == "IQ1_M":
        data[:, 49:56:2] = data[:, 49:56:2] & 0x0F | torch.tensor([0x00, 0x00, 0x00, 0x20], dtype=torch.uint8)
    else:
        data[:, :2] = scale
    return shape[::-1], row.number, data.numpy().tobytes()


def values_of(tensor: tuple[tuple[int, ...], int, bytes]) -> torch.Tensor:
    dims, number, data = tensor
    rows = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(
        -1, len(data) // (torch.Size(dims[1:]).numel() or 1)
    )
    return decode(number, rows).view(dims[::-1])


def weights_of(path: Path) -> tuple[Any, GgufWeights]:
    """An empty model of the file, and its weights."""
    checkpoint = GgufCheckpoint(path)
    config = checkpoint.config()
    with init_empty_weights():
        model = getattr(transformers, config.architectures[0])._from_config(config, dtype=torch.float32)
    weights = checkpoint.weights(model)
    assert isinstance(weights, GgufWeights)
    return model, weights


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("kind", "format", "error"),
    [
        ("IQ1_S", "q4k", 0.06), ("IQ1_M", "q4k", 0.06), ("IQ2_XXS", "q4k", 0.06), ("IQ2_XS", "q4k", 0.06), ("IQ2_S", "q4k", 0.06),
        ("IQ3_XXS", "q5k", 0.04), ("IQ3_S", "q5k", 0.04), ("TQ1_0", "q4k", 0.01), ("TQ2_0", "q4k", 0.01), ("NVFP4", "q6k", 0.02),
    ],
)  # fmt: skip
def test_a_type_without_a_format_is_packed_in_one_that_adds_little(
    kind: str, format: str, error: float, tmp_path: Path
) -> None:
    tensor = blocks(kind, 512, 256)
    path = write_model(tmp_path / "x.gguf", tiny_model("llama"), mixed, tensors={"blk.0.ffn_up.weight": tensor})
    packed, report = opened(path)
    layer = owner_of(packed, UP)[0]
    assert layer.format == format
    assert f"{kind} in the file, which is no format here" in report[UP].reason
    values = values_of(tensor)
    assert float((layer.dequantize() - values).norm() / values.norm()) < error
    assert torch.equal(plain_bytes(layer.weight), isqtorch.quantize(values, format).data)


@pytest.mark.parametrize(("kind", "format"), [("IQ4_NL", "iq4_nl"), ("IQ4_XS", "iq4_xs"), ("MXFP4", "mxfp4")])
def test_types_of_tables_stay_as_they_are(kind: str, format: str, tmp_path: Path) -> None:
    path = write_model(tmp_path / "x.gguf", tiny_model("llama"), lambda name: format if "ffn" in name else "q8_0")
    packed, report = opened(path)
    layer = owner_of(packed, UP)[0]
    assert layer.format == format and report[UP].reason == f"stays {format}"
    expected = isqtorch.quantize(tiny_model("llama").get_submodule(UP).weight.detach(), format).data
    assert torch.equal(plain_bytes(layer.weight), expected)


def test_a_second_scale_of_nvfp4_is_applied(tmp_path: Path) -> None:
    tensor = blocks("NVFP4", 512, 256)
    more = {"blk.0.ffn_up.weight": tensor, "blk.0.ffn_up.scale": f32([0.25])}
    model, weights = weights_of(write_model(tmp_path / "x.gguf", tiny_model("llama"), mixed, tensors=more))
    assert torch.equal(weights.read(f"{UP}.weight"), values_of(tensor) * 0.25)
    assert not weights.unused(model.state_dict())
    more["blk.0.ffn_up.scale"] = f32([0.25, 0.5, 1.0])
    _, weights = weights_of(write_model(tmp_path / "y.gguf", tiny_model("llama"), mixed, tensors=more))
    with pytest.raises(ValueError, match="must be one for each matrix"):
        weights.read(f"{UP}.weight")


@pytest.mark.parametrize("format", ["f32", "f16", "bf16"])
def test_floats_stay_floats(format: str, tmp_path: Path) -> None:
    source = tiny_model("llama")
    path = write_model(tmp_path / "x.gguf", source, lambda name: format)
    _, weights = weights_of(path)
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[format]
    for name in ("model.layers.0.self_attn.q_proj.weight", "lm_head.weight"):
        held, value = weights.held(name), weights.read(name)
        assert held is not None and held.is_float() and not held.note
        assert value is not None and value.dtype == dtype
        assert torch.equal(value, source.state_dict()[name].to(dtype))
    packed, report = opened(path)
    assert not report.quantized and packed.dtype == torch.float32


GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_gate_and_up_of_experts_are_joined_whichever_way_the_file_has_them(kind: str, tmp_path: Path) -> None:
    source = tiny_model(kind)
    apart, _ = opened(write_model(tmp_path / "apart.gguf", source, mixed))
    fused, _ = opened(write_model(tmp_path / "fused.gguf", source, mixed, fused_experts=True))
    assert torch.equal(logits(apart, IDS), logits(fused, IDS))
    assert owner_of(apart, GATE_UP)[0].packed["gate_up_proj"] == "q4k"
    assert torch.equal(
        plain_bytes(owner_of(apart, GATE_UP)[0].gate_up_proj), plain_bytes(owner_of(fused, GATE_UP)[0].gate_up_proj)
    )


def test_gate_and_up_of_different_types_are_packed_anew_in_the_better_one(tmp_path: Path) -> None:
    source = tiny_model("qwen3_moe")

    def formats(name: str) -> str:
        return "q6k" if "ffn_up_exps" in name else mixed(name)

    path = write_model(tmp_path / "x.gguf", source, formats)
    packed, report = opened(path)
    assert owner_of(packed, GATE_UP)[0].packed["gate_up_proj"] == "q6k"
    assert "Q4_K and Q6_K in the file, and one weight has one format" in report[GATE_UP].reason
    stored = torch.cat([torch.stack([isqtorch.quantize(each, fmt).dequantize() for each in half]) for half, fmt in zip(
        source.state_dict()[GATE_UP].chunk(2, dim=1), ("q4k", "q6k"), strict=True)], dim=1)  # fmt: skip
    expected = torch.stack([isqtorch.quantize(each, "q6k").data for each in stored])
    assert torch.equal(plain_bytes(owner_of(packed, GATE_UP)[0].gate_up_proj), expected)


def test_experts_of_which_a_part_is_float_run(tmp_path: Path) -> None:
    for float_part in ("ffn_down_exps", "ffn_gate_exps"):
        path = write_model(
            tmp_path / "x.gguf",
            tiny_model("qwen3_moe"),
            lambda name, part=float_part: "f16" if part in name else mixed(name),
        )
        packed, _ = opened(path)
        assert torch.isfinite(logits(packed, IDS)).all()


def test_latent_attention_in_parts(tmp_path: Path) -> None:
    """Newer files of DeepSeek have kv_b_proj in two parts, one of them transposed."""
    source = tiny_model("deepseek_v3")
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    whole = source.state_dict()[name].view(4, 64 + 64, 256)
    keys, values = whole[:, :64].transpose(1, 2).contiguous(), whole[:, 64:].contiguous()
    more = {
        "blk.1.attn_k_b.weight": (dims_of(keys), *rows_of(keys, "q8_0")),
        "blk.1.attn_v_b.weight": (dims_of(values), *rows_of(values, "q8_0")),
    }
    newer = {
        "deepseek2.attention.head_count_kv": 1, "deepseek2.attention.key_length": 256 + 32, "deepseek2.attention.value_length": 256,
        "deepseek2.attention.key_length_mla": 96, "deepseek2.attention.value_length_mla": 64,
    }  # fmt: skip
    path = write_model(
        tmp_path / "x.gguf", source, mixed, metadata=newer, tensors=more, without=("blk.1.attn_kv_b.weight",)
    )
    packed, report = opened(path)
    assert "in parts, one of which is transposed" in report[name.removesuffix(".weight")].reason
    assert owner_of(packed, name.removesuffix(".weight"))[0].format == "q8_0"
    found = decoded(packed)[name]
    assert float((found - source.state_dict()[name]).norm() / source.state_dict()[name].norm()) < 0.015


@pytest.mark.parametrize(("format", "kept"), [("q8_0", True), ("mxfp4", True), ("q4k", False), ("f16", False)])
def test_columns_that_move_by_whole_blocks_stay_packed(format: str, kept: bool, tmp_path: Path) -> None:
    source, name = tiny_model("qwen3_5_text"), "model.layers.0.linear_attn.out_proj"
    packed, report = opened(
        write_model(tmp_path / "x.gguf", source, lambda tensor: format if "ssm_out" in tensor else "q8_0")
    )
    weight = source.get_submodule(name).weight.detach()
    if format == "f16":
        assert torch.equal(packed.get_submodule(name).weight, weight.half().float())
        return
    assert ("columns in another order, which cuts blocks of 256" in report[name].reason) == (not kept)
    if kept:
        expected = isqtorch.quantize(weight, format).data
        assert torch.equal(plain_bytes(packed.get_submodule(name).weight), expected)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3_moe", "bloom"])
def test_rows_that_are_read_alone_are_those_of_the_whole(kind: str, tmp_path: Path) -> None:
    path = write_model(tmp_path / "x.gguf", tiny_model(kind, vocab_size=640), mixed)
    model, weights = weights_of(path)
    compared = 0
    for name, parameter in model.state_dict().items():
        shape = tuple(parameter.shape)
        rows, whole = weights.sample(name, shape), weights.read(name)
        if rows is None or whole is None:
            continue
        assert torch.equal(whole[sampled(shape)], rows), name
        compared += sampled(shape) is not ...
        assert weights.sample(name, (*shape, 7)) is None
    assert compared >= (0 if kind == "gpt2" else 1)


def test_names_that_the_file_does_not_have(tmp_path: Path) -> None:
    _, weights = weights_of(write_model(tmp_path / "x.gguf", tiny_model("llama"), mixed))
    for name in ("model.layers.7.mlp.up_proj.weight", "model.layers.0.mlp.other.weight", "x", "", "lm_head.bias"):
        assert weights.held(name) is None and weights.read(name) is None and weights.sample(name, (2, 2)) is None


def test_tensors_without_a_place_are_told(tmp_path: Path) -> None:
    path = write_model(tmp_path / "x.gguf", tiny_model("llama"), mixed, tensors={"blk.0.extra.weight": f32([1.0, 2.0])})
    _, report = opened(path)
    assert [note for note in report.notes if "blk.0.extra.weight" in note]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"blk.0.attn_q.weight": f32([[0.5] * 256] * 250)}, "heads do not divide"),
        ({"blk.0.attn_q.weight": f32([[0.5] * 256] * 128)}, "the configuration makes it"),
        ({"blk.0.ffn_up.weight": f32([0.5] * 256)}, "the configuration makes it"),
        ({"blk.0.attn_norm.weight": f32([0.5] * 255)}, "the configuration makes it"),
        ({"blk.0.attn_norm.weight": ((256,), 26, bytes(1024))}, "has integers"),
        ({"blk.0.ffn_up.weight": ((256, 512), TYPES["q8_0"], b"\xff" * (512 * 8 * 34))}, "its bytes are not q8_0"),
    ],
)
def test_tensors_of_another_shape_or_kind_are_refused(tensors: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_model(tmp_path / "x.gguf", tiny_model("llama"), mixed, tensors=tensors)
    with pytest.raises(ValueError, match=rf"x.gguf: .*{message}"):
        opened(path)


def test_halves_of_experts_that_do_not_fit_together(tmp_path: Path) -> None:
    for half in (f32([[[0.5] * 128] * 256] * 4), f32([[0.5] * 256] * 4)):
        path = write_model(
            tmp_path / "x.gguf", tiny_model("qwen3_moe"), lambda n: "f32", tensors={"blk.0.ffn_up_exps.weight": half}
        )
        with pytest.raises(ValueError, match="blk.0.ffn_up_exps.weight"):
            opened(path)


def test_the_encoder_of_t5_alone(tmp_path: Path) -> None:
    source = tiny_model("t5")
    path = write_model(
        tmp_path / "x.gguf",
        source,
        mixed,
        metadata={"general.architecture": "t5encoder"},
        renamed=("t5.", "t5encoder."),
        only="enc.|token_embd",
    )
    packed, report = opened(path)
    assert type(packed).__name__ == "T5EncoderModel" and report.quantized
    expected = source.get_encoder()(IDS).last_hidden_state
    found = packed(IDS).last_hidden_state
    assert float((found - expected).norm() / expected.norm()) < 0.2


def test_load_opens_a_file(tmp_path: Path) -> None:
    path = write_model(tmp_path / "tiny.gguf", tiny_model("llama"), mixed)
    with pytest.warns(UserWarning, match="does not say how its tokenizer splits"):
        loaded = isqtorch.load(path)
    assert torch.equal(logits(loaded.model, IDS), logits(opened(path)[0], IDS))
    loaded.model.save_pretrained(tmp_path / "saved")
    again = isqtorch.load(tmp_path / "saved")
    assert torch.equal(logits(again.model, IDS), logits(loaded.model, IDS))
    assert again.model.config.quantization_config.layers["lm_head"] == "q6k"


def test_every_format_named_instead_exists() -> None:
    from isqtorch.integrations.checkpoints.gguf.types import SIZES, format_of, instead_of, is_plain

    for number, row in GGUF_TYPES.items():
        assert SIZES[number] == (row.block, row.block_bytes)
        if format_of(number) is None and not is_plain(number):
            for columns in (256, 64):
                assert columns % instead_of(number, columns).block == 0
