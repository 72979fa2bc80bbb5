"""llama.cpp on the packed weights that we saved: the same bytes, in a GGUF file beside them.

Its C API is called through llama-cpp-python's declarations; the `gguf` package writes the file.
"""

from __future__ import annotations

import ctypes
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from ..peers import Array, Unavailable
from ..peers.ggml import TYPES
from .engines import tokens

INSTALL = "pip install llama-cpp-python gguf"
_CONTEXT = 1024
_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_MODEL = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


class LlamaCpp:
    """llama.cpp's CPU backend with as many threads as there are cores for this process."""

    def __init__(self) -> None:
        try:
            import gguf  # noqa: F401
            import llama_cpp
        except (ImportError, OSError, RuntimeError) as error:  # the last two: its library does not load
            raise Unavailable(f"not installed: {INSTALL} ({error})") from error
        self._api: Any = llama_cpp
        self._silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.version: str = llama_cpp.__version__
        self._model: Any = None
        self._context: Any = None
        self._vocabulary = 0

    @property
    def size(self) -> int:
        return int(self._api.llama_model_size(self._model))

    def prepare(self, folder: Path, fmt: str) -> Path:
        path = folder / "model.gguf"
        if not path.exists():
            partial = path.with_suffix(".partial")
            write_gguf(folder, partial)
            partial.rename(path)
        return path

    def load(self, source: Path, fmt: str) -> None:
        api = self._api
        self._free()
        self._model = api.llama_model_load_from_file(os.fsencode(source), api.llama_model_default_params())
        if not self._model:
            raise Unavailable(f"does not load {source.name}")
        parameters = api.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = _CONTEXT
        parameters.n_threads = parameters.n_threads_batch = len(os.sched_getaffinity(0))
        self._context = api.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise Unavailable("makes no context for the model")
        self._vocabulary = int(api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model)))

    def generate(self, prompt: int, new: int) -> tuple[float, float]:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        stamps = [time.perf_counter()]
        ids = tokens(self._vocabulary, prompt)
        for _ in range(new):
            ids = np.array([int(self._decode(ids).argmax())])
            stamps.append(time.perf_counter())
        return stamps[1] - stamps[0], stamps[-1] - stamps[1]

    def logits(self, ids: Array) -> Array:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        return self._decode(ids).copy()

    def _decode(self, ids: Array) -> Array:
        """Logits after the last of these tokens, which follow those before; valid until the next call."""
        api = self._api
        array = (api.llama_token * len(ids))(*map(int, ids))
        status = api.llama_decode(self._context, api.llama_batch_get_one(array, len(ids)))
        if status != 0:
            raise Unavailable(f"llama_decode gives {status}")
        found: Array = np.ctypeslib.as_array(api.llama_get_logits_ith(self._context, -1), (self._vocabulary,))
        return found

    def _free(self) -> None:
        if self._context:
            self._api.llama_free(self._context)
        if self._model:
            self._api.llama_model_free(self._model)
        self._model = self._context = None


def write_gguf(folder: Path, path: Path) -> None:
    """The packed Llama that `save_pretrained` wrote to `folder`, as a GGUF file without a vocabulary.

    Raises:
        Unavailable: another architecture, or a format that ggml does not have.
    """
    import gguf
    import torch
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "llama":
        raise Unavailable(f"no GGUF of a {config['model_type']} is written here, only of a Llama")
    formats: dict[str, str] = config["quantization_config"]["layers"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            module = name.removesuffix(".weight")
            if tensor.dtype != torch.uint8:  # a norm
                writer.add_tensor(f"{gguf_name(module)}.weight", tensor.float().numpy())
                continue
            fmt, rows = formats[module], tensor.numpy()
            if fmt not in TYPES:
                raise Unavailable(f"{module} is {fmt}, which ggml does not have")
            if module.endswith((".q_proj", ".k_proj")):
                rows = interleaved(rows, len(rows) // config["head_dim"])
            kind = gguf.GGMLQuantizationType(TYPES[fmt])
            writer.add_tensor(f"{gguf_name(module)}.weight", rows, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(module: str) -> str:
    """ "model.layers.3.mlp.up_proj" -> "blk.3.ffn_up"; the names of a Llama."""
    if module in _MODEL:
        return _MODEL[module]
    layer, _, rest = module.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_LAYER[rest]}"


def interleaved(rows: Array, heads: int) -> Array:
    """llama.cpp rotates neighbours of a head where transformers rotates its halves: the rows in that order."""
    halves = rows.reshape(heads, 2, -1, rows.shape[-1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)
