"""llama.cpp's mixes: which matrix gets which format, against its rules written out; and where a mix is accepted."""

from __future__ import annotations

import pytest
import torch
from models import state_bytes, tiny_gpt2, tiny_llama

import isqtorch
from isqtorch.formats import mix_name
from isqtorch.policy.decide import decide
from isqtorch.policy.layers import LayerInfo
from isqtorch.policy.mixes import MIXES
from isqtorch.policy.request import Request

MORE_OF_32 = {0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31}  # i < 4, i >= 28, and every third between
ALL = set(range(32))


def llama(blocks: int = 32, gqa: int = 1, experts: int = 0, tied: bool = False, fused: bool = False) -> list[LayerInfo]:
    """The layers of a Llama-like model; `experts` makes stacks of them."""

    def layer(name: str, *shape: int, **more) -> LayerInfo:
        kind = more.pop("kind", "experts" if len(shape) == 3 else "linear")
        return LayerInfo(name, kind, shape, torch.bfloat16, **more)

    layers = [layer("model.embed_tokens", 1024, 512, kind="embedding", role="embedding")]
    for i in range(blocks):
        path = f"model.layers.{i}"
        if fused:
            layers.append(layer(f"{path}.self_attn.qkv_proj", 512 + 1024 // gqa, 512))
        else:
            layers.append(layer(f"{path}.self_attn.q_proj", 512, 512))
            layers += [layer(f"{path}.self_attn.{leaf}_proj", 512 // gqa, 512) for leaf in "kv"]
        layers.append(layer(f"{path}.self_attn.o_proj", 512, 512))
        if experts:
            layers.append(layer(f"{path}.mlp.experts.gate_up_proj", experts, 2048, 512, block=f"{path}.mlp.experts"))
            layers.append(layer(f"{path}.mlp.experts.down_proj", experts, 512, 1024, block=f"{path}.mlp.experts"))
        else:
            layers += [layer(f"{path}.mlp.{leaf}_proj", 1024, 512) for leaf in ("gate", "up")]
            layers.append(layer(f"{path}.mlp.down_proj", 512, 1024))
    tie = {"tied_to": "model.embed_tokens"} if tied else {}
    return [*layers, layer("lm_head", 1024, 512, role="head", **tie)]


def chosen(layers: list[LayerInfo], mix: str) -> dict[str, dict[int, str]]:
    """{leaf: {block: format}} of the blocks, and {name: {0: format}} of the rest."""
    out: dict[str, dict[int, str]] = {}
    for decision in decide(layers, Request(mix)).decisions:
        parts = decision.name.split(".")
        assert decision.format is not None and not decision.promoted and not decision.fell_back
        leaf, block = (parts[-1], int(parts[2])) if "layers" in parts else (decision.name, 0)
        out.setdefault(leaf, {})[block] = decision.format.name
    return out


def per_block(fmt: str, **others: set[int]) -> dict[int, str]:
    return {i: next((name for name, blocks in others.items() if i in blocks), fmt) for i in ALL}


# mix -> formats of (v_proj, v_proj where 4 query heads share it, down_proj, o_proj)
TABLE = {
    "q2k_m": (per_block("q3k"), per_block("q4k"), per_block("q3k"), per_block("q3k")),
    "q2k_s": (per_block("q2k"), per_block("q4k"), per_block("q2k", q4k={0, 1, 2, 3}), per_block("q2k")),
    "q3k_s": (per_block("q3k"), per_block("q3k"), per_block("q3k"), per_block("q3k")),
    "q3k_m": (
        per_block("q4k", q5k={0, 1}),
        per_block("q4k", q5k={0, 1}),
        per_block("q4k", q5k={0, 1}),
        per_block("q4k"),
    ),
    "q3k_l": (per_block("q5k"), per_block("q5k"), per_block("q5k"), per_block("q5k")),
    "q4k_s": (per_block("q4k", q5k={0, 1, 2, 3}),) * 2 + (per_block("q4k", q5k={0, 1, 2, 3}), per_block("q4k")),
    "q4k_m": (per_block("q4k", q6k=MORE_OF_32),) * 3 + (per_block("q4k"),),
    "q5k_s": (per_block("q5k"),) * 4,
    "q5k_m": (per_block("q5k", q6k=MORE_OF_32),) * 3 + (per_block("q5k"),),
}
EIGHT_EXPERTS_OUTPUT = {"q2k_m": "q5k", "q3k_s": "q5k", "q3k_m": "q5k", "q4k_s": "q5k", "q4k_m": "q5k"}


@pytest.mark.parametrize("mix", MIXES)
def test_a_mix_is_llama_cpps(mix: str) -> None:
    base = MIXES[mix].base
    value, shared_value, down, output = TABLE[mix]
    for gqa, want in ((1, value), (4, shared_value)):
        got = chosen(llama(gqa=gqa), mix)
        assert got["v_proj"] == want and got["down_proj"] == down and got["o_proj"] == output, gqa
        assert all(got[leaf] == per_block(base) for leaf in ("q_proj", "k_proj", "gate_proj", "up_proj"))
        assert got["model.embed_tokens"][0] == base and got["lm_head"][0] == "q6k"


@pytest.mark.parametrize("mix", MIXES)
def test_eight_experts_have_rules_of_their_own(mix: str) -> None:
    base = MIXES[mix].base
    got = chosen(llama(gqa=4, experts=8), mix)
    assert got["k_proj"] == got["v_proj"] == per_block("q8_0")
    assert got["o_proj"] == per_block(EIGHT_EXPERTS_OUTPUT.get(mix, base))
    assert got["gate_up_proj"] == per_block(base) and got["down_proj"] == TABLE[mix][2]
    many = chosen(llama(gqa=4, experts=16), mix)
    assert many["v_proj"] == TABLE[mix][1] and many["o_proj"] == TABLE[mix][3]


def test_listed_experts_count_like_stacks() -> None:
    layers = llama(blocks=2)
    layers += [
        LayerInfo(f"model.layers.{i}.mlp.experts.{e}.{leaf}", "linear", (512, 512), torch.bfloat16)
        for i in range(2)
        for e in range(8)
        for leaf in ("w1", "w2", "w3")
    ]
    assert chosen(layers, "q4k_m")["k_proj"][0] == "q8_0"


def test_a_joint_matrix_of_queries_keys_and_values_counts_as_values() -> None:
    assert chosen(llama(fused=True), "q4k_m")["qkv_proj"] == per_block("q4k", q6k=MORE_OF_32)
    assert chosen(llama(fused=True, gqa=4), "q2k_s")["qkv_proj"] == per_block("q4k")
    assert chosen(llama(fused=True, gqa=2), "q2k_s")["qkv_proj"] == per_block("q2k")


def test_values_of_a_70b() -> None:
    assert set(chosen(llama(blocks=80, gqa=8), "q4k_s")["v_proj"].values()) == {"q5k"}
    assert set(chosen(llama(blocks=80, gqa=8), "q3k_s")["v_proj"].values()) == {"q5k"}
    assert set(chosen(llama(blocks=80, gqa=1), "q3k_s")["v_proj"].values()) == {"q3k"}


def test_a_tied_table_is_an_output() -> None:
    tied = chosen(llama(tied=True), "q2k_s")
    assert tied["model.embed_tokens"][0] == tied["lm_head"][0] == "q6k"
    headless = [layer for layer in llama() if layer.role != "head"]  # the headers of such a checkpoint
    assert chosen(headless, "q2k_s")["model.embed_tokens"][0] == "q6k"


def test_columns_that_do_not_fit_fall_back() -> None:
    report = isqtorch.plan(tiny_llama(hidden=288), "q4k_m")
    assert report["model.layers.1.self_attn.v_proj"].stored == "q8_0"  # from q6k
    assert report["model.layers.0.self_attn.q_proj"].stored == "q5_0"  # from q4k
    assert report["model.layers.1.self_attn.v_proj"].reason.startswith("q4k_m: attn_v; 288 columns")


@pytest.mark.parametrize("spelling", ["q4k_m", "Q4_K_M", "q4_k_m"])
def test_spellings(spelling: str) -> None:
    assert mix_name(spelling) == "q4k_m"


def test_a_topology_overrides_a_mix() -> None:
    report = isqtorch.plan(tiny_llama(), "q4k_m", topology={"/v_proj$/": "q8_0", "/o_proj$/": None})
    assert report["model.layers.0.self_attn.v_proj"].stored == "q8_0"
    assert report["model.layers.0.self_attn.o_proj"].stored is None


@pytest.mark.parametrize("make", [tiny_llama, lambda: tiny_llama(tied=True), tiny_gpt2], ids=["llama", "tied", "gpt2"])
def test_plan_quantize_and_the_saved_topology_agree(make, tmp_path) -> None:
    model, again = make(), make()
    model.save_pretrained(tmp_path)
    planned = isqtorch.plan(tmp_path, "q4k_m")
    report = isqtorch.quantize_(model, "q4k_m", progress=False)
    assert {layer.name: layer.stored for layer in planned.weights} == {
        layer.name: layer.stored for layer in report.weights
    }
    report.topology().save(tmp_path / "layers.yaml")
    isqtorch.quantize_(again, None, topology=tmp_path / "layers.yaml", progress=False)
    assert state_bytes(model) == state_bytes(again)


@pytest.mark.parametrize("name", ["q4k_m", "auto"])
def test_one_weight_takes_no_mix(name: str) -> None:
    with pytest.raises(
        ValueError, match=f"'{name}' is not a format but a rule .* whole model .* use it with quantize_"
    ):
        isqtorch.quantize(torch.zeros(1, 256), name)
    with pytest.raises(ValueError, match="topology: entry '0': .* is not a format but a rule"):
        isqtorch.plan(tiny_llama(), 4, topology={0: name})
