"""modules_to_save and trainable_token_indices that name packed layers: a float copy is trained, and packed when merged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf import load
from models import state_bytes, tiny_llama, tiny_moe
from torch import nn

from isqtorch import IsqConfig
from isqtorch.inplace.quantize import quantize_
from isqtorch.modules import QuantEmbedding, QuantExperts, QuantLinear

peft = pytest.importorskip("peft", "0.21")

from adapters import IDS, logits, relative  # noqa: E402

from isqtorch.integrations.peft import merging  # noqa: E402

pytestmark = [pytest.mark.usefixtures("enabled"), pytest.mark.filterwarnings("ignore")]


def config(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **options})


def small(fmt: str = "q8_0", *, tied: bool = False) -> Any:
    model = tiny_llama(layers=1, tied=tied, dtype=torch.float32)
    quantize_(model, fmt)
    return model


def train(model: Any, steps: int = 3) -> list[float]:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens", "down_proj", "mlp"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_packed_module_is_trained_in_full(name: str, tied: bool) -> None:
    plain = small(tied=tied)
    model = peft.get_peft_model(small(tied=tied), config(modules_to_save=[name]))
    wrapper = next(m for path, m in model.named_modules() if path.endswith(name))
    copies = [m for m in wrapper.modules_to_save["default"].modules() if isinstance(m, (nn.Linear, nn.Embedding))]
    assert copies and all(m.weight.is_floating_point() and m.weight.requires_grad for m in copies)
    assert relative(logits(model), logits(plain)) < 0.02  # a float layer does not round x
    packed = state_bytes(wrapper.original_module)
    losses = train(model)
    assert losses[2] < losses[1] < losses[0]
    assert all(m.weight.grad.abs().sum() > 0 for m in copies)
    assert state_bytes(wrapper.original_module) == packed
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(plain))


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens", "mlp"])
def test_merging_packs_it_again(name: str) -> None:
    plain = small()
    model = peft.get_peft_model(small(), config(modules_to_save=[name]))
    train(model)
    want = logits(model.eval())
    merged = model.merge_and_unload()
    layers = [m for _, m in merged.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))]
    assert len(layers) == 9 and all(isinstance(m, (QuantLinear, QuantEmbedding)) for m in layers)
    assert {m.format for m in layers} == {"q8_0"} and not any(p.requires_grad for p in merged.parameters())
    assert relative(logits(merged), want) < 0.02 < relative(logits(plain), want)


def test_merging_with_another_format() -> None:
    model = peft.get_peft_model(small("q4k"), config(modules_to_save=["lm_head"]))
    with merging(merge_format="q6k"):
        merged = model.merge_and_unload()
    assert merged.lm_head.format == "q6k" and merged.isq_report["lm_head"].stored == "q6k"
    assert merged.model.layers[0].mlp.up_proj.format == "q4k"


def test_experts() -> None:
    model = tiny_moe()
    quantize_(model, "q8_0")
    plain = logits(model)
    tuned = peft.get_peft_model(model, config(modules_to_save=["experts"]))
    assert relative(logits(tuned), plain) < 0.02
    losses = train(tuned)
    assert losses[2] < losses[0]
    want = logits(tuned.eval())
    merged = tuned.merge_and_unload()
    experts = merged.model.layers[0].mlp.experts
    assert isinstance(experts, QuantExperts) and set(experts.packed.values()) == {"q8_0"}
    assert relative(logits(merged), want) < 0.02 < relative(plain, want)


def test_saving_and_loading(llama: Path, tmp_path: Path) -> None:
    def packed() -> Any:
        return load(llama, quantization_config=IsqConfig("q4k"))

    model = peft.get_peft_model(packed(), config(modules_to_save=["lm_head"]))
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(packed(), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model.eval()))
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load(tmp_path / "merged")), logits(merged))


def test_two_adapters_have_their_own_copies() -> None:
    model = peft.get_peft_model(small(), config(modules_to_save=["lm_head"]))
    model.add_adapter("second", config(modules_to_save=["lm_head"]))
    first, second = model.base_model.model.lm_head.modules_to_save.values()
    assert first.weight is not second.weight and torch.equal(first.weight, second.weight)
    train(model, 1)
    assert not torch.equal(first.weight, second.weight)


def test_a_float_module_is_left_to_peft() -> None:
    model = tiny_llama(layers=1, dtype=torch.float32)
    quantize_(model, "q8_0", exclude=["lm_head"])
    tuned = peft.get_peft_model(model, config(modules_to_save=["lm_head"]))
    assert type(tuned.merge_and_unload().lm_head) is nn.Linear


def test_without_enable_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from adapters import WRAPPED

    for owner, names in WRAPPED.items():
        for name in names:
            monkeypatch.setattr(owner, name, getattr(owner, name).__wrapped__)
    with pytest.raises(RuntimeError):
        peft.get_peft_model(small(), config(modules_to_save=["lm_head"]))


# ---- tokens --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tokens", [[1, 2, 7], {"embed_tokens": [1, 2, 7]}, {"lm_head": [3]}])
def test_trainable_tokens(tokens: Any, tied: bool) -> None:
    model = peft.get_peft_model(small(tied=tied), config(trainable_token_indices=tokens))
    assert relative(logits(model), logits(small(tied=tied))) < 0.02
    losses = train(model)
    assert losses[2] < losses[0]
    want = logits(model.eval())
    merged = model.merge_and_unload()
    assert isinstance(merged.model.embed_tokens, QuantEmbedding) and isinstance(merged.lm_head, QuantLinear)
    assert relative(logits(merged), want) < 0.02


def test_tokens_that_are_not_trained_keep_their_bytes() -> None:
    model = small("q4k")
    before = state_bytes(model)["model.embed_tokens.weight"]
    tuned = peft.get_peft_model(model, config(trainable_token_indices=[5]))
    train(tuned)
    after = state_bytes(tuned.merge_and_unload())["model.embed_tokens.weight"]
    row = len(before) // 512
    changed = [i for i in range(512) if before[i * row : (i + 1) * row] != after[i * row : (i + 1) * row]]
    assert changed == [5]


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_tokens_with_the_checkpoint(name: str, checkpoints: Callable[[str], Path]) -> None:
    model = load(checkpoints(name), quantization_config=IsqConfig("q4k"))
    tuned = peft.get_peft_model(model, config(trainable_token_indices=[5, 6]))
    train(tuned)
    want = logits(tuned.eval())
    tuned.merge_adapter()
    assert relative(logits(tuned), want) < 0.1
    tuned.unmerge_adapter()
    assert torch.equal(logits(tuned), want)
    assert relative(logits(tuned.merge_and_unload()), want) < 0.1
