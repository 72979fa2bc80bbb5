"""How mlx-lm names and stores the weights of each architecture, as far as it differs from Hugging Face.

mlx-lm converts a checkpoint before it writes it. For most architectures it only stacks the experts, drops what it
computes itself, and turns the weights of convolutions. For some it changes values or joins weights, which nothing in
the files tells. So only architectures whose conversion is known are accepted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How the weights of an architecture are stored.

    Attributes:
        names: ((pattern, replacement), ...): the first that matches a name in the files gives the name in a checkpoint of
            Hugging Face.
        back: the same from a name of Hugging Face to the name in the files.
        fused: {end of a parameter's path: ends of the paths of its parts}: weights of which mlx-lm makes several.
        raised: ends of names of vectors to which mlx-lm adds 1.
        stacks: the name of the module that holds the stacks of experts.
        head: whether mlx-lm has an output head with weights of its own; None: as the configuration says.
    """

    names: tuple[tuple[str, str], ...] = ()
    back: tuple[tuple[str, str], ...] = ()
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    raised: tuple[str, ...] = ()
    stacks: str = "switch_mlp"
    head: bool | None = None


_PLAIN = Layout()
# Norms that multiply by 1 + weight: the files have 1 + weight.
_NORMS = (
    ".input_layernorm.weight",
    ".post_attention_layernorm.weight",
    "model.norm.weight",
    ".q_norm.weight",
    ".k_norm.weight",
)
_DENSE = (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj"))

_SAME = """
    apertus cohere cohere2 deepseek_v2 exaone exaone4 exaone_moe gemma gemma2 gemma3_text glm glm4 glm4_moe
    gpt_bigcode granite granitemoe helium hunyuan_v1_dense jamba lfm2 llama mamba mamba2 mellum
    ministral3 mistral mixtral nemotron olmo2 olmo3 olmoe phi phi3 phimoe qwen2 qwen2_moe qwen3
    qwen3_moe recurrent_gemma seed_oss smollm3 solar_open stablelm starcoder2
"""

LAYOUTS: dict[str, Layout] = {
    **dict.fromkeys(_SAME.split(), _PLAIN),
    "lfm2_moe": Layout(
        names=tuple((rf"\.feed_forward\.{mlx}\.", f".feed_forward.{own}.") for own, mlx in _DENSE),
        back=tuple((rf"\.feed_forward\.{own}\.", f".feed_forward.{mlx}.") for own, mlx in _DENSE),
    ),
    "dots1": Layout(stacks="experts"),
    "gpt_oss": Layout(stacks="experts"),
    "gpt2": Layout(names=((r"^model\.", "transformer."),), back=((r"^transformer\.", "model."),)),
    "gptj": Layout(names=((r"^model\.", "transformer."),), back=((r"^transformer\.", "model."),)),
    "gpt_neox": Layout(
        names=(
            (r"^model\.embed_out\.", "embed_out."),
            (r"^model\.h\.", "gpt_neox.layers."),
            (r"^model\.", "gpt_neox."),
        ),
        back=((r"^gpt_neox\.layers\.", "model.h."), (r"^gpt_neox\.", "model."), (r"^embed_out\.", "model.embed_out.")),
    ),
    "granitemoehybrid": Layout(
        fused={
            "shared_mlp.input_linear": ("mlp.gate_proj", "mlp.up_proj"),
            "shared_mlp.output_linear": ("mlp.down_proj",),
        }
    ),
    "qwen3_next": Layout(raised=_NORMS),
    "qwen3_5_text": Layout(raised=_NORMS),
    "qwen3_5_moe_text": Layout(raised=_NORMS),
}

LAYOUTS |= {
    kind: replace(LAYOUTS[kind], head=False) for kind in "cohere cohere2 gemma gemma2 gpt2 lfm2 lfm2_moe".split()
}
LAYOUTS |= {
    kind: replace(LAYOUTS[kind], head=True)
    for kind in "deepseek_v2 glm4 glm4_moe gpt_neox gpt_oss gptj phi phimoe qwen2_moe solar_open stablelm".split()
}


def layout_of(model_type: Any, where: str) -> Layout:
    """The layout of an architecture.

    Raises:
        ValueError: it is not known.
    """
    found = LAYOUTS.get(model_type) if isinstance(model_type, str) else None
    if found is None:
        raise ValueError(
            f"{where}: it is not known how MLX stores the weights of model_type {model_type!r:.80}. Known are {', '.join(sorted(LAYOUTS))}."
        )
    return found


def renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    """Apply the first of the rules that matches."""
    for pattern, replacement in rules:
        new, count = re.subn(pattern, replacement, name, count=1)
        if count:
            return new
    return name


def is_raised(layout: Layout, name: str, vector: Tensor) -> bool:
    """Whether mlx-lm adds 1 to a tensor."""
    return bool(layout.raised) and vector.dim() == 1 and name.endswith(layout.raised)
