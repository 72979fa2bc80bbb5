"""Second moments: what is in them, first tokens, padding, held-out windows, shared inputs, and passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import mlp, tiny_bert, tiny_gpt2, tiny_llama, tiny_moe
from torch import Tensor, nn

import isqtorch
from isqtorch.importance.collecting import MomentWatch
from isqtorch.importance.inputs import FIRST, LENT, feeds_attention, joint_parts
from isqtorch.importance.passes import Passes, run_windows
from isqtorch.importance.tokens import Tokens
from isqtorch.importance.windows import token_windows

Q = "model.layers.0.self_attn.q_proj"
O = "model.layers.0.self_attn.o_proj"
UP = "model.layers.0.mlp.up_proj"


def recorded(model: nn.Module, *names: str) -> dict[str, list[Tensor]]:
    """Everything that these layers get, kept: the obvious way."""
    inputs: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args: inputs.setdefault(name, []).append(args[0].detach().clone())

    for name in names:
        model.get_submodule(name).register_forward_pre_hook(hook(name))
    return inputs


def calls(model: nn.Module, *batches: dict[str, Any]) -> isqtorch.Moments:
    with isqtorch.calibrate(model, moments=True) as moments, torch.no_grad():
        for batch in batches:
            model(**batch)
    return moments


def matrix(moments: isqtorch.Moments, name: str, columns: int = 256) -> Tensor:
    layer = moments.of(name, columns)
    assert layer is not None
    return layer.matrix()


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


def ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 500, (batch, length), generator=torch.Generator().manual_seed(seed))


# ---- what is summed --------------------------------------------------------------------------------------------------


def test_moments_are_the_mean_of_outer_products() -> None:
    """Of windows that are not held out: the second and the tenth are."""
    model = tiny_llama(dtype=torch.float32)
    inputs = recorded(model, Q, O)
    moments = calls(model, {"input_ids": ids(3, 11)}, {"input_ids": ids(8, 7, 1)})
    for name in (Q, O):
        (first, second), used = inputs[name], []
        for number, window in enumerate([*first, *second]):
            used += [] if number % 8 == 1 else [window]
        rows = torch.cat(used)
        total = rows.t() @ rows
        if name == Q:
            starts = torch.stack([window[0] for window in used])
            total, count = total + FIRST * starts.t() @ starts, len(rows) + FIRST * len(starts)
        else:
            count = len(rows)
        close(matrix(moments, name), total / count)
        close(moments[name], total.diagonal() / count)
        assert moments.counts[name].tolist() == [count]
        layer = moments.of(name, 256)
        assert layer is not None
        held, weights = layer.judges() or (None, None)
        want = torch.cat([first[1], second[6]])
        assert torch.equal(held, want)
        begins = torch.zeros(18)
        begins[[0, 11]] = 1
        assert torch.equal(weights, 1 + FIRST * begins if name == Q else torch.ones(18))


def test_layers_with_the_same_input_share_their_moments() -> None:
    moments = calls(tiny_llama(dtype=torch.float32), {"input_ids": ids(2, 9)})
    prefix = "model.layers.1."
    groups = [("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj"))]
    for module, names in groups:
        assert {moments.readers[f"{prefix}{module}.{name}"] for name in names} == {f"{prefix}{module}.{names[0]}"}
    assert len(moments.inputs) == 9 and len(moments) == 15  # four in each of two layers, and the head
    gpt = calls(tiny_gpt2(), {"input_ids": ids(2, 9)})
    layer = gpt.of("transformer.h.0.attn.c_attn", 256)
    assert layer is not None and layer.weighted and gpt.of("transformer.h.0.mlp.c_fc", 256).weighted is False


def test_an_input_that_is_changed_in_place_or_read_twice() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            y = self.a(x) + self.c(x)
            return y + self.b(x.mul_(2)) + self.b(x)

    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode, isqtorch.calibrate(model := Odd(), moments=True) as moments:
            model(torch.ones(3, 4))
        assert moments["a"].tolist() == moments["c"].tolist() == [1.0] * 4 and moments["b"].tolist() == [4.0] * 4
        assert [int(moments.counts[name]) for name in "abc"] == [3, 6, 3]


def test_a_group_that_falls_apart() -> None:
    """Two layers share an input at first; then one of them gets another one, and has moments of its own from then on."""

    class Parting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.apart = nn.Linear(4, 4), nn.Linear(4, 4), False

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(3 * x if self.apart else x)

    model = Parting()
    with torch.no_grad(), isqtorch.calibrate(model, moments=True) as moments:
        model(torch.ones(2, 4))
        model.apart = True
        model(torch.ones(2, 4))
    assert moments["a"].tolist() == [1.0] * 4 and moments["b"].tolist() == [9.0] * 4
    assert torch.equal(matrix(moments, "b", 4), torch.full((4, 4), 9.0))


# ---- which rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_token_and_never_the_first(side: str) -> None:
    """The same windows, alone and padded together, give the same moments."""
    model = tiny_llama(dtype=torch.float32)
    lengths = (5, 12, 9)
    windows = [ids(1, length, length) for length in lengths]
    alone = calls(model, *({"input_ids": window} for window in windows))
    padded, mask = torch.zeros(3, 12, dtype=torch.int64), torch.zeros(3, 12, dtype=torch.int64)
    for row, (window, length) in enumerate(zip(windows, lengths, strict=True)):
        place = slice(12 - length, 12) if side == "left" else slice(0, length)
        padded[row, place], mask[row, place] = window[0], 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for extra in ({}, {"position_ids": positions}):
        together = calls(model, {"input_ids": padded, "attention_mask": mask, **extra})
        for name in (Q, O, UP):
            if side == "right" or extra:  # else the model itself counts the positions from the padding on
                close(matrix(together, name), matrix(alone, name))
            assert torch.equal(together.counts[name], alone.counts[name])
        first = together.inputs[Q][0].first
        assert first is not None and first.count == 2
        close(first.matrix(), alone.inputs[Q][0].first.matrix())


def test_sequences_packed_into_one_row_have_a_first_token_each() -> None:
    model = tiny_llama(dtype=torch.float32)
    positions = torch.tensor([[*range(5), *range(7)]])
    moments = calls(model, {"input_ids": ids(1, 12), "position_ids": positions}, {"input_ids": ids(1, 4)})
    first = moments.inputs[Q][0].first
    assert first is not None and first.count == 2


def test_a_step_with_a_cache_begins_no_window() -> None:
    model = tiny_llama(dtype=torch.float32)
    with isqtorch.calibrate(model, moments=True) as moments:
        model.generate(ids(1, 6), max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    first, total = moments.inputs[Q][0].first, moments.inputs[Q][0].total
    assert first is not None and first.count == 1 and total.count == 6 + 3


def test_models_without_tokens_count_all_rows_alike() -> None:
    model = mlp()
    x = torch.randn(16, 256)
    with torch.no_grad(), isqtorch.calibrate(model, moments=True) as moments:
        model(x)
    close(matrix(moments, "0"), x[:14].t() @ x[:14] / 14)
    layer = moments.of("0", 256)
    assert layer is not None and torch.equal(layer.judges()[0], x[14:])


def test_which_layers_feed_attention() -> None:
    """By name: there the first token counts more, and nowhere else."""
    yes = (
        "model.layers.0.self_attn.q_proj model.layers.0.self_attn.qkv_proj transformer.h.1.attn.c_attn "
        "gpt_neox.layers.2.attention.query_key_value model.layers.0.self_attn.kv_a_proj_with_mqa "
        "model.layers.0.self_attn.kv_b_proj model.layers.0.self_attn.q_a_proj model.layers.0.self_attn.q_b_proj "
        "bert.encoder.layer.0.attention.self.value model.layers.0.linear_attn.in_proj_qkvz layers.0.attn.Wqkv "
        "decoder.layers.0.encoder_attn.v_proj distilbert.transformer.layer.0.attention.k_lin"
    )
    no = (
        "model.layers.0.self_attn.o_proj model.layers.0.mlp.gate_proj model.layers.0.mlp.down_proj lm_head "
        "transformer.h.0.attn.c_proj rwkv.blocks.0.feed_forward.key model.layers.0.mixer.in_proj "
        "model.layers.0.mlp.experts.0.w1 model.layers.0.linear_attn.in_proj_ba bert.encoder.layer.0.attention.output.dense"
    )
    assert [name for name in yes.split() if not feeds_attention(name)] == []
    assert [name for name in no.split() if feeds_attention(name)] == []


def test_parts_of_joint_matrices() -> None:
    assert joint_parts("model.layers.0.self_attn.qkv_proj", 1536, 1024) == (1024, 256, 256)
    assert joint_parts("transformer.h.0.attn.c_attn", 768, 256) == (256, 256, 256)
    assert joint_parts("gpt_neox.layers.0.attention.query_key_value", 768, 256) == ()  # head by head
    assert joint_parts("model.layers.0.self_attn.q_proj", 768, 256) == ()
    assert joint_parts("a.qkv_proj", 256, 256) == () and joint_parts("a.qkv_proj", 4096, 256) == ()


# ---- experts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_every_expert_has_its_own_moments(family: str, packed: bool) -> None:
    """Their sums add up to what all experts got, and padding is in none of them."""
    model = tiny_moe(family)
    if packed:
        isqtorch.quantize_(model, "q8_0", include="experts")
    name = next(n for n, m in model.named_modules() if "Experts" in type(m).__name__)
    batch, mask = torch.randint(1, 60, (3, 12)), torch.ones(3, 12, dtype=torch.int64)
    mask[0, :4] = 0
    with torch.no_grad(), isqtorch.calibrate(model, moments=True) as moments:
        model(batch, attention_mask=mask)
    for leaf, columns in (("gate_up_proj", 64), ("down_proj", 96)):
        key = f"{name}.{leaf}"
        parts = moments.inputs[key]
        assert len(parts) == 6 and parts[0].total.columns == columns and parts[0].first is None
        assert sum(part.total.count for part in parts) == 2 * (8 + 12)
        assert sum(len(part.held) for part in parts) == 2 * 12
        for part, squares in zip(parts, moments.sums[key], strict=True):
            torch.testing.assert_close(part.matrix(False).diagonal(), squares)


def test_experts_against_a_loop() -> None:
    """The rows of the second product are in another order; held-out tokens must be found there as well."""
    model = tiny_moe()
    name = "model.layers.0.mlp.experts"
    experts, seen = model.get_submodule(name), []
    experts.register_forward_pre_hook(lambda module, args: seen.append((args[0].detach(), args[1])))
    with torch.no_grad(), isqtorch.calibrate(model, moments=True) as moments:
        model(torch.randint(1, 60, (2, 20)))
    (x, routing) = seen[0]
    rows, routing = x.reshape(-1, 64), routing.reshape(40, -1)
    for expert in range(6):
        token = (routing == expert).nonzero()[:, 0]
        inner = experts._apply_gate(rows[token] @ experts.gate_up_proj[expert].t()).detach()
        for leaf, own in (("gate_up_proj", rows[token]), ("down_proj", inner)):
            used, held = own[token < 20], own[token >= 20]  # the second window is held out
            part = moments.inputs[f"{name}.{leaf}"][expert]
            close(part.matrix(False), used.t() @ used)
            assert part.total.count == len(used) and len(part.held) == len(held)
            if len(held):
                got = part.judges(False)[0]
                torch.testing.assert_close(got.sort(0)[0], held.sort(0)[0], rtol=1e-4, atol=1e-5)


def test_an_expert_with_few_tokens_borrows() -> None:
    model = tiny_moe()
    key = "model.layers.0.mlp.experts.gate_up_proj"
    moments = calls(model, {"input_ids": torch.randint(1, 60, (2, 20))})
    layer = moments.of(key, 64, 6)
    assert layer is not None and layer.stacked
    parts = moments.inputs[key]
    pool = sum(part.matrix(False) for part in parts) / sum(part.total.count for part in parts)
    few = next(number for number, part in enumerate(parts) if 0 < part.total.count < 64)
    own = parts[few]
    close(layer.matrix(few), (own.matrix(False) + LENT * pool) / (own.total.count + LENT))
    torch.linalg.cholesky(layer.matrix(few) + 1e-2 * torch.eye(64))
    own.total.count = 64  # enough of its own
    close(layer.matrix(few), own.matrix(False) / 64)


def test_rows_without_a_known_token_are_held_out_one_by_one() -> None:
    """The experts of Llama 4 and JetMoe get rows that are sorted by expert: the last eighth would be that of the last ones."""
    rows = Tokens().rows_of(64, scattered=True)
    assert rows.held.tolist() == list(range(1, 64, 8)) and rows.used is not None and len(rows.used) == 56


def test_the_default_dtype_plays_no_part() -> None:
    """Loaders of models change it."""
    moments = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_llama(dtype=torch.float32)
        torch.set_default_dtype(dtype)
        try:
            with isqtorch.calibrate(model, moments=True) as seen, torch.no_grad():
                model.model.layers[0].mlp(torch.ones(1, 300, 256, dtype=torch.float32))
        finally:
            torch.set_default_dtype(torch.float32)
        moments.append(seen)
    assert torch.equal(matrix(moments[0], UP), matrix(moments[1], UP))
    one, other = (each.of(UP, 256).judges() for each in moments)
    assert torch.equal(one[1], other[1])


# ---- texts and passes ------------------------------------------------------------------------------------------------


def test_a_short_text_is_cut_into_enough_windows() -> None:
    model = tiny_llama(dtype=torch.float32)
    moments = isqtorch.collect_moments(model, torch.arange(100), progress=False)
    assert moments.chunk_count == 8 and moments.chunk_size == 12 and moments.tokens == 7 * 12
    with pytest.raises(ValueError, match="15 tokens are too few"):
        isqtorch.collect_moments(model, torch.arange(15))


def test_passes_give_what_one_pass_gives() -> None:
    model = tiny_llama(dtype=torch.float32, layers=3)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    windows = token_windows(model, ids(1, 1600)[0], None, "test", 100, least=8)
    whole = run_windows(model, MomentWatch(model), windows, False)
    one = Passes(model, windows, names, None, False)
    assert one.count == 1 and isinstance(one.importance(), isqtorch.Moments)
    passes = Passes(model, windows, names, 1_500_000, False)
    assert passes.count > 3
    importance = passes.importance()
    assert not isinstance(importance, isqtorch.Moments) and sorted(importance) == sorted(whole)
    for name in whole:
        close(importance[name], whole[name])
    seen = set()
    for _ in range(2):  # "auto" goes through them twice
        for part in passes.collected():
            assert part.nbytes <= 1_500_000 or len(part.inputs) == 1
            for name in part.readers:
                columns = whole[name].shape[0]
                assert torch.equal(matrix(part, name, columns), matrix(whole, name, columns))
                assert passes.reads(part, [name])
                seen.add(name)
    assert seen == set(names)


def test_what_goes_wrong() -> None:
    model = tiny_bert()
    with pytest.raises(ValueError, match="being calibrated already"), isqtorch.calibrate(model, moments=True):
        isqtorch.collect_moments(model, torch.arange(100))
    with pytest.raises(ValueError, match="no layer of the model ran"), isqtorch.calibrate(model, moments=True):
        pass
    moments = calls(model, {"input_ids": ids(2, 9)})
    name = "bert.encoder.layer.0.attention.self.query"
    with pytest.raises(ValueError, match="needs moments of 1 x 128 columns, the entry has 1 x 256"):
        moments.of(name, 128)
    with pytest.raises(ValueError, match="needs moments of 3 x 256"):
        moments.of(name, 256, 3)
    assert moments.of("nothing", 256) is None
    model = mlp()
    with pytest.raises(ValueError, match="overflowed during calibration"), isqtorch.calibrate(model, moments=True):
        model(torch.full((20, 256), 1e30))


def test_hooks_are_gone_afterwards() -> None:
    model = tiny_moe()
    before = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(RuntimeError, match="traffic"), isqtorch.calibrate(model, moments=True) as moments:
        model(torch.randint(0, 64, (2, 4)))
        raise RuntimeError("traffic")
    moments.refresh()
    assert len(moments) > 0
    for module, old in zip(model.modules(), before, strict=True):
        assert not module._forward_pre_hooks and not module._forward_hooks and vars(module).keys() == old.keys()
