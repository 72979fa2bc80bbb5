"""Which entry of an importance matrix belongs to which layer, under llama.cpp's names and the model's."""

from __future__ import annotations

import json

import pytest
import torch
from imatrix_files import GOLDEN

from isqtorch.files.gguf_names import gguf_names, names_to_write
from isqtorch.importance.imatrix import Imatrix, read_imatrix

# ---- lookup ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        ("model.layers.7.self_attn.q_proj", "attn_q attn_qkv"),
        ("model.layers.7.self_attn.qkv_proj", "attn_qkv attn_q attn_k attn_v"),
        ("model.language_model.layers.7.self_attn.o_proj", "attn_output"),
        ("model.layers.7.self_attn.kv_a_proj_with_mqa", "attn_kv_a_mqa"),
        ("model.layers.7.mlp.gate_proj", "ffn_gate ffn_up"),
        ("layers.7.mlp.down_proj", "ffn_down"),
        ("base_model.model.model.layers.7.mlp.up_proj", "ffn_up ffn_gate"),
        ("model.layers.7.mlp.experts.gate_up_proj", "ffn_gate_up_exps ffn_gate_exps ffn_up_exps"),
        ("model.layers.7.block_sparse_moe.experts.3.w2", "ffn_down_exps"),
        ("model.layers.7.mlp.shared_expert.down_proj", "ffn_down_shexp"),
        ("model.layers.7.linear_attn.in_proj_qkvz", "ssm_in"),
        ("backbone.layers.7.mixer.out_proj", "ssm_out"),
        ("backbone.layers.7.mixer.o_proj", "attn_output"),
        ("transformer.h.7.attn.c_attn", "attn_qkv attn_q attn_k attn_v"),
        ("transformer.h.7.attn.c_proj", "attn_output"),
        ("transformer.h.7.mlp.c_proj", "ffn_down"),
        ("bert.encoder.layer.7.attention.self.query", "attn_q attn_qkv"),
        ("bert.encoder.layer.7.attention.output.dense", "attn_output"),
        ("bert.encoder.layer.7.intermediate.dense", "ffn_up"),
        ("bert.encoder.layer.7.output.dense", "ffn_down"),
        ("gpt_neox.layers.7.attention.query_key_value", "attn_qkv attn_q attn_k attn_v"),
        ("model.decoder.layers.7.fc1", "ffn_up"),
        # No names: another tower, another kind of layer, columns in another order.
        ("model.visual.layers.7.mlp.up_proj", ""),
        ("model.vision_tower.layers.7.self_attn.q_proj", ""),
        ("model.layers.7.mlp.chunk_experts.up_proj", ""),
        ("model.layers.7.mlp.experts.odd_proj", ""),
        ("model.layers.7.linear_attn.out_proj", ""),
        ("0", ""),
        ("", ""),
    ],
)
def test_gguf_names(layer: str, names: str) -> None:
    assert gguf_names(layer)[0] == [f"blk.7.{stem}.weight" for stem in names.split()]
    assert gguf_names(f"{layer}.weight") == gguf_names(layer)


def test_gguf_names_of_embedding_head_and_experts() -> None:
    assert gguf_names("model.embed_tokens") == (["token_embd.weight"], None)
    assert gguf_names("transformer.wte") == (["token_embd.weight"], None)
    assert gguf_names("lm_head") == (["output.weight", "token_embd.weight"], None)
    assert gguf_names("model.layers.0.mlp.experts.12.up_proj")[1] == 12


def test_lookup_order() -> None:
    layer = "model.layers.0.self_attn.q_proj"
    entries = {"blk.0.attn_qkv.weight": [1.0], "blk.0.attn_q.weight": [2.0], f"{layer}.weight": [3.0], layer: [4.0]}
    while entries:
        assert Imatrix(entries).vector(layer, 1).item() == len(entries)
        entries.popitem()
    assert Imatrix({"other": [1.0]}).vector(layer, 1) is None


def test_wrong_length_is_named() -> None:
    imatrix = Imatrix({"blk.0.attn_q.weight": torch.ones(64), "stack": torch.ones(4, 8)}, source="m.imatrix")
    with pytest.raises(
        ValueError, match=r"m.imatrix: layer 'model.layers.0.self_attn.q_proj' needs 96 .*attn_q.weight' has 64"
    ):
        imatrix.vector("model.layers.0.self_attn.q_proj", 96)
    with pytest.raises(ValueError, match="needs 8 x 4 importance values, entry 'stack' has 4 x 8"):
        imatrix.vector("stack", 4, experts=8)
    with pytest.raises(ValueError, match="needs 32 importance values"):
        imatrix.vector("stack", 32)
    assert imatrix.vector("stack", 8, experts=4).shape == (4, 8)


@pytest.mark.parametrize("in_features", [0, 63, 64 * 3])
def test_wrong_length_of_one_expert(in_features: int) -> None:
    imatrix = read_imatrix(GOLDEN / "ggml_imatrix.gguf")
    with pytest.raises(ValueError, match=f"needs {in_features} importance"):
        imatrix.vector("model.layers.1.mlp.experts.2.down_proj", in_features)
    with pytest.raises(ValueError, match="needs 64 importance"):
        imatrix.vector("model.layers.1.mlp.experts.4.down_proj", 64)  # there are four


# ---- the names of families -------------------------------------------------------------------------------------------

FAMILIES = json.loads((GOLDEN / "gguf_names.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_the_gguf_package(family: str) -> None:
    """The first name is what the gguf package's table says, for every layer that is ever quantized."""
    for layer, want in FAMILIES[family].items():
        if "ffn_gate_inp" in want:  # routers stay as they are
            continue
        if layer.endswith("linear_attn.out_proj"):  # its columns may be in another order, see gguf_names.py
            assert gguf_names(layer)[0] == []
        else:
            assert gguf_names(layer)[0][:1] == [want], layer
            assert names_to_write(layer)[0][0] == want


def test_names_to_write() -> None:
    fused = "model.layers.3.mlp.experts.gate_up_proj"
    assert names_to_write(fused)[0] == [f"blk.3.ffn_{x}_exps.weight" for x in ("gate_up", "gate", "up")]
    assert names_to_write("model.layers.3.mlp.experts.5.up_proj") == (["blk.3.ffn_up_exps.weight"], 5)
    assert names_to_write("model.layers.3.mlp.gate_proj") == (["blk.3.ffn_gate.weight"], None)
    assert names_to_write("blk.3.attn_q.weight") == ([], None)  # is one already
