"""A vLLM plug-in, experimental: models that isqtorch saved, and others packed while vLLM loads them.

    vllm serve ./llama-q4k                                              what save_pretrained wrote after IsqConfig
    vllm serve meta-llama/Llama-3.1-8B --quantization isq               packed on the way, 4 bits
    ... --hf-overrides '{"quantization_config": {"quant_method": "isq", "isq": "q6k"}}'

vLLM finds it by the entry point "vllm.general_plugins" of this package. It is written to vLLM's documented interface for
quantization methods that live outside of vLLM, and tested against a model of that interface, not against vLLM itself.
"""

from __future__ import annotations


def register() -> None:
    """Called by vLLM in each of its processes, possibly more than once."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    if "isq" not in QUANTIZATION_METHODS:
        from . import config  # noqa: F401  (registers)
