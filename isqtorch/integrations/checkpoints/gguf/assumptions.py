"""What llama.cpp takes for granted, and a file cannot say otherwise: a model that differs would give other numbers there.

A difference that changes all numbers is an error. One that only long texts show is a loss, which becomes a warning.
Facts: src/models of llama.cpp, and tests with tiny models of these kinds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from isqtorch.text import first_names

_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "activation")
# llama.cpp has one function for each group.
_SAME = (
    {"silu", "swish"},
    {"gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python"},
)
# type of model -> {attribute: the values that llama.cpp computes with}
_VALUES: dict[str, dict[str, tuple[Any, ...]]] = {
    "gpt2": {
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    "bloom": {"apply_residual_connection_post_layernorm": (False,)},
    "gemma3_text": {"attn_logit_softcapping": (None,), "use_bidirectional_attention": (False, None)},
}
_CAPPED = ("attn_logit_softcapping", "final_logit_softcapping")  # Gemma 2 has both; None is no number

# Architectures in which layers with a sliding window have one in llama.cpp, too.
_WINDOWS = frozenset({"cohere2", "gemma2", "gemma3", "gemma4", "gpt-oss"})

# Tensors that llama.cpp reads in some architectures only, and these.
_READ = (
    (r"blk\.\d+\.attn_output\.bias", "bloom ernie4_5 gpt-oss gpt2 gptneox granite granitemoe llama mistral3 nemotron phi2 starcoder2"),
    (r"blk\.\d+\.ffn_(?:up|down|gate)\.bias", "bloom gpt2 gptneox granite granitemoe llama mistral3 nemotron phi2 starcoder2"),
    (r"blk\.\d+\.attn_qkv\.bias", "bloom gpt2 gptneox phi2 phi3 chatglm"),
    (r"blk\.\d+\.ssm_(?:in|out)\.bias", ""),
    (r"output\.bias", "phi2"),
)  # fmt: skip
_NEEDED = {
    "gptneox": "blk.0.attn_qkv.bias",
    "mamba": "blk.0.ssm_conv1d.bias",
    "starcoder2": "blk.0.attn_output.bias",
}
_ALL_KEYS = frozenset({"dots1", "olmoe"})  # as many heads of keys as of queries
_LITE = (26, 27)  # layers of the DeepSeek models without q_lora_rank
_MANY = 64  # Command R with so many layers has norms of queries and keys


def difference(architecture: str, config: Any, tensors: Mapping[str, str]) -> str | None:
    """How a model differs from what llama.cpp computes with; None: not.

    Args:
        architecture: its name in the file.
        config: the text config.
        tensors: {name of a tensor in the file: name of the parameter}.
    """
    usual = type(config)()
    for name in _ACTIVATIONS:
        value, default = getattr(config, name, None), getattr(usual, name, None)
        if value != default and not any({value, default} <= group for group in _SAME):
            return f"{name} is {value!r}, and llama.cpp computes with {default!r}"
    for name, values in _VALUES.get(config.model_type, {}).items():
        if getattr(config, name, values[0]) not in values:
            return f"{name} is {getattr(config, name)!r}, and llama.cpp computes with {values[0]!r}"
    for name in _CAPPED if architecture == "gemma2" else ():
        if getattr(config, name) is None:
            return f"{name} is None, and llama.cpp computes with a number"
    if architecture == "smollm3" and any(
        bool(flag) != bool((i + 1) % 4) for i, flag in enumerate(config.no_rope_layers)
    ):
        return "layers without positions are not every fourth one (no_rope_layers), as llama.cpp has them"
    if architecture in _ALL_KEYS and config.num_key_value_heads not in (None, config.num_attention_heads):
        return f"num_key_value_heads is {config.num_key_value_heads}, and llama.cpp computes with {config.num_attention_heads}"
    if architecture == "deepseek2" and config.q_lora_rank is None and config.num_hidden_layers not in _LITE:
        return f"q_lora_rank is None, and llama.cpp knows that only for models of {_LITE[0]} or {_LITE[1]} layers"
    if architecture.startswith("qwen35") and config.linear_key_head_dim != config.linear_value_head_dim:
        return "linear_key_head_dim and linear_value_head_dim differ, and llama.cpp computes with the first"
    if architecture in _WINDOWS and "sliding_attention" not in config.layer_types:
        return "no layer has a sliding window, and llama.cpp needs one"
    for pattern, known in _READ:
        unread = [parameter for name, parameter in tensors.items() if re.fullmatch(pattern, name)]
        if unread and architecture not in known.split():
            return f"llama.cpp does not read {first_names(unread, 2)}"
    needed = _NEEDED.get(architecture)
    if needed is not None and needed not in tensors:
        return f"the model has no {needed}, which llama.cpp needs"
    if architecture == "command-r" and config.num_hidden_layers < _MANY and "blk.0.attn_q_norm.weight" in tensors:
        return f"use_qk_norm is set, and llama.cpp knows that only for models of {_MANY} or more layers"
    return None


def losses(architecture: str, config: Any) -> list[str]:
    """What llama.cpp does in another way, for texts that are long enough."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    used = getattr(config, "use_sliding_window", True) and (types is None or "sliding_attention" in types)
    length = getattr(config, "max_position_embeddings", None) or 0
    if architecture in _WINDOWS or not window or not used or window >= length:
        return []
    return [f"some layers attend to the last {window} tokens, and in llama.cpp to all: longer texts get other numbers"]
