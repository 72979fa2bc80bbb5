"""Fused experts: the module, the policy, importance, reports, files. With classes that look like transformers' own."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from helpers import relative_error
from models import EXPERTS, HIDDEN, INNER, Experts, FusedMoE, state_bytes
from torch import Tensor, nn

from isqtorch import checkpoint, dequantize_, get_format, ops, plan, quantize_, requantize_
from isqtorch.explain import explain
from isqtorch.modules import QuantExperts

KINDS: dict[str, dict[str, bool]] = {
    "gated": {},
    "plain": {"gate": False},
    "transposed with bias": {"transposed": True, "bias": True},
    "norm": {"norm": True},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def routed(tokens: int = 7, slots: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:slots] for _ in range(tokens)])
    return torch.randn(tokens, HIDDEN, generator=generator), ids, torch.rand(tokens, slots, generator=generator)


def quantized(kind: str = "gated", fmt: str = "q8_0") -> tuple[FusedMoE, FusedMoE]:
    """A model, and the same with packed experts."""
    model = FusedMoE(**KINDS[kind]).eval()
    packed = copy.deepcopy(model)
    quantize_(packed, fmt, organization="moqe")
    assert isinstance(packed.experts, QuantExperts)
    return model, packed


# ---- the module ------------------------------------------------------------------------------------------------------


@kinds
def test_computes_what_the_original_does(kind: str) -> None:
    model, packed = quantized(kind)
    arguments = routed()
    assert relative_error(packed.experts(*arguments).detach(), model.experts(*arguments).detach()) < 0.02
    dequantize_(packed)
    assert type(packed.experts) is Experts and packed.experts.limit == 7.0
    assert [p.shape for p in packed.parameters()] == [p.shape for p in model.parameters()]
    assert relative_error(packed.experts(*arguments).detach(), model.experts(*arguments).detach()) < 0.02


@kinds
def test_experts_elsewhere_add_nothing(kind: str) -> None:
    """Under expert parallelism the id E stands for them, with a weight of zero."""
    _, packed = quantized(kind)
    x, ids, weights = routed()
    alone = packed.experts(x, ids[:, :1], weights[:, :1])
    masked = torch.stack([ids[:, 0], torch.full_like(ids[:, 0], EXPERTS)], 1)
    torch.testing.assert_close(packed.experts(x, masked, weights * torch.tensor([1.0, 0.0])), alone)


@kinds
def test_copies_pickles_and_state_dicts(kind: str) -> None:
    _, packed = quantized(kind)
    want, arguments = packed.experts(*routed()), routed()
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(other.experts(*arguments), want) and state_bytes(other) == state_bytes(packed)
    fresh = quantized(kind)[1]
    for parameter in fresh.parameters():
        parameter.data.zero_()
    fresh.load_state_dict(packed.state_dict())
    assert torch.equal(fresh.experts(*arguments), want)
    other = quantized(kind, "q4_0")[1]
    with pytest.raises(RuntimeError, match="experts.down_proj: this layer is q4_0, the state dict holds q8_0"):
        other.load_state_dict(packed.state_dict())
    with pytest.raises(
        RuntimeError, match=r"experts.down_proj: this layer holds q8_0 bytes and cannot load torch.float32"
    ):
        packed.load_state_dict(FusedMoE(**KINDS[kind]).state_dict())


def test_casts_leave_the_bytes() -> None:
    _, packed = quantized("transposed with bias")
    before = state_bytes(packed.experts)["down_proj"]
    packed.to(torch.bfloat16)
    assert packed.experts.dtype == torch.bfloat16 == packed.experts.down_proj_bias.dtype
    assert state_bytes(packed.experts)["down_proj"] == before
    x, ids, weights = routed()
    y = packed.experts(x.bfloat16(), ids, weights.bfloat16())
    assert y.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(packed.experts(x, ids, weights).detach(), y.detach()) < 0.02
    assert packed.to("meta").experts.down_proj.is_meta


def test_compiles_into_one_graph() -> None:
    torch.compiler.reset()
    for kind in ("gated", "transposed with bias"):
        _, packed = quantized(kind)
        compiled = torch.compile(packed, fullgraph=True, backend="aot_eager", dynamic=True)
        for tokens in (1, 6):
            x = torch.randn(tokens, HIDDEN)
            torch.testing.assert_close(compiled(x), packed(x))


def test_gradients_reach_router_and_input() -> None:
    model, packed = quantized("transposed with bias")
    grads = []
    for m in (model, packed):
        x = routed()[0].requires_grad_()
        m(x).square().sum().backward()
        grads.append((x.grad, m.router.weight.grad, m.experts.down_proj_bias.grad))
    for want, got in zip(*grads, strict=True):
        assert relative_error(got, want) < 0.05


def test_forward_mode_is_refused_rather_than_zero() -> None:
    _, packed = quantized()
    x = routed()[0]
    message = r"gate_up_proj is packed, and experts have no forward-mode derivative. Use reverse mode \(backward\)."
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(packed, (x,), (x,))


def test_says_what_it_is() -> None:
    _, packed = quantized()
    assert "down_proj=[5, 64, 96] q8_0 8.50 bpw" in repr(packed.experts) and packed.experts.bits_per_weight == 8.5
    assert packed.experts.dequantize("gate_up_proj").shape == (EXPERTS, 2 * INNER, HIDDEN)
    assert [(layer.name, layer.op, layer.shape) for layer in explain(packed).layers] == [
        ("experts.gate_up_proj", "experts_linear", (EXPERTS, 2 * INNER, HIDDEN)),
        ("experts.down_proj", "experts_linear", (EXPERTS, HIDDEN, INNER)),
    ]


def test_half_packed_experts_do_not_run() -> None:
    half = QuantExperts.from_float(Experts())
    packed = nn.Parameter(ops.quantize(half.gate_up_proj.detach(), "q8_0"), requires_grad=False)
    half.put("gate_up_proj", packed, get_format("q8_0"))
    with pytest.raises(RuntimeError, match="down_proj is not packed"):
        half(*routed())


def test_unknown_experts_are_left() -> None:
    model = FusedMoE()
    del model.experts.has_gate
    report = quantize_(model, "q8_0")
    assert type(model.experts) is Experts and "code of their own" in report["experts.down_proj"].reason


# ---- policy and report -----------------------------------------------------------------------------------------------


def test_report_and_plan_agree() -> None:
    model = FusedMoE()
    foreseen = plan(model, "q8_0")
    report = quantize_(model, "q8_0", measure_error=True)
    row = report["experts.gate_up_proj"]
    assert (row.kind, row.shape, row.stored) == ("experts", (EXPERTS, 2 * INNER, HIDDEN), "q8_0")
    assert row.bytes_after == model.experts.gate_up_proj.nbytes and 0 < row.error < 0.01
    assert [(r.name, r.bytes_after) for r in foreseen.layers] == [(r.name, r.bytes_after) for r in report.layers]
    assert "router" in report["router"].reason and report["proj"].stored == "q8_0"


@pytest.mark.parametrize(("hidden", "inner"), [(2880, 1408), (2048, 1408), (2880, 2880)])
def test_awkward_widths_fall_back_upwards(hidden: int, inner: int) -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"experts": Experts(hidden, inner, 2)})
    report = plan(model, "q4k")
    for name, columns in (("gate_up_proj", hidden), ("down_proj", inner)):
        row = report[f"experts.{name}"]
        assert row.stored == ("q4k" if columns % 256 == 0 else "q5_0") and row.fell_back == (columns % 256 != 0)


def test_experts_stay_together() -> None:
    """No code runs half of them packed."""
    report = quantize_(nn.ModuleDict({"experts": Experts(HIDDEN, 50), "proj": nn.Linear(64, 64)}), "q8_0")
    assert report["experts.down_proj"].stored is None and "50 columns" in report["experts.down_proj"].reason
    assert report["experts.gate_up_proj"].stored is None
    assert "experts.down_proj of the same experts stays" in report["experts.gate_up_proj"].reason
    model = FusedMoE()
    quantize_(model, "q8_0", topology={"/down_proj/": None})
    assert type(model.experts) is Experts


def test_a_topology_names_stacks() -> None:
    model = FusedMoE()
    quantize_(model, "q4_0", topology={"/experts.down_proj/": "q8_0"})
    assert model.experts.formats == {"gate_up_proj": "q4_0", "down_proj": "q8_0"}
    requantize_(model, "q5_0", source="stored", topology={}, include="gate_up_proj")
    assert model.experts.formats == {"gate_up_proj": "q5_0", "down_proj": "q8_0"}
    assert model(torch.randn(3, HIDDEN)).isfinite().all()


@pytest.mark.parametrize("per_expert", [True, False])
def test_importance(per_expert: bool) -> None:
    model = FusedMoE()
    w = model.experts.gate_up_proj.detach().clone()
    vector = torch.rand(*((EXPERTS,) if per_expert else ()), HIDDEN) + 0.01
    quantize_(model, "q4_0", imatrix={"experts.gate_up_proj": vector})
    assert torch.equal(model.experts.gate_up_proj, ops.quantize(w, "q4_0", vector))
    assert not torch.equal(model.experts.gate_up_proj, ops.quantize(w, "q4_0"))
    with pytest.raises(ValueError, match="needs 5 x 64 importance values, entry 'experts.gate_up_proj' has 3 x 64"):
        quantize_(FusedMoE(), "q4_0", imatrix={"experts.gate_up_proj": torch.rand(3, HIDDEN)})


def test_bad_weights_are_found_before_anything_changes() -> None:
    model = FusedMoE(transposed=True)
    model.experts.down_proj.data[3, 2, 1] = float("nan")
    with pytest.raises(ValueError, match=r"experts.down_proj\[3, 2, 1\] is nan"):
        quantize_(model, "q8_0")
    assert type(model.experts) is Experts


def test_shared_experts_module_is_packed_once() -> None:
    experts = Experts()
    model = nn.ModuleDict({"a": nn.ModuleDict({"experts": experts}), "b": nn.ModuleDict({"experts": experts})})
    report = quantize_(model, "q8_0")
    assert model["a"]["experts"] is model["b"]["experts"] and report["b.experts.down_proj"].tied_to
    dequantize_(model)
    assert model["a"]["experts"] is model["b"]["experts"] and type(model["a"]["experts"]) is Experts


# ---- files -----------------------------------------------------------------------------------------------------------


@kinds
def test_checkpoints(tmp_path: Path, kind: str) -> None:
    _, packed = quantized(kind, "q5_0")
    checkpoint.save(packed, tmp_path / "x.safetensors")
    for other in (FusedMoE(**KINDS[kind]), FusedMoE(**KINDS[kind]).to("meta"), quantized(kind)[1]):
        checkpoint.load_(other, tmp_path / "x.safetensors")
        assert state_bytes(other) == state_bytes(packed) and other.experts.formats == packed.experts.formats
        assert torch.equal(other.experts(*routed()), packed.experts(*routed()))
    with pytest.raises(ValueError, match=r"experts.\w+ is \[5, \d+, \d+\], in the model it is \[4, "):
        checkpoint.load_(FusedMoE(**KINDS[kind], experts=4), tmp_path / "x.safetensors")
