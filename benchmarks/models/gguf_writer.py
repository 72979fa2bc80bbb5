"""A packed Llama or Qwen3-MoE that `save_pretrained` wrote, as a GGUF file with the same bytes and no vocabulary.

It is written with the `gguf` package, for llama.cpp to be compared on the very weights that we run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..peers import Array, Unavailable
from ..peers.ggml import TYPES

_ARCHITECTURES = {"llama": "llama", "qwen3_moe": "qwen3moe"}
_MODEL = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.down_proj": "ffn_down_exps",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_FUSED = "mlp.experts.gate_up_proj"


def write_gguf(folder: Path, path: Path) -> None:
    """Write the model in `folder` to `path`.

    Raises:
        Unavailable: another architecture, or a format that ggml does not have.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    family = config["model_type"]
    if family not in _ARCHITECTURES:
        raise Unavailable(f"no GGUF of a {family} is written here, only of {', '.join(_ARCHITECTURES)}")
    formats: dict[str, str] = config["quantization_config"]["layers"]
    foreign = sorted({fmt for fmt in formats.values() if fmt not in TYPES})
    if foreign:
        raise Unavailable(f"ggml does not have {', '.join(foreign)}")
    import gguf
    from safetensors.torch import load_file

    writer = gguf.GGUFWriter(path, _ARCHITECTURES[family])
    _facts(writer, config)
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            module = name.removesuffix(".weight")
            if module not in formats:  # norms and routers
                writer.add_tensor(f"{gguf_name(module)}.weight", tensor.float().numpy())
                continue
            kind = gguf.GGMLQuantizationType(TYPES[formats[module]])
            for stem, rows in _parts(module, tensor.numpy(), config):
                writer.add_tensor(f"{stem}.weight", rows, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _facts(writer: Any, config: dict[str, Any]) -> None:
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    if "moe_intermediate_size" in config:
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


def _parts(module: str, packed: Array, config: dict[str, Any]) -> Iterator[tuple[str, Array]]:
    """A packed weight as the tensors that it is in GGUF: rows are whole, so they can be cut apart and moved."""
    if module.endswith(_FUSED):
        layer = gguf_name(module.removesuffix(_FUSED) + "mlp.gate").rpartition(".")[0]
        for stem, part in zip(("ffn_gate_exps", "ffn_up_exps"), np.split(packed, 2, axis=1), strict=True):
            yield f"{layer}.{stem}", np.ascontiguousarray(part)
    elif config["model_type"] == "llama" and module.endswith((".q_proj", ".k_proj")):
        yield gguf_name(module), interleaved(packed, len(packed) // config["head_dim"])
    else:
        yield gguf_name(module), packed


def gguf_name(module: str) -> str:
    """GGUF's name of a module: "model.layers.3.mlp.up_proj" -> "blk.3.ffn_up"."""
    if module in _MODEL:
        return _MODEL[module]
    layer, _, rest = module.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_LAYER[rest]}"


def interleaved(rows: Array, heads: int) -> Array:
    """llama.cpp rotates neighbours of a Llama's head where transformers rotates its halves: the rows in that order."""
    halves = rows.reshape(heads, 2, -1, rows.shape[-1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)
