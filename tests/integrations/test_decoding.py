"""`optimize_` on a CPU: the same tokens as without it, for every family, every way of generating, and every change."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from models import tiny_llama
from torch import Tensor, nn

import isqtorch
from isqtorch.integrations.generation import Optimization

transformers = pytest.importorskip("transformers", "5.23")

from isqtorch.integrations.transformers import decoding  # noqa: E402

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": None,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "gemma3": ("Gemma3Text", {"sliding_window": 8, "query_pre_attn_scalar": 64}),
    "mistral with a window": ("Mistral", {"sliding_window": 8}),
    "phi3": ("Phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3 moe": ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}),
}


def tiny(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    name, settings = FAMILIES[family]
    torch.manual_seed(0)
    kind = getattr(transformers, f"{name}Config")
    model = transformers.AutoModelForCausalLM.from_config(kind(**{**SIZES, **settings, **changes})).to(dtype).eval()
    for module in model.modules():  # weights of norms are all the same, which would hide mistakes
        if "Norm" in type(module).__name__:
            nn.init.normal_(module.weight, 1.0, 0.3)
    isqtorch.quantize_(model, "q4k")
    return model


def prompt(batch: int = 1, length: int = 12) -> Tensor:
    return torch.arange(3, 3 + batch * length).view(batch, length) % 120 + 3


def reply(model: Any, ids: Tensor | None = None, **settings: Any) -> tuple[list[list[int]], Tensor]:
    """The tokens, and the scores of each."""
    ids = prompt() if ids is None else ids
    mask = settings.pop("attention_mask", torch.ones_like(ids))
    settings = {"max_new_tokens": 24, "do_sample": False, **settings}
    out = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **settings)
    return out.sequences.tolist(), torch.stack(out.logits)


def same(model: Any, **settings: Any) -> Optimization:
    """Optimize a model, and check that its replies keep every bit."""
    tokens, scores = reply(model, **settings)
    done = isqtorch.optimize_(model, exact=True)
    optimized, others = reply(model, **settings)
    assert optimized == tokens and torch.equal(others, scores)
    return done


def fast_steps(model: Any, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> int:
    """How many layers of a reply were computed by a plan."""
    count = 0
    run = decoding.LayerPlan.run

    def counting(self: Any, *arguments: Any) -> Any:
        nonlocal count
        out = run(self, *arguments)
        count += out is not None
        return out

    with monkeypatch.context() as patch:
        patch.setattr(decoding.LayerPlan, "run", counting)
        reply(model, **settings)
    return count


@pytest.fixture
def llama() -> Any:
    return tiny("llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits_in_every_family(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(family)
    done = same(model)
    assert (done.device, done.layers, done.kept) == ("cpu", 3, {})
    assert fast_steps(model, monkeypatch) == 3 * 23  # the first token comes from the prompt


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits_for_a_padded_batch(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, mask = tiny(family), torch.ones(3, 12, dtype=torch.long)
    mask[1, :5] = 0
    same(model, ids=prompt(3), attention_mask=mask)
    assert fast_steps(model, monkeypatch, ids=prompt(3), attention_mask=mask) == 3 * 23


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "mixtral"])
def test_the_same_bits_in_bf16(family: str) -> None:
    assert same(tiny(family, torch.bfloat16)).layers == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_of_isqtorch_is_near(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products round their input to 8 bits, which makes differences of the last bit larger."""
    model = tiny(family)
    ids = prompt(2, 40)
    with torch.no_grad():
        text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)

        def scores() -> Tensor:
            out = model(text[:, :40], use_cache=True)
            steps = [model(text[:, i : i + 1], cache=out.cache, use_cache=True).logits for i in range(40, 60)]
            return torch.cat(steps, dim=1)

        expected = scores()
        assert isqtorch.optimize_(model, exact=False).layers == 3
        found = scores()
    assert (found - expected).norm() < 0.03 * expected.norm()
    assert fast_steps(model, monkeypatch) == 3 * 23


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True},
        {"do_sample": True, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"max_new_tokens": 100},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"prefill_chunk_size": 5},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "mistral with a window"])
def test_every_way_to_generate(family: str, settings: dict[str, Any]) -> None:
    model = tiny(family)
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        ids = prompt(length=20)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), **{"max_new_tokens": 24, "do_sample": False, **settings}
        )
        results.append(out.tolist())
        isqtorch.optimize_(model, exact=True)
    assert results[0] == results[1]


def test_with_an_assistant() -> None:
    model, assistant = tiny("llama"), tiny("llama", num_hidden_layers=1)
    ids = prompt()
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 24, "do_sample": False}
    text = model.generate(ids, assistant_model=assistant, **settings).tolist()
    for part in (model, assistant):
        isqtorch.optimize_(part)
    assert model.generate(ids, assistant_model=assistant, **settings).tolist() == text


def test_a_cache_of_the_user_goes_on(llama: Any) -> None:
    """Also if its first tokens were computed without `optimize_`, or with gradients, or in inference mode."""
    ids = prompt(length=30)

    def scores(first: Any, second: Any) -> Tensor:
        cache = transformers.DynamicCache(config=llama.config)
        with first():
            llama(ids[:, :10], cache=cache, use_cache=True)
            llama(ids[:, 10:11], cache=cache, use_cache=True)
        with second():
            parts = [llama(ids[:, i : i + 1], cache=cache, use_cache=True).logits for i in range(11, 20)]
            parts.append(llama(ids[:, 20:], cache=cache, use_cache=True).logits)
        assert cache.get_seq_length() == 30
        return torch.cat(parts, dim=1).detach()

    modes = (torch.no_grad, torch.inference_mode, torch.enable_grad)
    expected = scores(torch.no_grad, torch.no_grad)
    isqtorch.optimize_(llama)
    for first in modes:
        for second in modes:
            assert torch.equal(scores(first, second), expected)


def test_training_is_as_before(llama: Any) -> None:
    isqtorch.optimize_(llama)
    llama.train()
    out = llama(prompt(), labels=prompt())
    out.loss.backward()
    assert llama.model.norm.weight.grad is not None
    isqtorch.optimize_(llama, False)
    llama.zero_grad()
    llama(prompt(), labels=prompt()).loss.backward()
    assert torch.equal(llama(prompt(), labels=prompt()).loss, out.loss)


def test_hooks_are_called(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    isqtorch.optimize_(llama)
    seen = []
    handles = [
        llama.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *_: seen.append("q")),
        llama.model.layers[2].register_forward_hook(lambda *_: seen.append("layer")),
    ]
    text, _ = reply(llama, max_new_tokens=4)
    assert seen.count("q") == 4 and seen.count("layer") == 4
    for handle in handles:
        handle.remove()
    assert reply(llama, max_new_tokens=4)[0] == text
    assert fast_steps(llama, monkeypatch, max_new_tokens=4) == 9


def test_outputs_of_layers_are_recorded(llama: Any) -> None:
    def outputs() -> Any:
        return llama.generate(
            prompt(),
            attention_mask=torch.ones_like(prompt()),
            max_new_tokens=3,
            do_sample=False,
            output_hidden_states=True,
            return_dict_in_generate=True,
        ).hidden_states

    before = outputs()
    isqtorch.optimize_(llama)
    after = outputs()
    assert all(torch.equal(a, b) for one, two in zip(before, after, strict=True) for a, b in zip(one, two, strict=True))


def test_attentions_are_given(llama: Any) -> None:
    llama.set_attn_implementation("eager")
    isqtorch.optimize_(llama)
    ids = prompt()
    out = llama.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=3,
        do_sample=False,
        output_attentions=True,
        return_dict_in_generate=True,
    )
    assert out.attentions[-1][0] is not None and out.attentions[-1][0].shape[-1] == 14


def test_another_attention_is_planned_anew(llama: Any) -> None:
    isqtorch.optimize_(llama)
    llama.set_attn_implementation("eager")
    text, scores = reply(llama)
    isqtorch.optimize_(llama, False)
    assert reply(llama)[0] == text and torch.equal(reply(llama)[1], scores)


def test_requantizing_and_back(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    isqtorch.optimize_(llama)
    isqtorch.requantize_(llama, "q8_0", source="stored")
    text, scores = reply(llama)
    assert fast_steps(llama, monkeypatch) == 3 * 23
    isqtorch.optimize_(llama, False)
    assert reply(llama)[0] == text and torch.equal(reply(llama)[1], scores)
    isqtorch.optimize_(llama)
    isqtorch.dequantize_(llama)
    assert fast_steps(llama, monkeypatch) == 0
    text, scores = reply(llama)
    isqtorch.optimize_(llama, False)
    assert reply(llama)[0] == text and torch.equal(reply(llama)[1], scores)


def test_peft_adapters_are_used(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    isqtorch.optimize_(llama)
    before = reply(llama)
    model = peft.get_peft_model(llama, peft.LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False)).eval()
    adapted = reply(model)
    assert not torch.equal(adapted[1], before[1])
    assert fast_steps(model, monkeypatch) == 0
    isqtorch.optimize_(llama, False)
    assert torch.equal(reply(model)[1], adapted[1])
    isqtorch.optimize_(llama)
    plain = model.unload()
    assert torch.equal(reply(plain)[1], before[1])


def test_another_type_is_planned_anew(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    isqtorch.optimize_(llama, exact=True)
    llama.bfloat16()
    text, scores = reply(llama)
    assert fast_steps(llama, monkeypatch) == 3 * 23
    isqtorch.optimize_(llama, False)
    assert reply(llama)[0] == text and torch.equal(reply(llama)[1], scores)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_are_models_of_their_own(copied: Any, llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    isqtorch.optimize_(llama)
    text, scores = reply(llama)
    twin = copied(llama)
    assert reply(twin)[0] == text and fast_steps(twin, monkeypatch) == 3 * 23
    with torch.no_grad():
        for parameter in llama.parameters():
            if parameter.is_floating_point():
                parameter.zero_()
    assert torch.equal(reply(twin)[1], scores)


def test_compiled_models_see_their_own_layers(llama: Any) -> None:
    ids = prompt()
    with torch.no_grad():
        expected = llama(ids, use_cache=False).logits
        isqtorch.optimize_(llama)
        compiled = torch.compile(llama, backend="eager", fullgraph=True)
        assert torch.equal(compiled(ids, use_cache=False).logits, expected)


def test_saving_and_loading(llama: Any, tmp_path: Any) -> None:
    names = set(llama.state_dict())
    isqtorch.optimize_(llama)
    assert set(llama.state_dict()) == names
    text, _ = reply(llama)
    llama.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert reply(loaded)[0] == text


def test_off_is_as_before(llama: Any) -> None:
    states = [dict(vars(module)) for module in llama.modules()]
    isqtorch.optimize_(llama)
    isqtorch.optimize_(llama)
    isqtorch.optimize_(llama, False)
    assert all(vars(module).keys() == state.keys() for module, state in zip(llama.modules(), states, strict=True))


def test_layers_that_stay_are_named() -> None:
    model = tiny_llama(dtype=torch.float32)
    isqtorch.quantize_(model, "q4k", exclude=[r"layers\.1\.self_attn\.o_proj"])
    done = same(model)
    assert done.layers == 1 and done.kept == {"model.layers.1": "Linear is not packed"}
    assert "model.layers.1 unchanged: Linear is not packed" in str(done)


def test_models_of_other_kinds_stay() -> None:
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=2)).eval()
    done = isqtorch.optimize_(model)
    assert done.layers == 0 and "no decoder layer" in str(done)
    floats = tiny_llama(dtype=torch.float32)
    done = isqtorch.optimize_(floats)
    assert done.layers == 0 and set(done.kept.values()) == {"Linear is not packed"}
    assert not any("forward" in vars(module) for module in floats.modules())


def test_a_layer_that_computes_something_else_stays(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial: an attention whose code is known, but which reads another setting."""
    monkeypatch.setattr(llama.model.layers[1].self_attn, "num_key_value_groups", 1)
    llama.model.layers[1].self_attn.config = copy.deepcopy(llama.config)
    llama.model.layers[1].self_attn.config.num_key_value_heads = 4
    done = isqtorch.optimize_(llama)
    assert "model.layers.1" in done.kept or done.layers == 0
