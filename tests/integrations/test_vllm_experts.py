"""Mixtures of experts in the vLLM plug-in, against a model of what plug-ins see of vLLM (fake_vllm.py)."""

from __future__ import annotations

from typing import Any

import fake_vllm
import pytest
import torch
from fake_vllm import config_of
from helpers import relative_error
from torch import Tensor

from isqtorch import ops

EXPERTS = "model.layers.0.mlp.experts"
E, H, INNER = 4, 64, 64


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_vllm.install(monkeypatch)


def matrices() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"w1": (E, INNER, H), "w3": (E, INNER, H), "w2": (E, H, INNER)}
    return {name: torch.randn(shape, generator=generator) / 8 for name, shape in shapes.items()}


def filled(content: dict[str, Any], prefix: str = EXPERTS, **settings: Any) -> fake_vllm.RoutedExperts:
    """A layer with the experts of `matrices`, as vLLM loads them."""
    config = config_of(content)
    layer = fake_vllm.RoutedExperts(E, H, INNER, config, prefix, **settings)
    weights: dict[str, Any] = dict(layer.named_parameters())  # once, as vLLM's models do
    for name, stack in matrices().items():
        if name == "w1" and not layer.moe_config.is_act_and_mul:
            continue
        for expert in range(E):
            w = stack[expert] if config.formats.online else ops.quantize(stack[expert], "q8_0")
            weight = weights["w2_weight" if name == "w2" else "w13_weight"]
            weight.weight_loader(weight, w, name, expert)
    for _ in range(2):
        layer.quant_method.process_weights_after_loading(layer)
    return layer


def routed() -> tuple[Tensor, Tensor, Tensor]:
    """x `[5, H]`, the experts of each row, and their weights."""
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(5, H, generator=generator),
        torch.arange(10).view(5, 2) % E,
        torch.rand(5, 2, generator=generator),
    )


def outputs(layer: fake_vllm.RoutedExperts) -> Tensor:
    x, ids, scores = routed()
    y: Tensor = layer.quant_method.apply(
        layer=layer, x=x, topk_weights=scores, topk_ids=ids.int(), shared_experts=None, shared_experts_input=None
    )
    return y


def expected(on_input: bool = False, activation: str = "silu") -> Tensor:
    """The same from decoded matrices, one row and expert at a time."""
    w = {name: ops.dequantize(ops.quantize(each, "q8_0"), "q8_0", torch.float32) for name, each in matrices().items()}
    x, ids, scores = routed()
    out = torch.zeros(5, H)
    for t, s in ((t, s) for t in range(5) for s in range(2)):
        e, score = int(ids[t, s]), scores[t, s]
        row = x[t] * score if on_input else x[t]
        if activation == "silu":
            hidden = torch.nn.functional.silu(w["w1"][e] @ row) * (w["w3"][e] @ row)
        else:
            hidden = torch.nn.functional.gelu(w["w3"][e] @ row, approximate="tanh")
        out[t] += w["w2"][e] @ hidden * (1 if on_input else score)
    return out


STORED = {"layers": {f"{EXPERTS}.gate_up_proj": "q8_0", f"{EXPERTS}.down_proj": "q8_0"}}


@pytest.mark.parametrize("content", [STORED, {"isq": "q8_0"}], ids=["stored", "online"])
def test_packed_experts(content: dict[str, Any]) -> None:
    layer = filled(content)
    assert layer.w13_weight.dtype == layer.w2_weight.dtype == torch.uint8
    assert relative_error(outputs(layer), expected()) < 0.02


@pytest.mark.parametrize("content", [STORED, {"isq": "q8_0"}], ids=["stored", "online"])
def test_experts_in_two_processes(content: dict[str, Any]) -> None:
    """Expert parallelism: some experts in each; tensor parallelism: a share of each expert. The sums are the same."""
    by_expert = [filled(content, here=here) for here in ([0, 3], [1, 2])]
    assert relative_error(sum(outputs(layer) for layer in by_expert), expected()) < 0.02
    by_share = [filled(content, rank=rank, ranks=2) for rank in range(2)]
    assert relative_error(sum(outputs(layer) for layer in by_share), expected()) < 0.02


def test_experts_whose_share_is_no_block() -> None:
    layers = {f"{EXPERTS}.gate_up_proj": "q8_0", f"{EXPERTS}.down_proj": "q8_0"}
    with pytest.raises(ValueError, match=r"experts.down_proj is q8_0 with 64 columns, of which this process gets 16"):
        fake_vllm.RoutedExperts(E, H, INNER, config_of({"layers": layers}), EXPERTS, ranks=4)
    online = fake_vllm.RoutedExperts(E, H, INNER, config_of({"isq": "q8_0", "fallback": "skip"}), EXPERTS, ranks=4)
    assert online.quant_method is None, "no format fits, so both stacks stay float"


def test_experts_under_another_name_than_in_transformers() -> None:
    layer = filled(STORED, prefix="model.layers.0.block_sparse_moe.experts")
    assert relative_error(outputs(layer), expected()) < 0.02
    other = fake_vllm.RoutedExperts(E, H, INNER, config_of(STORED), "model.layers.1.block_sparse_moe.experts")
    assert other.quant_method is None, "those of another block are float"


def test_router_weights_on_the_input_and_other_activations() -> None:
    layer = filled(STORED)
    layer.apply_router_weight_on_input = True
    assert relative_error(outputs(layer), expected(on_input=True)) < 0.02
    single = {"layers": {f"{EXPERTS}.up_proj": "q8_0", f"{EXPERTS}.down_proj": "q8_0"}}
    layer = filled(single, activation="gelu_tanh_no_mul")
    assert relative_error(outputs(layer), expected(activation="gelu_tanh")) < 0.02
    with pytest.raises(
        NotImplementedError, match="the activation 'unknown'; those that exist are silu, .*exclude='experts'"
    ):
        outputs(filled(STORED, activation="unknown"))


def test_biases_of_experts() -> None:
    layer = filled(STORED, biases=True)
    plain = outputs(layer)
    layer.w2_bias.data.fill_(2.0)
    _, _, scores = routed()
    torch.testing.assert_close(outputs(layer), plain + 2 * scores.sum(1, keepdim=True))


def test_experts_of_which_one_stack_is_packed() -> None:
    config = config_of({"layers": {f"{EXPERTS}.gate_up_proj": "q4k"}})
    with pytest.raises(ValueError, match=r"config.json says that .*gate_up_proj is packed and .*down_proj is not"):
        fake_vllm.RoutedExperts(E, H, INNER, config, EXPERTS)
