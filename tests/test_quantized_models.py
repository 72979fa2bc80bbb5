"""What a quantized model must survive: saving, copies, dtypes, compilation, generation; and the ways back and over."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from helpers import formats_of
from models import IDS, logits, mlp, state_bytes, tiny_bert, tiny_gpt2, tiny_llama
from torch import nn

from isqtorch.inplace.dequantize import dequantize_
from isqtorch.inplace.quantize import quantize_
from isqtorch.inplace.requantize import requantize_
from isqtorch.modules import QuantEmbedding, QuantLinear

# ---- what a quantized model must survive -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build", [tiny_llama, tiny_gpt2, tiny_bert, lambda: tiny_llama(tied=True)], ids=["llama", "gpt2", "bert", "tied"]
)
def test_life_of_a_quantized_model(build) -> None:
    model = build()
    quantize_(model, 4)
    state, want = state_bytes(model), logits(model)
    assert state_bytes(model) == state, "a forward changed the state"
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), want) and state_bytes(other) == state
    fresh = build()
    quantize_(fresh, 4)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh), want)
    packed = {name: raw for name, raw in state.items() if model.state_dict()[name].dtype == torch.uint8}
    model.to(torch.bfloat16)
    assert logits(model).dtype == torch.bfloat16 and packed.items() <= state_bytes(model).items()
    model.to("meta")
    assert all(p.is_meta for p in model.parameters())


def test_compile_fullgraph() -> None:
    model = mlp()
    quantize_(model, 4)
    x = torch.randn(3, 256)
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


def test_generate() -> None:
    model = tiny_llama(tied=True)
    quantize_(model, 4)
    out = model.generate(IDS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape == (1, 16)


def test_originals_are_freed() -> None:
    model = mlp()
    weights = [weakref.ref(layer.weight) for layer in model]
    modules = [weakref.ref(layer) for layer in model]
    quantize_(model, "q8_0")
    gc.collect()
    assert [ref() for ref in weights + modules] == [None] * 6


def test_works_in_inference_mode() -> None:
    model = mlp()
    with torch.inference_mode():
        quantize_(model, "q8_0")
    assert not model[0].weight.is_inference()
    model(torch.randn(1, 256, requires_grad=True)).sum().backward()


def test_strange_weights() -> None:
    """Half precision, transposed memory, a view into a larger tensor, one row."""
    model = nn.Sequential(nn.Linear(64, 32).half(), nn.Linear(64, 32), nn.Linear(64, 32), nn.Linear(64, 1))
    model[1].weight = nn.Parameter(torch.randn(64, 32).t())
    model[2].weight = nn.Parameter(torch.randn(40, 65)[8:, 1:])
    weights = [layer.weight.detach().clone() for layer in model]
    quantize_(model, "q8_0")
    for layer, weight in zip(model, weights, strict=True):
        want = torch.ops.isqtorch.quantize(weight.float().contiguous(), "q8_0")
        assert torch.equal(layer.weight, want)
    assert model[0].dtype == torch.float16


# ---- back and over ---------------------------------------------------------------------------------------------------


def test_dequantize_gives_the_weights_it_computed_with() -> None:
    model = tiny_llama()
    original = copy.deepcopy(model)
    quantize_(model, "q6k")
    want = {
        name: layer.dequantize()
        for name, layer in model.named_modules()
        if isinstance(layer, (QuantLinear, QuantEmbedding))
    }
    dequantize_(model)
    assert repr(model) == repr(original)
    for name, weight in want.items():
        assert torch.equal(model.get_submodule(name).weight, weight)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and all(
        p.requires_grad for p in model.parameters()
    )
    quantize_(model, "q6k")
    dequantize_(model, torch.float32)
    assert model.lm_head.weight.dtype == torch.float32


def test_requantize_starts_from_what_is_stored() -> None:
    model = mlp()
    quantize_(model, "q8_0", exclude=["2"])
    stored = model[0].dequantize()
    report = requantize_(model, "q4_0", source="stored", exclude=["1"], measure_error=True)
    assert formats_of(report) == {"0": "q4_0", "1": "q8_0", "2": "q4_0"}
    assert report["1"].reason == "excluded by '1'; stays q8_0" and report["0"].dtype == "q8_0"
    assert torch.equal(model[0].weight, torch.ops.isqtorch.quantize(stored, "q4_0"))
    assert report["0"].bytes_before == 256 * 272 and report["0"].bytes_after == 256 * 144
    assert report["0"].error is not None and report["1"].error is None
    again = state_bytes(model)
    report = requantize_(model, "q4_0", source="stored", exclude=["1"])
    assert report["0"].reason == "is q4_0 already" and state_bytes(model) == again


def test_requantize_keeps_ties_and_origins() -> None:
    model = tiny_gpt2()
    quantize_(model, "q8_0")
    requantize_(model, "q4k", source="stored")
    assert model.lm_head.weight is model.transformer.wte.weight and model.lm_head.format == "q6k"
    dequantize_(model)
    assert type(model.transformer.h[0].mlp.c_fc).__name__ == "Conv1D"
