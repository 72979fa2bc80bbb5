"""The rules that give each layer its format, on descriptions alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from isqtorch.formats import formats, get_format
from isqtorch.policy.decide import Decision, decide
from isqtorch.policy.layers import LayerInfo
from isqtorch.policy.options import Options
from isqtorch.policy.request import Request


def info(name: str, rows: int = 256, columns: int = 512, kind: str = "linear", **more) -> LayerInfo:
    return LayerInfo(name, kind, (rows, columns), more.pop("dtype", torch.bfloat16), **more)  # type: ignore[arg-type]


def one(layer: LayerInfo, fmt=4, *others: LayerInfo, **options) -> Decision:
    return decide([layer, *others], Request(fmt, Options(**options))).decisions[0]


def stored(decision: Decision) -> str | None:
    return decision.format.name if decision.format else None


def test_the_default_is_what_was_asked() -> None:
    decision = one(info("layers.0.up_proj"))
    assert (decision.requested, stored(decision), decision.reason) == ("q4k", "q4k", "")


@pytest.mark.parametrize("fmt", formats())
@pytest.mark.parametrize("role", ["embedding", "head"])
def test_promotion_is_the_formats_own(fmt: str, role: str) -> None:
    decision = one(info("x", role=role), fmt)
    want = get_format(fmt).promoted or fmt
    assert stored(decision) == want and decision.requested == fmt
    assert decision.promoted == (want != fmt)
    if want != fmt:
        assert decision.reason == f"{'output head' if role == 'head' else 'embedding'}: promoted from {fmt} to {want}"


@pytest.mark.parametrize(
    ("fmt", "want"),
    [("q2k", "q4_0"), ("q3k", "q4_0"), ("q4k", "q5_0"), ("q5k", "q5_1"), ("q6k", "q8_0"), ("q8k", "q8_1")]
    + [("afq4", "afq4g32"), ("hqq4", "hqq4g32"), ("fp8", "q8_0")],
)
def test_fallback_goes_up(fmt: str, want: str) -> None:
    decision = one(info("x", columns=288), fmt)
    assert stored(decision) == want and decision.fell_back
    assert (
        decision.reason
        == f"288 columns are not a multiple of {get_format(fmt).block}, which {fmt} needs: {want} instead"
    )


def test_fallback_skip_and_error() -> None:
    decision = one(info("x", columns=288), "q4k", fallback="skip")
    assert stored(decision) is None and decision.reason.endswith("left as it is") and "288" in decision.reason
    with pytest.raises(ValueError, match=r"1 layers do not fit as asked: x: 288 columns .* Set fallback='up'"):
        one(info("x", columns=288), "q4k", fallback="error")


def test_no_format_fits() -> None:
    decision = one(info("x", columns=100))
    assert stored(decision) is None and "no larger format fits" in decision.reason


def test_promotion_then_fallback_names_both() -> None:
    decision = one(info("lm_head", columns=288, role="head"), "q4k")
    assert stored(decision) == "q8_0" and decision.promoted and decision.fell_back
    assert decision.reason == (
        "output head: promoted from q4k to q6k; 288 columns are not a multiple of 256, which q6k needs: q8_0 instead"
    )


def test_scale_type_follows_the_weights() -> None:
    assert stored(one(info("x", dtype=torch.float16), "afq4")) == "afq4.f16"
    assert one(info("x", dtype=torch.float16), "afq4").reason == "afq4.f16: its scales have the weights' type"
    assert stored(one(info("x"), "afq4")) == "afq4"
    assert stored(one(info("x", dtype=torch.float32), "afq4")) == "afq4"
    assert stored(one(info("x"), "afq4.f16")) == "afq4.f16"  # spelled out: kept
    assert stored(one(info("x", dtype=torch.float16, columns=288), "afq4")) == "afq4g32.f16"


def test_bits_depend_on_the_device() -> None:
    assert stored(one(info("x", device_type="mps"), 4)) == "afq4"
    assert stored(one(info("x", device_type="cuda"), 4)) == "q4k"
    assert stored(one(info("x"), "4")) == "q4k"


# ---- what is left ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "wpe",
        "embeddings.position_embeddings",
        "embeddings.token_type_embeddings",
        "decoder.embed_positions",
        "pos_embed",
        "positions_embed",
        "block.0.attn.relative_attention_bias",
    ],
)
def test_position_embeddings_stay(name: str) -> None:
    decision = one(info(name, kind="embedding", role="embedding"), 4, include=[".*"])
    assert stored(decision) is None and "never quantized" in decision.reason


def test_word_embeddings_do_not_stay() -> None:
    for name in ("embed_tokens", "wte", "shared", "embeddings.word_embeddings", "composition_embed"):
        assert stored(one(info(name, kind="embedding", role="embedding"))) == "q6k"


@pytest.mark.parametrize(
    ("name", "rows", "columns", "others"),
    [
        ("mlp.router", 256, 256, ()),
        ("mlp.router.classifier", 256, 256, ()),
        ("mlp.shared_expert_gate", 1, 256, ()),
        ("mlp.gate", 8, 256, ()),
        ("mlp.gate", 256, 256, ("mlp.experts.0.up",)),
        ("mlp.gate.wg", 256, 256, ("mlp.experts.0.up",)),
        ("block_sparse_moe.gate", 64, 2048, ()),
    ],
)
def test_routers_stay(name: str, rows: int, columns: int, others: tuple[str, ...]) -> None:
    decision = one(info(name, rows, columns), 4, *(info(other) for other in others), topology={"/./": "q8_0"})
    assert stored(decision) is None and decision.reason.startswith("routers are")


@pytest.mark.parametrize("name", ["score", "classifier", "classifier.out_proj", "qa_outputs"])
def test_the_few_outputs_of_a_classifier_stay(name: str) -> None:
    decision = one(info(name, 3, 256), 4, topology={"/./": "q8_0"})
    assert stored(decision) is None and decision.reason.startswith("the outputs of classifiers are")
    assert stored(one(info(name, 256, 256))) == "q4k"  # as large as any other layer
    assert stored(one(info("model.score_proj", 3, 256))) == "q4k"


def test_a_gate_that_is_no_router() -> None:
    for name in ("mlp.gate", "mlp.gate_proj", "attn.wg", "gate"):
        assert stored(one(info(name, 512, 512), 4, info("other.experts.0"))) == "q4k"


def test_reasons_known_from_the_module_come_first() -> None:
    decision = one(info("x", keep="because"), 4, include=["x"], topology={"/x/": "q8_0"})
    assert (stored(decision), decision.reason) == (None, "because")
    assert (
        one(info("x", dtype=torch.int8)).reason
        == "its weight is int8; only float32, float16 and bfloat16 can be quantized"
    )
    assert stored(one(info("x", dtype=torch.float64))) is None
    assert one(info("x", rows=0)).reason == "its weight is empty"


@pytest.mark.parametrize("option", ["include", "exclude", "modules_to_not_convert"])
def test_an_empty_string_is_no_pattern(option: str) -> None:
    decision = one(info("layers.0.up"), "q4k", **{option: ""})
    assert decision.format is not None and decision.format.name == "q4k"
    with pytest.raises(ValueError, match=rf"{option} has an empty entry, which would match every layer\. Leave it out"):
        one(info("layers.0.up"), "q4k", **{option: ["down", ""]})


def test_an_empty_list_includes_nothing() -> None:
    assert one(info("layers.0.up"), "q4k", include=[]).reason == "no include pattern matches"


def test_include_and_exclude_search_the_path() -> None:
    layers = [info(f"layers.{i}.{leaf}") for i in range(2) for leaf in ("q_proj", "up_proj")]
    verdict = decide(layers, Request("q4k", Options(include=[r"_proj$"], exclude=[r"^layers\.1\.", "q_"])))
    assert [stored(d) for d in verdict.decisions] == [None, "q4k", None, None]
    assert verdict.decisions[0].reason == "excluded by 'q_'"
    assert (
        decide(layers, Request("q4k", Options(include="up_proj"))).decisions[0].reason == "no include pattern matches"
    )


def test_patterns_and_entries_that_match_nothing_are_noted() -> None:
    verdict = decide(
        [info("layers.0.up")], Request(4, Options(topology={"7": "q4k"}, include=["up", "gone"], exclude=["nope"]))
    )
    assert verdict.notes == [
        "topology entry '7' matches no layer",
        "include pattern 'gone' matches no layer",
        "exclude pattern 'nope' matches no layer",
    ]


# ---- organization and topology ---------------------------------------------------------------------------------------


def test_moqe_takes_routed_experts_only() -> None:
    names = ["attn.q_proj", "mlp.experts.0.up", "mlp.shared_experts.up", "mlp.shared_expert.up", "lm_head"]
    decisions = decide([info(name) for name in names], Request(4, Options(organization="moqe"))).decisions
    assert [stored(d) for d in decisions] == [None, "q4k", None, None, None]
    assert decisions[0].reason == "organization moqe: not a routed expert"


def test_moqe_needs_experts() -> None:
    with pytest.raises(ValueError, match="organization='moqe' quantizes routed experts only"):
        one(info("x"), 4, organization="moqe")
    with pytest.raises(ValueError, match="organization='moqe'"):
        one(info("x.experts.0.up", keep="joined later"), 4, organization="moqe")


def test_topology_overrides_promotion() -> None:
    head = info("lm_head", role="head")
    assert stored(one(head, 4, topology={"/lm_head/": 4})) == "q4k"
    assert stored(one(head, 4, topology={"/lm_head/": None})) is None
    assert one(head, 4, topology={"/lm_head/": None}).reason == "topology entry '/lm_head/' leaves it"
    device_only = one(head, 4, topology={"/lm_head/": {"device": "cpu"}})
    assert stored(device_only) == "q6k" and device_only.device == torch.device("cpu")


def test_topology_without_a_default_takes_only_what_it_names() -> None:
    layers = [info("layers.0.up"), info("layers.1.up")]
    decisions = decide(layers, Request(None, Options(topology={"1": "q5k"}))).decisions
    assert [stored(d) for d in decisions] == [None, "q5k"]
    assert decisions[0].reason == "not in the topology, and there is no default format"
    assert decisions[0].requested is None


def test_topology_formats_fall_back_too() -> None:
    decision = one(info("layers.0.up", columns=288), 8, topology={"0": "q4k"})
    assert (decision.requested, stored(decision)) == ("q4k", "q5_0")


# ---- tied weights ----------------------------------------------------------------------------------------------------


def tied_pair() -> list[LayerInfo]:
    table = info("embed_tokens", kind="embedding", role="embedding")
    return [table, replace(info("lm_head", role="head"), tied_to="embed_tokens")]


def test_tied_layers_get_one_format() -> None:
    decisions = decide(tied_pair(), Request("q4k")).decisions
    assert [stored(d) for d in decisions] == ["q6k", "q6k"]
    assert decisions[0].reason == "embedding: promoted from q4k to q6k"
    assert decisions[1].reason == "shares the weight of embed_tokens"


def test_one_that_must_stay_keeps_the_other() -> None:
    decisions = decide(tied_pair(), Request("q4k", Options(exclude=["lm_head"]))).decisions
    assert [stored(d) for d in decisions] == [None, None]
    assert decisions[0].reason == "as lm_head, which shares the weight: excluded by 'lm_head'"


def test_a_topology_entry_for_one_decides_for_both() -> None:
    decisions = decide(tied_pair(), Request("q4k", Options(topology={"/lm_head/": "q5k"}))).decisions
    assert [stored(d) for d in decisions] == ["q5k", "q5k"]
    assert decisions[0].reason == "as lm_head, which shares the weight"
    only = decide(tied_pair(), Request(None, Options(topology={"/lm_head/": "q5k"}))).decisions
    assert [stored(d) for d in only] == ["q5k", "q5k"]


def test_two_entries_for_one_weight_are_an_error() -> None:
    with pytest.raises(
        ValueError, match="embed_tokens and lm_head share one weight, but the topology gives them q4k and q5k"
    ):
        decide(tied_pair(), Request("q4k", Options(topology={"/lm_head/": "q5k", "/embed/": "q4k"})))
