"""Experimental plug-in for vLLM: serves models that isqtorch saved, and packs other models while vLLM loads them.

    vllm serve ./llama-q4k                                              a folder of save_pretrained after IsqConfig
    vllm serve meta-llama/Llama-3.1-8B --quantization isq               packed while loading, 4 bits
    ... --hf-overrides '{"quantization_config": {"quant_method": "isq", "isq": "q8_0"}}'

vLLM finds it by the entry point "vllm.general_plugins" of this package. It uses vLLM's documented interface for
external quantization methods. The tests use an imitation of that interface, not vLLM itself.
"""

from __future__ import annotations


def register() -> None:
    """Called by vLLM in each of its processes, possibly more than once."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    if "isq" not in QUANTIZATION_METHODS:
        from . import config  # noqa: F401  (registers)
