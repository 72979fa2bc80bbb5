"""Every kind of adapter that PEFT has, on packed layers: training, merging, or a refusal that says what to do."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models import state_bytes, tiny_llama, tiny_moe
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from isqtorch.inplace.dequantize import dequantize_
from isqtorch.inplace.quantize import quantize_

peft = pytest.importorskip("peft", "0.21")

from adapter_kinds import IDS, KINDS, NOT_TRIED, Kind, table  # noqa: E402

pytestmark = [pytest.mark.usefixtures("enabled"), pytest.mark.filterwarnings("ignore")]
GUIDE = Path(__file__).resolve().parent.parent.parent / "docs" / "guide.md"


def base() -> Any:
    """A small model with biases, where every kind of adapter finds what it needs."""
    model = tiny_llama(layers=1, dtype=torch.float32)
    for block in model.model.layers:
        for layer in (block.self_attn.q_proj, block.mlp.up_proj):
            layer.bias = nn.Parameter(torch.randn(layer.out_features) * 0.1)
    quantize_(model, "q8_0")
    return model


def adapted(model: Any, kind: Kind) -> Any:
    torch.manual_seed(1)
    return peft.get_peft_model(model, kind.make())


def perturb(model: Any, size: float = 0.02) -> None:
    """Trained adapters."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * size)


def logits(model: Any, **batch: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **batch).logits


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


class Decodes(TorchDispatchMode):
    """Counts how often a weight is decoded."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "isqtorch" and func._opname == "dequantize"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.trains != "no"])
def test_training_is_that_of_the_decoded_model(name: str) -> None:
    kind = KINDS[name]
    floats = base()
    dequantize_(floats)
    results = []
    for model in (base(), floats):
        packed = {state for path, state in state_bytes(model).items() if path.endswith("proj.weight")}
        tuned = adapted(model, kind).train()
        torch.manual_seed(3)
        with Decodes() as decodes:
            loss = tuned(input_ids=IDS, labels=IDS, **kind.batch).loss
        loss.backward()
        gradients = {path: p.grad for path, p in tuned.named_parameters() if p.requires_grad and p.grad is not None}
        perturb(tuned)
        results.append((loss.detach(), gradients, logits(tuned.eval(), **kind.batch)))
        if model is not floats:
            assert packed <= set(state_bytes(tuned).values())
            assert (decodes.count > 0) == (kind.trains == "decoding")
    (loss, gradients, output), (want_loss, want_gradients, want) = results
    torch.testing.assert_close(loss, want_loss, rtol=0.01, atol=0)  # the kernel for q8_0 rounds x
    assert relative(output, want) < 0.02
    assert gradients.keys() == want_gradients.keys() and gradients
    assert any(gradient.abs().sum() > 0 for gradient in gradients.values())
    largest = max(gradient.norm() for gradient in want_gradients.values())
    for path, gradient in gradients.items():
        assert (gradient - want_gradients[path]).norm() < 0.2 * want_gradients[path].norm() + 1e-3 * largest, path


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.trains != "no" and kind.merges == "yes"])
def test_merging_keeps_what_was_learnt_and_unmerging_the_bytes(name: str) -> None:
    kind = KINDS[name]
    model = base()
    plain = logits(model)
    tuned = adapted(model, kind).eval()
    size = 0.02
    perturb(tuned, size)
    while (effect := relative(logits(tuned), plain)) < 0.03:  # more than merging may lose
        assert size < 1
        size *= 2
        perturb(tuned, size)
    want, before = logits(tuned), state_bytes(tuned)
    other = copy.deepcopy(tuned)
    if name != "OSF":  # PEFT refuses to unmerge it
        tuned.merge_adapter()
        assert relative(logits(tuned), want) < 0.4 * effect + 0.012
        tuned.unmerge_adapter()
        packed = [path for path in before if ".base_layer." in path]
        after = state_bytes(tuned)
        assert (packed or name == "LN tuning") and all(after[path] == before[path] for path in packed)
        assert name == "LN tuning" or torch.equal(logits(tuned), want)
    merged = other.merge_and_unload(safe_merge=True)
    assert relative(logits(merged), want) < 0.4 * effect + 0.012
    assert not any(isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer) for m in merged.modules())
    assert all(layer.format == "q8_0" for path, layer in merged.named_modules() if path.endswith("proj"))


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.merges == "no"])
def test_what_peft_cannot_merge_stays_as_it_is(name: str) -> None:
    kind = KINDS[name]
    tuned = adapted(base(), kind)
    perturb(tuned)
    before = state_bytes(tuned)
    with pytest.raises(NotImplementedError, match="merge: PEFT cannot merge .*Keep the adapter unmerged"):
        tuned.merge_adapter()
    assert state_bytes(tuned) == before


REFUSED = {
    **{name: kind.make() for name, kind in KINDS.items() if kind.trains == "no"},
    "LN tuning of a packed layer": peft.LNTuningConfig(target_modules=["q_proj"]),
    **{
        start: peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=start)
        for start in ("pissa", "olora", "lora_ga", "corda", "mica")
    },
    "KaSA": peft.LoraConfig(r=4, target_modules=["q_proj"], kasa_config=peft.KasaConfig()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_layer_kind_and_way_out(name: str) -> None:
    model = base()
    before = state_bytes(model)
    trainable = [p.requires_grad for p in model.parameters()]
    config = REFUSED[name]
    with pytest.raises(ValueError, match=rf"{type(config).__name__}: .*q_proj is packed as q8_0.*exclude="):
        peft.get_peft_model(model, copy.deepcopy(config))
    assert state_bytes(model) == before and [p.requires_grad for p in model.parameters()] == trainable


@pytest.mark.parametrize("target", ["experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj", "q_proj.weight"])
def test_a_parameter_as_target(target: str) -> None:
    model = tiny_moe() if "experts" in target else base()
    quantize_(model, "q8_0") if "experts" in target else None
    before = state_bytes(model)
    config = peft.LoraConfig(r=4, target_modules=[], target_parameters=[target])
    with pytest.raises(ValueError, match=f"target_parameters names .*{re.escape(target)}, which is packed as q8_0"):
        peft.get_peft_model(model, config)
    assert state_bytes(model) == before


def test_the_table_has_every_kind() -> None:
    known = {str(kind.make().peft_type.value) for kind in KINDS.values()}
    assert known | NOT_TRIED == {kind.value for kind in peft.PeftType} and not known & NOT_TRIED


def test_the_guide_shows_the_table() -> None:
    assert table() in GUIDE.read_text(encoding="utf-8"), "python tests/integrations/adapter_kinds.py prints it"
