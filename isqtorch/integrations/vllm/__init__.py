"""Plug-in for vLLM: serves models that isqtorch saved, and packs other models while vLLM loads them.

    vllm serve ./llama-q4k                                              a folder of save_pretrained after IsqConfig
    vllm serve meta-llama/Llama-3.1-8B --quantization isq               packed while loading, 4 bits
    ... --hf-overrides '{"quantization_config": {"quant_method": "isq", "isq": "q8_0"}}'

vLLM finds it by the entry point "vllm.general_plugins" of this package. `make test-vllm` tests it with vLLM itself; other
tests use an imitation of what plug-ins see of vLLM.
"""

from __future__ import annotations


def register() -> None:
    """Called by vLLM in each of its processes, possibly more than once."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    if "isq" not in QUANTIZATION_METHODS:
        from . import config  # noqa: F401  (registers)
        from .loader import install

        install()
