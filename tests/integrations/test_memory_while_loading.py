"""Memory that runs out while a model is packed as it is loaded: the error names the layer and the way out.

transformers catches every error of a conversion, so one that is not kept would end as a remark in a log.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hf import load
from moe_models import build

from isqtorch import IsqConfig
from isqtorch.integrations.transformers import experts, quantizer

ON_CPU = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 bytes"
ERRORS = [torch.OutOfMemoryError("CUDA out of memory.\nMore text"), MemoryError(), RuntimeError(ON_CPU)]
each_error = pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)

# how a weight is packed: family of the model, the patterns of `include`, and the function that fails
PLACES: dict[str, tuple[str, str, Any, str]] = {
    "plain": ("qwen3_moe", "self_attn", quantizer, "pack_weight"),
    "stack": ("gpt_oss", "experts", quantizer, "pack_weight"),
    "turned": ("qwen3_vl_moe", "experts", quantizer, "pack_weight"),
    "matrices": ("qwen3_moe", "experts", experts, "pack_weight"),
    "reading a matrix": ("qwen3_moe", "experts", experts, "_reader"),
}


@pytest.fixture(params=PLACES)
def loading(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Callable[[str], Any], str, Any, str]:
    """A function that loads a model with a format, the kind of layers that are packed, and the function that fails."""
    family, include, module, name = PLACES[request.param]
    model = build(family)
    model.save_pretrained(tmp_path)

    def load(fmt: str) -> Any:
        return type(model).from_pretrained(tmp_path, quantization_config=IsqConfig(fmt, include=include))

    return load, include, module, name


def failing(module: Any, name: str, error: Exception) -> Any:
    """Patch a function so that its third call fails; of `_reader`, reading what the third call was given."""
    calls, real = iter(range(10_000)), getattr(module, name)

    def raising(*_: Any) -> Any:
        raise error

    def patched(*args: Any, **named: Any) -> Any:
        if next(calls) != 2:
            return real(*args, **named)
        return raising if name == "_reader" else raising()

    return mock.patch.object(module, name, patched)


@each_error
def test_the_error_names_the_layer(loading: Any, error: Exception) -> None:
    load, kind, module, name = loading
    with failing(module, name, error), pytest.raises(type(error)) as caught:
        load("q8_0")
    assert type(caught.value) is type(error) and "\n" not in str(caught.value)
    layer = rf"model\.[a-z_.]*layers\.[01]\.[a-z_.]*{kind}\.[a-z_]*"
    caught.match(rf"^IsqConfig: {layer}: memory ran out while it was packed in q8_0\. Nothing is loaded\. Free memory")
    assert load("q8_0").isq_report.quantized  # the next load is as usual


def test_other_errors_stay_as_they_are(loading: Any) -> None:
    load, _, module, name = loading
    with failing(module, name, RuntimeError("CUDA error: misaligned")):
        with pytest.raises(RuntimeError, match=r"^CUDA error: misaligned$"):
            load("q8_0")


def test_auto_says_it_too(checkpoints: Callable[[str], Path]) -> None:
    """In the first reading, in which the weights are only measured."""
    with failing(quantizer, "pack_weight", MemoryError()):
        with pytest.raises(MemoryError, match="memory ran out while it was packed in .* Nothing is loaded"):
            load(checkpoints("llama"), quantization_config=IsqConfig("auto", target_bpw=5))
