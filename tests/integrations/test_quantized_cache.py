"""`isqtorch.QuantizedCache`: what a model computes with it, what generate may do with it, and how much memory it takes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_decoders import CONFIGS, tiny
from torch import Tensor

import isqtorch

transformers = pytest.importorskip("transformers", "5.23")

from transformers import DynamicCache  # noqa: E402
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer  # noqa: E402

from isqtorch import QuantizedCache  # noqa: E402
from isqtorch.formats.kv import KV_FORMATS  # noqa: E402
from isqtorch.integrations.transformers.packed_states import PackedStates  # noqa: E402

DEMO = Path(__file__).resolve().parents[2] / "examples/demo_model/model"
NEW = 24
CLOSE = 5e-3  # a sum in another order may round a number of a later token to the code beside it


def rounded(states: Tensor, fmt: str) -> Tensor:
    """What the blocks say."""
    width = states.shape[-1]
    wide = torch.nn.functional.pad(states, (0, -width % 32))
    packed = isqtorch.ops.quantize(wide, fmt)
    return isqtorch.ops.dequantize(packed, fmt, torch.float32)[..., :width].to(states.dtype)


def rounding(kind: type, formats: tuple[str, str]) -> type:
    """A layer of floats that were packed and decoded as they came: the obvious version."""

    class Layer(kind):  # type: ignore[misc,valid-type]
        def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            first = self.get_seq_length() == 0
            found = super().update(rounded(keys, formats[0]), rounded(values, formats[1]), *args, **kwargs)
            return (keys, values) if first else found

    return Layer


def obvious(config: Any, formats: tuple[str, str]) -> DynamicCache:
    cache = DynamicCache(config=config)
    for place, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[place] = rounding(DynamicLayer, formats)()
        elif type(layer) is DynamicSlidingWindowLayer:
            cache.layers[place] = rounding(DynamicSlidingWindowLayer, formats)(layer.sliding_window)
    return cache


def ids_of(model: Any, batch: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, model.config.get_text_config().vocab_size, (batch, tokens), generator=generator)


def answers(model: Any, cache: Any, ids: Tensor, mask: Tensor, pieces: list[int]) -> Tensor:
    """Logits of a text that is read in pieces."""
    logits, done = [], 0
    with torch.no_grad():
        for piece in pieces:
            end = done + piece
            out = model(ids[:, done:end], attention_mask=mask[:, :end], cache=cache, use_cache=True)
            logits.append(out.logits)
            done = end
    return torch.cat(logits, 1)


@pytest.fixture(scope="module")
def model() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)


@pytest.fixture(scope="module")
def prompt() -> Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)
    text = (DEMO.parent / "heldout.txt").read_text(encoding="utf-8")
    ids: Tensor = tokenizer(text[:2000], return_tensors="pt").input_ids[:, :200]
    return ids


def generated(model: Any, prompt: Tensor, **options: Any) -> Tensor:
    torch.manual_seed(3)
    options = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 2, **options}
    options.setdefault("attention_mask", torch.ones_like(prompt))
    with torch.no_grad():
        out: Tensor = model.generate(prompt, **options)[:, prompt.shape[1] :]
    return out


# ---- what a model computes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CONFIGS if "mamba" not in case])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_architecture_computes_with_the_rounded_states(case: str, attention: str) -> None:
    """Also windows, heads that share keys, rows of padding, pieces of a prompt, heads of 8 to 64 numbers."""
    layers = {} if len(CONFIGS[case].get("layer_types", ())) < 8 else {"num_hidden_layers": 4, "layer_types": None}
    model = tiny(case, **layers)
    if attention not in ("eager", model.config._attn_implementation):
        pytest.skip(f"{case} has no {attention}")
    model.set_attn_implementation(attention)
    ids = ids_of(model, 2, 24)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    pieces = [11, 1, 1, 5, 1, 1, 1, 3]
    formats = ("q8_0", "q4_0")
    wanted = answers(model, obvious(model.config, formats), ids, mask, pieces)
    found = answers(model, QuantizedCache(model.config, *formats), ids, mask, pieces)
    seen = mask.bool()
    assert (found - wanted)[seen].abs().max() < CLOSE * wanted[seen].abs().max()


@pytest.mark.parametrize("fmt", KV_FORMATS)
def test_every_format(model: Any, prompt: Tensor, fmt: str) -> None:
    pieces = [180, *[1] * 8, 12]
    mask = torch.ones_like(prompt)
    wanted = answers(model, obvious(model.config, (fmt, fmt)), prompt, mask, pieces)
    found = answers(model, QuantizedCache(model.config, fmt), prompt, mask, pieces)
    assert (found - wanted).abs().max() < CLOSE * wanted.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(prompt: Tensor, dtype: torch.dtype) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=dtype)
    text = generated(model, prompt, cache=QuantizedCache(model.config), max_new_tokens=4, min_new_tokens=4)
    plain = generated(model, prompt, max_new_tokens=4, min_new_tokens=4)
    assert torch.equal(text[:, :1], plain[:, :1])  # the prompt attends to floats
    logits = answers(model, QuantizedCache(model.config), prompt, torch.ones_like(prompt), [190, 10])
    assert logits.dtype == dtype and logits.isfinite().all()


def test_a_decode_step_decodes_nothing(model: Any, prompt: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = QuantizedCache(model.config, "q8_0")
    decoded: list[tuple[int, ...]] = []
    floats = PackedStates.floats
    monkeypatch.setattr(PackedStates, "floats", lambda self: decoded.append(tuple(self.shape)) or floats(self))
    mask = torch.ones_like(prompt)
    answers(model, cache, prompt, mask, [150, *[1] * 10, 4, 8])
    assert not decoded
    answers(model, QuantizedCache(model.config), prompt, mask, [100, 100])
    assert decoded and all(shape[:2] == (1, 1) for shape in decoded)  # many queries: a head at a time


def test_gradients_flow_through_the_queries(model: Any, prompt: Tensor) -> None:
    cache = QuantizedCache(model.config, "q8_0")
    with torch.no_grad():
        model(prompt[:, :50], cache=cache, use_cache=True)
    other = copy.deepcopy(cache)
    inputs = model.get_input_embeddings()(prompt[:, 50:53]).detach().requires_grad_()
    loss = model(inputs_embeds=inputs, cache=cache, use_cache=True).logits.logsumexp(-1).sum()
    (slope,) = torch.autograd.grad(loss, inputs)
    with torch.no_grad():
        plain = model(prompt[:, 50:53], cache=other, use_cache=True).logits.logsumexp(-1).sum()
    assert slope.abs().sum() > 0 and torch.allclose(loss, plain, rtol=1e-5)


# ---- what generate may do --------------------------------------------------------------------------------------------


def test_greedy_text_of_q8_0_is_that_of_floats(model: Any, prompt: Tensor) -> None:
    assert torch.equal(generated(model, prompt, cache=QuantizedCache(model.config, 8)), generated(model, prompt))


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams, several texts": {"num_beams": 4, "num_return_sequences": 2},
    "sampling, several texts": {"do_sample": True, "num_return_sequences": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
    "prompt in pieces": {"prefill_chunk_size": 32},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_generate(model: Any, prompt: Tensor, way: str) -> None:
    wanted = generated(model, prompt, cache=obvious(model.config, ("q8_0", "q8_0")), **WAYS[way])
    assert torch.equal(generated(model, prompt, cache=QuantizedCache(model.config), **WAYS[way]), wanted)


def test_assisted_decoding_crops(model: Any, prompt: Tensor) -> None:
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02 * float(parameter.std().nan_to_num(0)))
    plain = generated(model, prompt, cache=obvious(model.config, ("q8_0", "q8_0")))
    found = generated(model, prompt, cache=QuantizedCache(model.config), assistant_model=assistant)
    assert torch.equal(found, plain)


@pytest.mark.parametrize("settings", [{"format": "q8_0"}, {"nbits": 8}, {}, {"format": 8, "values": "q4_0"}])
def test_as_a_setting_of_generate(model: Any, prompt: Tensor, settings: dict[str, Any]) -> None:
    config = {"backend": "isqtorch", **settings}
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        cache_implementation="quantized",
        cache_config=config,
        do_sample=False,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        pad_token_id=2,
        return_dict_in_generate=True,
    )
    assert isinstance(out.cache, QuantizedCache)
    assert out.cache.formats == ("q8_0", settings.get("values", "q8_0"))
    own = QuantizedCache(model.config, "q8_0", settings.get("values"))
    assert torch.equal(out.sequences[:, prompt.shape[1] :], generated(model, prompt, cache=own))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"residual_length": 64}, "residual_length"),
        ({"nbits": 8, "format": 4}, "not both"),
        ({"nbits": 3}, "q8_0, q5_1"),
    ],
)
def test_wrong_settings(model: Any, prompt: Tensor, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generated(model, prompt, cache_implementation="quantized", cache_config={"backend": "isqtorch", **settings})


def test_other_backends_stay(model: Any, prompt: Tensor) -> None:
    found = generated(model, prompt, cache_implementation="quantized", cache_config={"backend": "fp8"})
    assert found.shape == (1, NEW)
    with pytest.raises(ValueError, match="Unknown quantization backend"):
        generated(model, prompt, cache_implementation="quantized", cache_config={"backend": "none"})


def test_a_conversation_goes_on(model: Any, prompt: Tensor) -> None:
    cache = QuantizedCache(model.config)
    first = generated(model, prompt[:, :100], cache=cache)
    assert cache.get_seq_length() == 100 + NEW - 1
    text = torch.cat([prompt[:, :100], first, prompt[:, 100:120]], 1)
    second = generated(model, text, cache=cache)
    plain = obvious(model.config, ("q8_0", "q8_0"))
    assert torch.equal(generated(model, prompt[:, :100], cache=plain), first)
    assert torch.equal(generated(model, text, cache=plain), second)


def test_copies_and_pickles_are_independent(model: Any, prompt: Tensor) -> None:
    cache = QuantizedCache(model.config, "q8_0/q4_0")
    with torch.no_grad():
        model(prompt[:, :150], cache=cache, use_cache=True)
    others = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    found = [generated(model, prompt, cache=one) for one in (cache, *others)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert others[1].formats == ("q8_0", "q4_0")


def test_rows_are_chosen_and_repeated(model: Any, prompt: Tensor) -> None:
    batch = torch.cat([prompt[:, :60], prompt[:, 60:120], prompt[:, 120:180]])
    caches = [QuantizedCache(model.config), obvious(model.config, ("q8_0", "q8_0"))]
    logits = []
    for cache in caches:
        with torch.no_grad():
            model(batch, cache=cache, use_cache=True)
            cache.reorder_cache(torch.tensor([2, 0, 0]))
            cache.batch_select_indices(torch.tensor([0, 2]))
            cache.batch_repeat_interleave(2)
            cache.crop(-7)
            assert cache.get_seq_length() == 53
            out = [model(batch[:1, :3].expand(4, -1), cache=cache, use_cache=True).logits for _ in range(2)]
            logits.append(torch.cat(out))
    assert torch.allclose(*logits, atol=1e-3)


def test_reset_begins_again(model: Any, prompt: Tensor) -> None:
    cache = QuantizedCache(model.config)
    first = generated(model, prompt, cache=cache)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes == 0
    assert torch.equal(generated(model, prompt, cache=cache), first)


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fmt", "share"), [("q8_0", 34 / 64), ("q4_0", 18 / 64), ("q8_0/q4_0", 26 / 64)])
def test_bytes(model: Any, fmt: str, share: float) -> None:
    """Of a long context, the bytes of the blocks and at most 256 tokens of room; every byte that is held is counted."""
    config = copy.deepcopy(model.config)
    cache = QuantizedCache(config, fmt)
    tokens, heads, width = 4000, config.num_key_value_heads, config.head_dim
    states = torch.randn(1, heads, tokens, width, dtype=torch.bfloat16)
    for layer in range(config.num_hidden_layers):
        cache.update(states, states, layer)
        for _ in range(300):
            cache.update(states[:, :, :1], states[:, :, :1], layer)
    bf16 = 2 * config.num_hidden_layers * heads * (tokens + 300) * width * 2
    assert share * bf16 <= cache.nbytes <= share * bf16 * (1 + 256 / tokens)
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for layer in cache.layers
        for rows in layer._rows
        for tensor in (rows._store,)
    }
    assert sum(storages.values()) == cache.nbytes


def test_a_window_keeps_no_more_than_it_needs() -> None:
    model = tiny("gemma3_text")
    cache = QuantizedCache(model.config)
    ids = ids_of(model, 1, 120)
    with torch.no_grad():
        for start in range(0, 120, 3):
            model(ids[:, start : start + 3], cache=cache, use_cache=True)
    for layer in cache.layers:
        held = layer.keys.shape[2]
        assert held == (7 if layer.is_sliding else 120)
        assert layer._rows[0]._store.shape[2] <= held + 3 + 32
    assert cache.get_seq_length() == 120


# ---- faults ----------------------------------------------------------------------------------------------------------


def test_numbers_that_cannot_be_packed(model: Any) -> None:
    cache = QuantizedCache(model.config)
    states = torch.zeros(1, 2, 3, 64)
    broken = states.clone()
    broken[0, 1, 2, 5] = torch.nan
    with pytest.raises(ValueError, match=r"QuantizedCache: values \[1, 2, 3, 64\].*nan.*DynamicCache"):
        cache.update(states, broken, 0)
    assert cache.get_seq_length() == 0  # neither keys nor values were added
    cache.update(states, states, 0)
    with pytest.raises(ValueError, match="keys"):
        cache.update(broken, states, 0)
    assert cache.layers[0].keys.shape == cache.layers[0].values.shape == (1, 2, 3, 68)


def test_layers_that_keep_something_else(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    class Indexed(DynamicLayer):  # type: ignore[misc]
        pass

    monkeypatch.setitem(transformers.cache_utils.DYNAMIC_LAYER_TYPE_MAPPING, "full_attention", Indexed)
    with pytest.raises(NotImplementedError, match="Indexed.*DynamicLayer, DynamicSlidingWindowLayer.*DynamicCache"):
        QuantizedCache(model.config)


def test_states_are_read_like_floats() -> None:
    states = torch.randn(2, 3, 10, 40)
    wide = torch.nn.functional.pad(states, (0, 24))
    packed = PackedStates(isqtorch.ops.quantize(wide, "q8_0"), "q8_0", 40, torch.float32)
    floats = packed.floats()
    assert packed.shape == floats.shape and packed.dtype == floats.dtype and "q8_0" in repr(packed)
    assert torch.equal(packed.transpose(1, 2), floats.transpose(1, 2))
    assert torch.equal(torch.cat([packed, packed], 2), torch.cat([floats, floats], 2))
    assert torch.equal(packed[1:, :, 4:].floats(), floats[1:, :, 4:])
    assert isinstance(packed[1:, :, 4:], PackedStates) and not isinstance(packed[0], PackedStates)
    assert torch.equal(packed[0], floats[0]) and torch.equal(packed[..., 3:], floats[..., 3:])
    assert torch.equal(states @ packed.mT, states @ floats.mT)
