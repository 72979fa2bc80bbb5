"""rule="feedback" for whole models: what it buys, which layers have it, the choice per layer, passes, and the report."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from models import IDS, FusedMoE, mlp, state_bytes, stored, tiny_gpt2, tiny_llama, tiny_moe
from torch import Tensor, nn

import isqtorch
from isqtorch.importance import inputs as first_tokens
from isqtorch.importance.inputs import Input

transformers = pytest.importorskip("transformers")

DEMO = Path(__file__).resolve().parent.parent / "examples/demo_model"
CONTEXT = 256
TOKENS = 8 * CONTEXT
UP = "model.layers.0.mlp.up_proj"


@cache
def moments_of(make: Any, count: int = 3000) -> tuple[Any, isqtorch.Moments]:
    """A small model in f32 and its moments on random tokens."""
    model = make(dtype=torch.float32) if make is tiny_llama else make()
    ids = torch.randint(1, 60, (count,), generator=torch.Generator().manual_seed(0))
    return model, isqtorch.collect_moments(model, ids, chunk=60, progress=False)


def packed(make: Any, fmt: str, **options: Any) -> tuple[Any, isqtorch.QuantReport]:
    model = copy.deepcopy(moments_of(make)[0])
    return model, isqtorch.quantize_(model, fmt, progress=False, **options)


def output_error(model: nn.Module, other: nn.Module) -> float:
    with torch.no_grad():
        want, got = model(IDS).logits.float(), other(IDS).logits.float()
    return float((got - want).norm() / want.norm())


# ---- what it buys ----------------------------------------------------------------------------------------------------


def test_it_lowers_the_divergence_of_the_demo_model() -> None:
    """By half, from importance alone, on text that calibration has not seen."""
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO / "model")
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")[: 8 * TOKENS]
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][:TOKENS])
    reference = isqtorch.reference_logits(model, ids, context=CONTEXT)
    moments = isqtorch.collect_moments(model, DEMO / "calibration.txt", tokenizer, CONTEXT, 16384, progress=False)
    for fmt, most in (("q4_0", 0.55), ("q4k", 0.65)):
        found = {}
        for rule in (None, "feedback"):
            changed = copy.deepcopy(model)
            # the head keeps its floats: it has no feedback here, because the embedding shares it
            options = {"rule": rule, "exclude": ["embed", "lm_head"], "progress": False}
            report = isqtorch.quantize_(changed, fmt, imatrix=moments, **options)
            found[rule] = isqtorch.kl_divergence(changed, reference, ids, context=CONTEXT).mean
        print(f"{fmt}: mean KL {found[None]:.5f} -> {found['feedback']:.5f}")
        assert found["feedback"] < most * found[None], found
        outcomes = [layer.feedback for layer in report.quantized]
        assert all(outcome.feedback < outcome.importance and outcome.share == 1 for outcome in outcomes)


class Sink(nn.Module):
    """An input whose first token is unlike all others, in front of a value projection and of another layer.

    The value of the first token is small by cancellation, as in models with an attention sink.
    """

    def __init__(self, width: int = 128, heads: int = 64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(512, width)
        nn.init.normal_(self.embed.weight, generator=generator)
        self.v_proj, self.o_proj = nn.Linear(width, heads, bias=False), nn.Linear(width, heads, bias=False)
        sink = torch.randn(width, generator=generator)
        self.embed.weight.data[0] = sink
        weight = torch.randn(heads, width, generator=generator) / width**0.5
        weight -= 0.9 * (weight @ sink)[:, None] * sink / sink.square().sum()
        mix = torch.randn(width, width // 4, generator=generator)  # the other tokens lie mostly in a subspace
        self.embed.weight.data[1:] = (
            self.embed.weight.data[1:] * 0.1 + self.embed.weight.data[1:, : width // 4] @ mix.t()
        )
        for layer in (self.v_proj, self.o_proj):
            layer.weight.data.copy_(weight)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return self.v_proj(x) + self.o_proj(x.clone())


def test_the_first_token_counts_more_in_front_of_attention_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this rule, feedback puts the error of a value projection where the attention is."""
    model = Sink()
    windows = torch.randint(1, 512, (64, 100), generator=torch.Generator().manual_seed(1))
    windows[:, 0] = 0
    errors: dict[tuple[str, bool], float] = {}
    x = model.embed.weight[0].detach()
    for counts in (True, False):
        monkeypatch.setattr(first_tokens, "FIRST", 64 if counts else 0)
        with isqtorch.calibrate(model, moments=True) as moments, torch.no_grad():
            model(windows)
        other = copy.deepcopy(model)
        isqtorch.quantize_(other, "q4_0", rule="feedback", imatrix=moments, include="proj", progress=False)
        for name in ("v_proj", "o_proj"):
            decoded = torch.ops.isqtorch.dequantize(other.get_submodule(name).weight, "q4_0", torch.float32)
            errors[name, counts] = float(((decoded - model.get_submodule(name).weight.detach()) @ x).square().sum())
    assert errors["v_proj", True] < 0.5 * errors["v_proj", False], errors
    assert errors["o_proj", True] == errors["o_proj", False] and errors["o_proj", False] == errors["v_proj", False]


# ---- the choice of each layer ----------------------------------------------------------------------------------------


def with_moments_of(moments: isqtorch.Moments, layer: str, other: str) -> isqtorch.Moments:
    """A planted error: the sums of another input, with the held-out rows of the layer's own."""
    inputs = dict(moments.inputs)
    (own,), (wrong,) = inputs[moments.readers[layer]], inputs[moments.readers[other]]
    assert own.total.columns == wrong.total.columns
    inputs[moments.readers[layer]] = (Input(wrong.total, own.first, own.held),)
    return isqtorch.Moments(inputs, moments.readers, moments.stacks)


@pytest.mark.parametrize("fmt", ["q4_0", "afq4"])
def test_moments_of_another_layer_are_noticed(fmt: str) -> None:
    """By the held-out rows: the layers get what importance alone gives them, and the report says so."""
    model = mlp(128, 2, bias=False)
    mix = torch.randn(128, 24)
    with isqtorch.calibrate(model, moments=True) as moments, torch.no_grad():
        for _ in range(20):
            model(torch.randn(64, 24) @ mix.t() + 0.1 * torch.randn(64, 128))
    right, wrong = copy.deepcopy(model), copy.deepcopy(model)
    report = isqtorch.quantize_(right, fmt, rule="feedback", imatrix=moments, progress=False)
    assert report["0"].feedback.share == 1 and report["0"].reason == ""
    planted = with_moments_of(moments, "0", "1")
    report = isqtorch.quantize_(wrong, fmt, rule="feedback", imatrix=planted, progress=False)
    outcome = report["0"].feedback
    assert outcome.share == 0 and outcome.feedback > outcome.importance
    assert "by importance alone: feedback is not better on held-out rows" in report["0"].reason
    rule = "search" if fmt == "afq4" else None
    isqtorch.quantize_(model, fmt, rule=rule, imatrix=planted, include="^0$", progress=False)
    assert torch.equal(model[0].weight, wrong[0].weight) and not torch.equal(model[0].weight, right[0].weight)


def test_parts_of_a_joint_matrix_are_judged_by_themselves() -> None:
    """So the share of the rows that have feedback is a number of thirds."""
    model, moments = moments_of(tiny_gpt2)
    name = "transformer.h.0.attn.c_attn"
    other = copy.deepcopy(model)
    report = isqtorch.quantize_(other, "q4_0", rule="feedback", imatrix=moments, include=name, progress=False)
    judged = report[name].feedback
    assert judged.share in (0, 1 / 3, 2 / 3, 1) and judged.importance is not None


def test_without_held_out_rows_importance_decides() -> None:
    model = tiny_llama(dtype=torch.float32)
    with isqtorch.calibrate(model, moments=True) as moments, torch.no_grad():
        model(torch.arange(100)[None])
    plain = copy.deepcopy(model)
    report = isqtorch.quantize_(
        model, "q4_0", rule="feedback", imatrix=moments, exclude=["embed", "head"], progress=False
    )
    assert all(layer.reason == "by importance alone: too few held-out rows" for layer in report.quantized)
    assert any("14 weights have too few held-out rows" in note for note in report.notes)
    isqtorch.quantize_(plain, "q4_0", imatrix=moments, exclude=["embed", "head"], progress=False)
    assert state_bytes(model) == state_bytes(plain)


# ---- which layers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["q4_0", "q3k", "q4k_m", "afq3", "hqq4", "fp8", "iq4_nl", "mxfp4"])
def test_every_format(fmt: str) -> None:
    """Also a mix, and formats that take no importance. The outputs are closer, and the sizes the same."""
    model, moments = moments_of(tiny_llama)
    fed, report = packed(tiny_llama, fmt, rule="feedback", imatrix=moments)
    rule = "search" if fmt in ("afq3", "hqq4") else None
    plain, before = packed(tiny_llama, fmt, rule=rule, imatrix=moments)
    assert [layer.stored for layer in report.layers] == [layer.stored for layer in before.layers]
    assert report.bytes_after == before.bytes_after
    assert output_error(model, fed) < 1.02 * output_error(model, plain)
    outcomes = [layer.feedback for layer in report.quantized if layer.kind == "linear"]
    assert len(outcomes) == 15 and all(0 < outcome.importance < 1 for outcome in outcomes)
    assert sum(outcome.feedback for outcome in outcomes) < sum(outcome.importance for outcome in outcomes)
    assert any("feedback: " in note and "(median)" in note for note in report.notes)


def test_a_fallback_format_has_feedback_too() -> None:
    model = mlp(96, 2)
    with isqtorch.calibrate(model, moments=True) as moments, torch.no_grad():
        for _ in range(16):
            model(torch.randn(32, 96))
    report = isqtorch.quantize_(model, "q4k", rule="feedback", imatrix=moments, progress=False)
    assert all(layer.fell_back and layer.feedback.importance for layer in report.quantized)


def test_experts() -> None:
    """Each with its own moments; the few tokens of some are enough, with the help of the others."""
    model, moments = moments_of(tiny_moe)
    fed, report = packed(tiny_moe, "q4_0", rule="feedback", imatrix=moments, include="experts")
    plain, _ = packed(tiny_moe, "q4_0", imatrix=moments, include="experts")
    stacks = [layer.feedback for layer in report.quantized]
    assert len(stacks) == 2 and all(outcome.share > 0.5 for outcome in stacks)
    ids = torch.randint(1, 60, (4, 40))
    with torch.no_grad():
        want, got, without = (m(ids).logits for m in (model, fed, plain))
    assert float((got - want).norm()) < float((without - want).norm())


def test_experts_without_tokens() -> None:
    model = tiny_moe()
    with isqtorch.calibrate(model, moments=True) as moments, torch.no_grad():
        model(torch.randint(0, 60, (1, 1)))
        model(torch.randint(0, 60, (1, 1)))
    plain = copy.deepcopy(model)
    report = isqtorch.quantize_(model, "q4_0", rule="feedback", imatrix=moments, include="experts", progress=False)
    assert all("too few held-out rows" in layer.reason for layer in report.quantized)
    isqtorch.quantize_(plain, "q4_0", imatrix=moments, include="experts", progress=False)
    assert state_bytes(model) == state_bytes(plain)


def test_a_layer_without_moments_is_packed_by_default() -> None:
    _, moments = moments_of(tiny_llama)
    some = isqtorch.Moments(
        {key: parts for key, parts in moments.inputs.items() if "mlp" in key},
        {name: key for name, key in moments.readers.items() if "mlp" in key},
        moments.stacks,
    )
    fed, report = packed(tiny_llama, "q4_0", rule="feedback", imatrix=some, include=["mlp", "q_proj"])
    plain, _ = packed(tiny_llama, "q4_0", include="q_proj")
    name = "model.layers.0.self_attn.q_proj"
    assert torch.equal(fed.get_submodule(name).weight, plain.get_submodule(name).weight)
    assert any("no entry in the importance matrix" in note and name in note for note in report.notes)
    assert report[UP].feedback.share == 1 and report[name].feedback is None


# ---- from a text -----------------------------------------------------------------------------------------------------


class Words:
    """A tokenizer of one token per character."""

    def encode(self, text: str) -> list[int]:
        return [1 + ord(letter) % 60 for letter in text]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    generator = torch.Generator().manual_seed(0)
    path.write_text("".join(chr(97 + int(i)) for i in torch.randint(0, 26, (2500,), generator=generator)))
    return path


def test_passes_give_the_same_bytes_and_are_reported(text: Path) -> None:
    """Also if the layers of a pass are packed before the next pass runs the model."""
    models = []
    for most in (None, 2_000_000):
        model = tiny_llama(dtype=torch.float32)
        report = isqtorch.quantize_(
            model, "q4_0", rule="feedback", calibration_file=text, tokenizer=Words(), max_memory=most, progress=False
        )
        models.append(model)
        assert any("moments collected in" in note for note in report.notes) == (most is not None)
        assert all(layer.feedback.importance for layer in report.quantized if layer.kind == "linear")
    assert state_bytes(models[0]) == state_bytes(models[1])


def test_requantize_takes_weights_from_the_source_and_moments_from_the_model(text: Path, tmp_path: Path) -> None:
    model = tiny_llama(dtype=torch.float32)
    source = stored(model, tmp_path)
    isqtorch.quantize_(model, "q8_0", progress=False)
    moments = isqtorch.collect_moments(model, text, Words(), progress=False)
    twin = copy.deepcopy(model)
    options = {"source": source, "rule": "feedback", "progress": False}
    report = isqtorch.requantize_(model, "q4_0", calibration_file=text, tokenizer=Words(), max_memory="1MB", **options)
    assert any("moments collected in" in note for note in report.notes)
    isqtorch.requantize_(twin, "q4_0", imatrix=moments, **options)
    assert state_bytes(model) == state_bytes(twin)
    fresh = tiny_llama(dtype=torch.float32)
    isqtorch.quantize_(fresh, "q4_0", rule="feedback", imatrix=moments, progress=False)
    assert state_bytes(fresh) == state_bytes(model)


@pytest.mark.parametrize("probe", ["output", "kl"])
def test_auto_measures_what_feedback_costs(text: Path, probe: str) -> None:
    errors = {}
    for rule in (None, "feedback"):
        model = tiny_llama(dtype=torch.float32)
        most = {"max_memory": "3MB"} if rule else {}
        report = isqtorch.quantize_(
            model,
            "auto",
            target_bpw=6,
            formats=["q4_0", "q8_0"],
            probe=probe,
            rule=rule,
            calibration_file=text,
            tokenizer=Words(),
            progress=False,
            **most,
        )
        assert report.bits_per_weight <= 6 and report.choice is not None and report.choice.measure == probe
        errors[rule] = {names[0]: options["q4_0"].cost for names, _, options in report.choice.items}
    linear = [name for name in errors[None] if "embed" not in name]
    assert all(errors["feedback"][name] < errors[None][name] for name in linear), errors


# ---- the report and what goes wrong ----------------------------------------------------------------------------------


def test_the_report() -> None:
    _, moments = moments_of(tiny_llama)
    _, report = packed(tiny_llama, "q4_0", rule="feedback", imatrix=moments)
    assert report.rule == "feedback"
    layer = json.loads(report.to_json())["layers"][-1]
    assert layer["feedback"]["share"] in (0, 1) and layer["feedback"]["importance"] > 0
    _, report = packed(tiny_llama, "q4_0", imatrix=moments)
    assert all(layer.feedback is None for layer in report.layers)
    assert "feedback" not in str(report)


def test_large_errors_of_weights_are_no_damage() -> None:
    """Errors of columns make up for each other, so they are larger than those of rounding."""
    _, moments = moments_of(tiny_llama)
    _, report = packed(tiny_llama, "q2k", rule="feedback", imatrix=moments, measure_error=True)
    assert not report.damaged
    tiny = copy.deepcopy(moments_of(tiny_llama)[0])
    tiny.get_submodule(UP).weight.data *= 1e-6
    with pytest.warns(UserWarning, match="lost much more than usual"):
        report = isqtorch.quantize_(tiny, "q4k", rule="feedback", imatrix=moments, progress=False)
    assert report[UP].damaged


def test_what_goes_wrong(text: Path, tmp_path: Path) -> None:
    model = tiny_llama()
    importance = isqtorch.Imatrix({UP: torch.ones(256)})
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "needs second moments of the layers' inputs. Give imatrix="),
        ({"imatrix": importance}, "has importance only"),
        ({"calibration_file": text}, "calibration_file needs tokenizer"),
        ({"calibration_file": text, "tokenizer": Words(), "imatrix": importance}, "not both"),
        ({"max_memory": "lots"}, "max_memory must be a number of bytes or a string such as '6GB'"),
    ]
    before = state_bytes(model)
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            isqtorch.quantize_(model, "q4k", rule="feedback", progress=False, **options)
    with pytest.raises(ValueError, match="max_memory is for rule='feedback'"):
        isqtorch.quantize_(model, "q4k", max_memory="6GB")
    with pytest.raises(ValueError, match="one of search, mlx, feedback"):
        isqtorch.quantize_(model, "q4k", rule="gptq")
    moments = moments_of(tiny_llama)[1]
    with pytest.raises(
        ValueError, match="is for linear layers and experts, and only model.embed_tokens would be packed"
    ):
        isqtorch.quantize_(model, "q4k", rule="feedback", imatrix=moments, include="embed")
    with pytest.raises(ValueError, match="made for another model"):
        isqtorch.quantize_(mlp(), "q4k", rule="feedback", imatrix=moments)
    with pytest.raises(ValueError, match="moments of another model|made for another model"):
        isqtorch.quantize_(tiny_llama(hidden=512), "q4k", rule="feedback", imatrix=moments)
    with pytest.raises(ValueError, match="needs second moments"):
        isqtorch.IsqConfig(4, rule="feedback").request() and transformers.AutoModelForCausalLM.from_pretrained(
            DEMO / "model", quantization_config=isqtorch.IsqConfig(4, rule="feedback")
        )
    assert state_bytes(model) == before
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(ValueError, match="9 tokens are too few"):
        isqtorch.quantize_(
            model, "q4k", rule="feedback", calibration_file=tmp_path / "short.txt", tokenizer=Words(), progress=False
        )


def test_fused_experts_outside_of_transformers_are_refused_or_packed() -> None:
    """No hook sees their inputs, so they are packed by default, and the report says that they have no entry."""
    model = FusedMoE()
    with isqtorch.calibrate(model, moments=True) as moments, torch.no_grad():
        for _ in range(10):
            model(torch.randn(20, 64))
    report = isqtorch.quantize_(model, "q4_0", rule="feedback", imatrix=moments, progress=False)
    assert any("no entry in the importance matrix" in note for note in report.notes)
