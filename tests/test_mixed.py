"""quantize_(model, "auto"): the knapsack, budgets, what is measured, and what becomes of it."""

from __future__ import annotations

import itertools
import json
import random
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from models import MoEModel, mlp, state_bytes, tiny_gpt2, tiny_llama
from torch import nn

import isqtorch
from isqtorch.auto import Budget, knapsack, sensitivity
from isqtorch.auto.curvature import measure_curvature
from isqtorch.auto.knapsack import Option
from isqtorch.formats import AUTO, formats, get_format
from isqtorch.importance import imatrix
from isqtorch.policy import inventory
from isqtorch.policy.options import Options
from isqtorch.policy.topology import Topology

IDS = torch.randint(0, 512, (1024,), generator=torch.Generator().manual_seed(1)).tolist()


# ---- knapsack --------------------------------------------------------------------------------------------------------


def total(items: list[list[Option]], picks: tuple[int, ...] | list[int]) -> tuple[float, int]:
    options = [item[pick] for item, pick in zip(items, picks, strict=True)]
    return sum(option.cost for option in options), sum(option.size for option in options)


def random_items(generator: random.Random, count: int, unit: int) -> list[list[Option]]:
    return [
        [Option(unit * generator.randint(1, 60), generator.random() ** 3) for _ in range(generator.randint(1, 5))]
        for _ in range(count)
    ]


@pytest.mark.parametrize("seed", range(30))
def test_the_choice_is_the_best(seed: int) -> None:
    generator = random.Random(seed)
    items = random_items(generator, generator.randint(1, 6), unit=144)
    least = sum(min(option.size for option in item) for item in items)
    most = sum(max(option.size for option in item) for item in items)
    for budget in {least, generator.randint(least, most), (least + most) // 2, most, most + 1}:
        cost, size = total(items, knapsack.solve(items, budget))
        assert size <= budget
        fitting = [total(items, picks) for picks in itertools.product(*(range(len(item)) for item in items))]
        assert cost == pytest.approx(min(cost for cost, size in fitting if size <= budget))


def test_sizes_without_a_common_step_are_nearly_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded up to steps: never above the budget, and little is lost."""
    generator = random.Random(0)
    items = [
        [
            Option(int(size * generator.uniform(0.5, 50)), cost)
            for size, cost in ((10007, 1.0), (20011, 0.3), (40009, 0.1))
        ]
        for _ in range(40)
    ]
    budget = int(1.7 * sum(min(option.size for option in item) for item in items))
    exact, _ = total(items, knapsack.solve(items, budget))
    monkeypatch.setattr(knapsack, "_STEPS", 400)
    cost, size = total(items, knapsack.solve(items, budget))
    assert size <= budget and exact <= cost < 1.1 * exact


def test_of_equals_the_smaller() -> None:
    assert knapsack.solve([[Option(10, 0.0), Option(20, 0.0)]], 100) == [0]


# ---- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [3.0, 3.7, 4.5, 5.123, 8.0])
def test_the_result_is_never_above_the_target(target: float) -> None:
    report = isqtorch.quantize_(tiny_llama(), "auto", target_bpw=target, progress=False)
    assert target - 0.2 < report.bits_per_weight <= target
    by_size = isqtorch.quantize_(tiny_llama(), "auto", max_size=report.bytes_after, progress=False)
    assert by_size.bytes_after <= report.bytes_after
    assert any(note.startswith(f"auto: {report.bits_per_weight:.4f} bits per weight") for note in report.notes)


def test_an_impossible_budget_names_the_least_that_works() -> None:
    model = tiny_llama()
    before = state_bytes(model)
    with pytest.raises(
        ValueError, match="quantize_: 2 bits per weight cannot be reached: .* has 2\\.6[0-9]* bits"
    ) as caught:
        isqtorch.quantize_(model, "auto", target_bpw=2, progress=False)
    least = int(str(caught.value).split("(")[1].split(" bytes")[0])
    with pytest.raises(ValueError, match="cannot be reached"):
        isqtorch.quantize_(model, "auto", max_size=least - 1, progress=False)
    assert state_bytes(model) == before
    assert isqtorch.quantize_(model, "auto", max_size=least, progress=False).bytes_after == least


def test_a_budget_beyond_everything_takes_the_largest_and_says_so() -> None:
    report = isqtorch.quantize_(mlp(), "auto", target_bpw=30, formats=["q3k", "q4k"], progress=False)
    assert {layer.stored for layer in report.quantized} == {"q4k"}
    assert any("the budget would hold more" in note for note in report.notes)


@pytest.mark.parametrize(
    ("size", "want"),
    [
        (1000, 1000),
        ("6GB", 6 * 10**9),
        ("6 gb", 6 * 10**9),
        ("1.5GiB", 3 << 29),
        ("800M", 8 * 10**8),
        ("123", 123),
        ("5kB", 5000),
    ],
)
def test_sizes(size, want: int) -> None:
    budget = Budget.of("x", AUTO, Options(max_size=size))
    assert budget is not None and budget.max_bytes == want


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "'auto' needs one of target_bpw=4.5 .* and max_size='6GB'"),
        ({"target_bpw": 4, "max_size": 1}, "needs one of"),
        ({"target_bpw": 0}, "target_bpw must be a positive number, got 0"),
        ({"target_bpw": float("nan")}, "target_bpw must be a positive number"),
        ({"target_bpw": "4.5"}, "target_bpw must be a positive number, got '4.5'"),
        ({"target_bpw": 4, "formats": 3.5}, "formats must be a list"),
        ({"max_size": "9" * 400}, "max_size must be a number of bytes"),
        ({"max_size": "6 apples"}, "max_size must be a number of bytes or a string such as '6GB'"),
        ({"max_size": -1}, "max_size must be"),
        ({"max_size": "0"}, "max_size must be"),
        ({"target_bpw": 4, "formats": []}, "formats must be a list"),
        ({"target_bpw": 4, "formats": "q4k"}, "formats must be a list"),
        ({"target_bpw": 4, "formats": ["q4z"]}, "formats: unknown format 'q4z'"),
        ({"target_bpw": 4, "formats": ["q4k_m"]}, "formats: 'q4k_m' is not a format"),
        ({"target_bpw": 4, "probe": "x"}, "probe must be one of kl, output; got 'x'"),
        ({"target_bpw": 4, "probe": "kl"}, "probe='kl' needs calibration_file"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    model = mlp()
    with pytest.raises(ValueError, match=message):
        isqtorch.quantize_(model, "auto", progress=False, **options)
    assert type(model[0]) is nn.Linear


def test_options_of_auto_for_another_format() -> None:
    with pytest.raises(ValueError, match="quantize_: target_bpw is for the format 'auto', and the format is 'q4k'"):
        isqtorch.quantize_(mlp(), "q4k", target_bpw=4)


def test_only_what_measures_takes_auto() -> None:
    with pytest.raises(ValueError, match="plan: 'auto' chooses formats by measuring weights.*save report.topology()"):
        isqtorch.plan(mlp(), "auto")
    model = mlp()
    isqtorch.quantize_(model, 4, progress=False)
    with pytest.raises(ValueError, match="requantize_: 'auto' needs one of target_bpw"):
        isqtorch.requantize_(model, "auto", source="stored")


# ---- what is chosen for ----------------------------------------------------------------------------------------------


def test_bits_go_where_errors_count() -> None:
    """Two layers of one shape: the one whose importance spreads its weight on columns that quantize badly gets more bits."""
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(easy=nn.Linear(256, 64), hard=nn.Linear(256, 64)))
    with torch.no_grad():
        model.easy.weight.copy_(torch.randint(0, 2, (64, 256)).float() - 0.5)  # any format holds two values
    report = isqtorch.quantize_(model, "auto", target_bpw=5, progress=False)
    assert report["hard"].bits_per_weight > report["easy"].bits_per_weight
    assert report.choice is not None and report.choice.measure == "weight"


def test_the_file_is_opened_once_and_every_weight_described_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama()
    isqtorch.collect_imatrix(model, IDS, progress=False).save(tmp_path / "x.gguf")
    opened, described = [], []
    open_binary, describe = imatrix.open_binary, inventory._describe
    monkeypatch.setattr(imatrix, "open_binary", lambda path: (opened.append(path), open_binary(path))[1])
    monkeypatch.setattr(inventory, "_describe", lambda name, *more: (described.append(name), describe(name, *more))[1])
    report = isqtorch.quantize_(model, "auto", target_bpw=4.5, imatrix=tmp_path / "x.gguf", progress=False)
    assert report.choice is not None and report.choice.measure == "output" and report.imatrix == "x.gguf"
    assert opened == [tmp_path / "x.gguf"]
    assert len(described) == len(report.layers)


@pytest.mark.parametrize("make", [lambda: tiny_llama(tied=True), tiny_gpt2, lambda: tiny_llama(hidden=288), MoEModel])
def test_any_model_and_the_saved_topology(make, tmp_path) -> None:
    model, again = make(), make()
    report = isqtorch.quantize_(model, "auto", target_bpw=6.5, progress=False)
    assert report.bits_per_weight <= 6.5 and not report.promoted
    report.topology().save(tmp_path / "layers.yaml")
    isqtorch.quantize_(again, None, topology=tmp_path / "layers.yaml", progress=False)
    assert state_bytes(model) == state_bytes(again)
    other = isqtorch.quantize_(make(), 8, topology=tmp_path / "layers.yaml", progress=False)  # it names every layer
    assert [layer.stored for layer in other.layers] == [layer.stored for layer in report.layers]
    assert json.loads(report.to_json())["choice"]["measure"] == "weight"


def test_tied_layers_and_lists_of_experts_are_one_choice_each() -> None:
    tied = isqtorch.quantize_(tiny_llama(tied=True), "auto", target_bpw=4.5, progress=False)
    assert tied["lm_head"].stored == tied["model.embed_tokens"].stored
    report = isqtorch.quantize_(MoEModel(), "auto", target_bpw=5, progress=False)
    for i in range(2):
        assert len({report[f"layers.{i}.mlp.experts.{e}"].stored for e in range(4)}) == 1
        assert report[f"layers.{i}.mlp.gate"].stored is None


def test_stacks_of_experts() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, moe_intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM(config).eval()
    name = "model.layers.0.mlp.experts.down_proj"
    curvature = measure_curvature(model, [name], None, torch.tensor(IDS))
    assert curvature[name].rows.shape == (4, 256) and bool((curvature[name].columns.sum(-1) - 1).abs().max() < 1e-6)
    im = isqtorch.collect_imatrix(model, torch.tensor(IDS), progress=False)
    report = isqtorch.quantize_(model, "auto", target_bpw=4, imatrix=im, progress=False)
    assert report[name].stored is not None and report.bits_per_weight <= 4
    assert report.choice is not None and report.choice.measure == "output"


def test_pins_count_in_the_budget() -> None:
    pins = {"/q_proj$/": "q8_0", "/o_proj$/": None}
    report = isqtorch.quantize_(tiny_llama(), "auto", target_bpw=5, topology=pins, progress=False)
    assert report["model.layers.1.self_attn.q_proj"].stored == "q8_0"
    assert report["model.layers.1.self_attn.o_proj"].stored is None
    assert report.bits_per_weight <= 5
    free = isqtorch.quantize_(tiny_llama(), "auto", target_bpw=5, progress=False)
    assert report["model.layers.0.mlp.up_proj"].bits_per_weight < free["model.layers.0.mlp.up_proj"].bits_per_weight


def test_the_allowed_formats_are_kept_and_fall_back() -> None:
    report = isqtorch.quantize_(tiny_llama(hidden=288), "auto", target_bpw=7, formats=["q4k", "q6k"], progress=False)
    assert {layer.stored for layer in report.quantized} <= {"q4k", "q6k", "q5_0", "q8_0"}  # 288 columns, or 576
    assert report.fallbacks
    with pytest.raises(ValueError, match="do not fit as asked"):
        isqtorch.quantize_(
            tiny_llama(hidden=288), "auto", target_bpw=7, fallback="error", formats=["q4k"], progress=False
        )


def test_the_default_formats_go_from_two_to_eight_bits() -> None:
    budget = Budget.of("x", AUTO, Options(target_bpw=4.5))
    assert budget is not None and budget.formats == (2, 3, 4, 5, 6, 8)
    assert set(budget.formats) == {get_format(name).bits for name in formats()}


# ---- measuring -------------------------------------------------------------------------------------------------------


def test_the_formula_of_the_errors() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 6, 256, generator=generator)
    h = torch.rand(2, 256, generator=generator)
    rows, columns = torch.rand(2, 6, generator=generator).double(), torch.rand(2, 256, generator=generator).double()
    shares = torch.tensor([0.9, 0.1], dtype=torch.float64)
    fmt = get_format("q4k")
    sums = sensitivity.measure_errors(weight, [fmt], sensitivity.Weighing(rows, columns), h, shares, {fmt.name: None})
    got = sensitivity.errors_of([sums])["q4k"]
    error = (
        torch.stack([isqtorch.quantize(w, "q4k", importance=v).dequantize() for w, v in zip(weight, h, strict=True)])
        - weight
    )
    squares = error.double().square()
    assert got.cost == pytest.approx(float((rows[..., None] * columns[:, None] * squares).sum()), rel=1e-5)
    by_share = (h.double() * shares[:, None])[:, None]
    want = float((by_share * squares).sum() / (by_share * weight.double().square()).sum())
    assert got.output == pytest.approx(want, rel=1e-5)
    assert got.weight == pytest.approx(float(squares.sum() / weight.double().square().sum()), rel=1e-5)


def test_a_sample_of_rows_stands_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(400, 256, generator=generator) * torch.linspace(0.5, 2, 400)[:, None]
    weighing = sensitivity.Weighing(torch.rand(400, generator=generator).double() ** 4, torch.ones(256).double())
    fmt = get_format("q3k")
    whole = sensitivity.errors_of([sensitivity.measure_errors(weight, [fmt], weighing, None, None, {fmt.name: None})])[
        "q3k"
    ]
    monkeypatch.setattr(sensitivity, "_SAMPLE", 100 * 256)
    samples = [sensitivity.measure_errors(weight, [fmt], weighing, None, None, {fmt.name: None}) for _ in range(2)]
    assert torch.equal(samples[0].errors["q3k"], samples[1].errors["q3k"])
    part = sensitivity.errors_of(samples[:1])["q3k"]
    assert whole.cost is not None and part.cost == pytest.approx(whole.cost, rel=0.1)
    assert part.weight == pytest.approx(whole.weight, rel=0.1)


def test_layers_that_no_token_reached_are_not_given_away() -> None:
    known, unknown = sensitivity.Error(3.0, 0.1, 0.1), sensitivity.Error(None, 0.2, 0.2)
    [_, estimate] = sensitivity.costs([{"q4k": known}, {"q4k": unknown}], [100, 50], [False, False])
    assert estimate["q4k"] == pytest.approx(3.0 / (0.1 * 100) * 50 * 0.2)


def test_the_curvature_leaves_no_trace_and_repeats() -> None:
    model = tiny_llama(tied=True, dtype=torch.float32).train()
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    before = state_bytes(model)
    names = ["model.embed_tokens", "model.layers.0.mlp.up_proj"]
    first, second = (measure_curvature(model, names, None, torch.tensor(IDS)) for _ in range(2))
    for name in names:
        assert torch.equal(first[name].rows, second[name].rows) and bool((first[name].rows >= 0).all())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert bool((model.lm_head.weight.grad == 1).all()) and model.model.layers[0].mlp.up_proj.weight.grad is None
    assert state_bytes(model) == before and model.training
    assert not model.lm_head.weight._post_accumulate_grad_hooks


def test_the_curvature_is_that_of_the_divergence() -> None:
    """A random error of one layer diverges by what its curvature says."""
    model = tiny_llama(dtype=torch.float32)
    ids = torch.tensor(IDS)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # predictions that are not all alike
    name = "model.layers.1.mlp.down_proj"
    weighing = measure_curvature(model, [name], None, ids)[name]
    reference = isqtorch.reference_logits(model, ids, context=128)
    weight = model.get_submodule(name).weight
    error = 0.1 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        weight.add_(error)
    measured = isqtorch.kl_divergence(model, reference, ids, context=128).mean
    predicted = float(weighing.rows @ error.detach().double().square() @ weighing.columns)
    assert predicted == pytest.approx(measured, rel=0.3)


def test_a_text_is_measured_by_the_divergence(tmp_path) -> None:
    class Tokenizer:
        bos_token_id = None

        def __call__(self, text: str, **_) -> dict[str, list[int]]:
            return {"input_ids": [ord(c) % 512 for c in text]}

    (tmp_path / "text.txt").write_text("a calibration text, long enough. " * 40)
    cal = {"calibration_file": tmp_path / "text.txt", "tokenizer": Tokenizer(), "progress": False}
    reports = {
        probe: isqtorch.quantize_(tiny_llama(), "auto", target_bpw=4, probe=probe, **cal) for probe in (None, "output")
    }
    assert [report.choice.measure for report in reports.values()] == ["kl", "output"]
    assert any("the curvature of the KL divergence, which predicts 0." in note for note in reports[None].notes)


# ---- topologies and plots --------------------------------------------------------------------------------------------


def test_an_exact_topology_joins_numbers_and_matches_nothing_else(tmp_path) -> None:
    names = {f"model.layers.{i}.experts.{e}.w1": "q4k" if i else "q5k" for i in range(12) for e in range(20)}
    names |= {"model.embed.tokens": "q6k", "model.layers.3.up_proj": None, "0": "q8_0", "a+b.1": "q3k"}
    topology = Topology.exact(names)
    assert len(topology.entries) == 6
    topology.save(tmp_path / "it's.yaml")
    for read in (topology, Topology.load(tmp_path / "it's.yaml"), Topology.load(topology.to_dict())):
        for name, fmt in names.items():
            entry = read.find(name)
            assert entry is not None and entry.spec == fmt and entry.leave == (fmt is None)
        for other in (
            "model.layers.12.experts.1.w1",
            "model.layers.1.experts.20.w1",
            "xmodel.embed.tokens",
            "model.embed_tokens",
        ):
            assert read.find(other) is None


def test_a_topology_survives_saving(tmp_path) -> None:
    entries = {"0-2": "q6k", "3": {"device": "cpu"}, "/it's \\d$/": None, "4": {"isq": None, "device": "cpu"}, "5": 4}
    topology = Topology.load(entries)
    topology.save(tmp_path / "t.yaml")
    assert Topology.load(tmp_path / "t.yaml").entries == topology.entries


@pytest.mark.parametrize("fmt", ["auto", "q4k_m"])
def test_plots(fmt: str, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    options = {"target_bpw": 4.5} if fmt == AUTO else {"measure_error": True}
    report = isqtorch.quantize_(tiny_llama(), fmt, progress=False, **options)
    report.plot(tmp_path / "layers.png")
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing is quantized"):
        isqtorch.plan(nn.Sequential(nn.LayerNorm(4)), 4).plot(tmp_path / "x.png")
