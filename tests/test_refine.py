"""refine_: what it changes and what not, what it learns from, what it keeps, and its messages."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import state_bytes, stored, tiny_bert, tiny_gpt2, tiny_llama, tiny_moe
from refine_cases import OTHERS, WINDOWS, divergence, models, moved, plant, refine
from torch import nn

import isqtorch
from isqtorch.cli import main
from isqtorch.formats import formats, get_format
from isqtorch.formats.tunable import tunable_parts, untunable
from isqtorch.inplace import targets
from isqtorch.inplace.tuning import Scales

transformers = pytest.importorskip("transformers")

DEMO = Path(__file__).resolve().parent.parent / "examples/demo_model"
MODEL = str(DEMO / "model")
TUNABLE = [name for name in formats() if untunable(get_format(name)) is None]


@pytest.fixture(autouse=True)
def all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random models find all tokens alike, so none may be merged."""
    monkeypatch.setattr(targets, "TOKENS", 512)


# ---- what it buys, and what it leaves alone --------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["afq3", "q4_0", "hqq4", "q2k"])
def test_it_lowers_the_divergence_on_text_that_it_has_not_seen(fmt: str) -> None:
    teacher, packed = models(fmt)
    before = divergence(packed, teacher, OTHERS)
    found = refine(packed, teacher, steps=24)
    after = divergence(packed, teacher, OTHERS)
    print(f"{fmt}: {before:.5f} -> {after:.5f}; held out {found.before:.5f} -> {found.after:.5f}")
    assert after < 0.65 * before
    assert found.kept > 0
    assert found.after < found.before


@pytest.mark.parametrize("fmt", ["afq3", "q4_1", "q4k", "iq4_nl"])
def test_it_changes_only_scales_and_offsets(fmt: str) -> None:
    teacher, packed = models(fmt, exclude=["embed"])
    before = {name: value.clone() for name, value in packed.state_dict().items()}
    found = refine(packed, teacher)
    after = packed.state_dict()
    changed = {name for name in before if "norm" not in name and not torch.equal(before[name], after[name])}
    layers = {f"{name}.weight": m for name, m in packed.named_modules() if isinstance(m, isqtorch.QuantLinear)}
    assert changed
    assert changed <= set(layers)
    assert found.layers == len(layers)
    for name in changed:
        form = get_format(layers[name].format)
        moved = {part.name for part in tunable_parts(form) if part is not None}
        old, new = (form.unpack(each[name].view(-1, form.block_bytes)) for each in (before, after))
        assert {field for field in old if not torch.equal(old[field], new[field])} <= moved
        assert form.fault(after[name].view(-1, form.block_bytes)) is None
        ratio = new[form.parts[0].name].float() if form.parts[0].name in moved else None
        assert ratio is None or bool(torch.isfinite(ratio).all())


def test_the_result_is_that_of_the_bytes() -> None:
    """A model that loads the bytes has the divergence that the report gives: nothing that was not rounded is left."""
    teacher, packed = models()
    found = refine(packed, teacher)
    other = copy.deepcopy(teacher)
    isqtorch.quantize_(other, "afq3", progress=False)
    other.load_state_dict(packed.state_dict())
    assert divergence(other, teacher, WINDOWS[7::8]) == pytest.approx(found.after, rel=0.02)
    assert all("forward" not in vars(module) for module in packed.modules())


def test_small_changes_add_up_and_stored_scales_are_rounded() -> None:
    fmt = get_format("afq4")
    packed = isqtorch.quantize(torch.randn(8, 64), fmt).data
    scales = Scales(packed, fmt)
    before = packed.clone()
    for step in range(8):
        for change in scales.changes:
            change.data += 1e-3  # bf16 has steps of 4e-3 to 8e-3
        scales.write()
        if not step:
            assert torch.equal(packed[:, 4:], before[:, 4:])
    assert not torch.equal(packed, before)
    scales.put_back([before.view(-1, fmt.block_bytes)[:, 0:2], before.view(-1, fmt.block_bytes)[:, 2:4]])
    assert torch.equal(packed, before)


@pytest.mark.parametrize("name", TUNABLE)
def test_gradients(name: str) -> None:
    """Against differences, in each format: in the input, the scales and the offsets."""
    fmt = get_format(name)
    weight = torch.randn(3, 2 * fmt.block) + 0.3
    scales = Scales(isqtorch.quantize(weight, fmt).data, fmt)
    x, dy = torch.randn(2, 5, weight.shape[1], requires_grad=True), torch.randn(2, 5, 3)
    y = scales.product(x, torch.ones(3))
    y.backward(dy)
    w = torch.ops.isqtorch.dequantize(scales.packed, name, torch.float32)
    torch.testing.assert_close(x.grad, dy @ w)
    slope = dy.flatten(0, 1).t().double() @ x.detach().flatten(0, 1).double()  # in the weight
    for which, change in enumerate(scales.changes):
        assert change.grad is not None
        for block in (0, len(change) - 1):
            up, down = moved(scales, which, block, 1e-2), moved(scales, which, block, -1e-2)
            want = float(((up - down) * slope).sum()) / 2e-2
            assert float(change.grad[block]) == pytest.approx(want, rel=2e-3, abs=1e-3 * float(slope.norm() * w.norm()))


def test_formats_that_cannot_be_tuned() -> None:
    assert set(formats()) - set(TUNABLE) == {"mxfp4", "q8_1"}
    teacher, packed = models("mxfp4", topology={"1": "q4_0"}, exclude=["lm_head"])
    found = refine(packed, teacher, steps=2)
    assert found.left["model.layers.0.mlp.up_proj"] == "mxfp4: its scales are powers of two"
    assert found.layers == 7
    assert "mxfp4: its scales are powers of two" in str(found)


# ---- what it learns from, and what it keeps --------------------------------------------------------------------------


def test_it_never_learns_from_windows_that_choose_the_step() -> None:
    teacher, packed = models()
    learned: set[tuple[int, ...]] = set()
    judged: set[tuple[int, ...]] = set()

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows = args[0] if args else kwargs["input_ids"]
        (learned if torch.is_grad_enabled() else judged).update(map(tuple, rows.tolist()))

    handle = packed.register_forward_pre_hook(watch, with_kwargs=True)
    found = refine(packed, teacher)
    handle.remove()
    assert judged == set(map(tuple, WINDOWS[7::8].tolist()))
    assert learned == set(map(tuple, WINDOWS.tolist())) - judged
    assert (found.tokens, found.held_tokens) == (21 * 32, 3 * 32)


def test_it_is_never_worse() -> None:
    """Steps that are far too large do harm, and the beginning is kept."""
    teacher, packed = models("q8_0", planted=1.0)
    before = state_bytes(packed)
    found = refine(packed, teacher, learning_rate=0.1, steps=4)
    assert found.kept == 0
    assert found.after == found.before
    assert state_bytes(packed) == before
    assert "no step was better" in str(found)


def test_an_interrupted_model_has_the_best_scales() -> None:
    teacher, packed = models()
    packed.train()
    full = copy.deepcopy(packed)
    wanted = refine(full, teacher, steps=16)
    calls = 0

    def stop(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal calls
        calls += torch.is_grad_enabled()
        if calls > 15:
            raise KeyboardInterrupt

    handle = packed.register_forward_pre_hook(stop, with_kwargs=True)
    with pytest.raises(KeyboardInterrupt):
        refine(packed, teacher, steps=16)
    handle.remove()
    held = WINDOWS[7::8]
    assert wanted.after < divergence(packed, teacher, held) * 1.02
    assert divergence(packed, teacher, held) < 0.999 * wanted.before
    assert packed.training
    assert all("forward" not in vars(module) for module in packed.modules())
    assert packed.model.norm.weight.requires_grad
    assert all(parameter.grad is None for parameter in packed.parameters())


def test_norms() -> None:
    """A norm that was changed comes closer again; without `norms` it stays."""
    teacher, packed = models("q8_0", planted=1.0)
    with torch.no_grad():
        packed.model.layers[0].input_layernorm.weight *= 1.2
    packed.model.norm.weight.grad = torch.ones(256)
    packed.model.norm.weight.requires_grad_(False)
    other = copy.deepcopy(packed)
    found = refine(packed, teacher, steps=24, learning_rate=2e-2)
    assert found.norms == 5
    assert found.after < 0.75 * found.before
    assert float(packed.model.layers[0].input_layernorm.weight.detach().mean()) < 1.195
    assert not packed.model.norm.weight.requires_grad
    assert torch.equal(packed.model.norm.weight.grad, torch.ones(256))
    before = {name: value.clone() for name, value in other.named_parameters() if "norm" in name}
    assert refine(other, teacher, norms=False).norms == 0
    assert all(torch.equal(other.get_parameter(name), value) for name, value in before.items())


def test_a_seed_gives_the_same_bytes() -> None:
    teacher, packed = models()
    found = [copy.deepcopy(packed) for _ in range(3)]
    state = torch.get_rng_state()
    for model, seed in zip(found, (3, 3, 4), strict=True):
        refine(model, teacher, steps=4, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    assert state_bytes(found[0]) == state_bytes(found[1]) != state_bytes(found[2])


# ---- kinds of models -------------------------------------------------------------------------------------------------


def test_a_tied_head_stays() -> None:
    teacher = tiny_llama(tied=True, dtype=torch.float32)
    packed = copy.deepcopy(teacher)
    isqtorch.quantize_(packed, "q4_0", progress=False)
    table = packed.lm_head.weight.plain.clone()
    found = refine(packed, teacher, steps=2)
    assert torch.equal(packed.lm_head.weight.plain, table)
    assert found.left["lm_head"] == "it shares the table of an embedding"
    assert found.layers == 14


def test_layers_that_share_a_weight_are_tuned_together() -> None:
    teacher = tiny_llama(dtype=torch.float32)
    first, second = (layer.mlp.up_proj for layer in teacher.model.layers)
    second.weight = first.weight
    packed = copy.deepcopy(teacher)
    isqtorch.quantize_(packed, "afq3", progress=False)
    found = refine(packed, teacher)
    assert found.layers == 14  # of 15 linear layers
    ups = [layer.mlp.up_proj.weight.plain for layer in packed.model.layers]
    assert ups[0].data_ptr() == ups[1].data_ptr()
    assert found.after < found.before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_types(dtype: torch.dtype) -> None:
    teacher, packed = models()
    found = refine(packed.to(dtype), teacher, steps=24)
    assert found.after < found.before


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_moe])
def test_other_models(make: Any) -> None:
    teacher, packed = models("afq3", make)
    windows = WINDOWS % 60
    found = refine(packed, teacher, text=windows)
    assert found.after < found.before
    if make is tiny_moe:
        assert any("experts" in name for name in found.left)


# ---- the float model from a checkpoint -------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_moe])
def test_the_float_model_from_its_files(make: Any, tmp_path: Path) -> None:
    """It gives the same bytes as the float model itself, whose weights are not in memory."""
    teacher, packed = models("afq3", make)
    stored(teacher, tmp_path)
    other = copy.deepcopy(packed)
    text = WINDOWS % 60
    a, b = refine(packed, teacher, text=text, steps=3, batch=8), refine(other, tmp_path, text=text, steps=3, batch=8)
    assert a.before == pytest.approx(b.before, rel=1e-3)
    assert a.after == pytest.approx(b.after, rel=1e-2)
    assert str(tmp_path) in str(b)


def test_the_remembered_checkpoint_and_requantizing(tmp_path: Path) -> None:
    """The float weights are found as by requantize_, and a refined model can be packed anew from them."""
    tiny_llama().save_pretrained(tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(tmp_path, quantization_config=isqtorch.IsqConfig("afq3"))
    plant(model, 1.3)
    found = refine(model, None, steps=8)
    assert found.kept
    assert refine(model, None, steps=2).before == pytest.approx(found.after, rel=1e-3)  # the same float model again
    model = copy.deepcopy(model)
    report = isqtorch.requantize_(model, "q4_0", progress=False)
    assert any("5 norms that refine_ tuned have their values from before" in note for note in report.notes)
    fresh = load(tmp_path, quantization_config=isqtorch.IsqConfig("q4_0"))
    assert state_bytes(model) == state_bytes(fresh)


def test_a_refined_model_is_saved_and_loaded(tmp_path: Path) -> None:
    teacher, packed = models()
    refine(packed, teacher, steps=8)
    packed.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert state_bytes(again) == state_bytes(packed)
    file = tmp_path / "model.safetensors"
    before = file.read_bytes()
    assert refine(again, teacher, steps=8).kept  # also where the weights are pages of a file
    assert file.read_bytes() == before


# ---- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": None}, "needs a text to learn from"),
        ({"text": "some words"}, "a text needs tokenizer="),
        ({"text": WINDOWS[0, :12]}, "12 tokens are too few"),
        ({"text": WINDOWS + 490}, "the model knows 0 to 511. Use the model's own tokenizer"),
        ({"steps": 0}, "steps must be an integer of 1 or more, got 0"),
        ({"steps": 2.5}, "steps must be an integer"),
        ({"batch": True}, "batch must be an integer of 1 or more, got True"),
        ({"learning_rate": 0.0}, "learning_rate must be a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a number above 0"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    teacher, packed = models()
    before = state_bytes(packed)
    with pytest.raises(ValueError, match=f"refine_: .*({message})"):
        refine(packed, teacher, **options)
    assert state_bytes(packed) == before


def test_bad_models(tmp_path: Path) -> None:
    teacher, packed = models()
    with pytest.raises(ValueError, match="refine_: the model holds no packed layer. Use quantize_ first"):
        refine(teacher, teacher)
    with pytest.raises(ValueError, match="refine_: the teacher is the model itself"):
        refine(packed, packed)
    with pytest.raises(ValueError, match="refine_: teacher='stored' is the model itself"):
        refine(packed, "stored")
    with pytest.raises(ValueError, match=r"refine_: it is not known where .* Give teacher="):
        refine(packed, None)
    with pytest.raises(FileNotFoundError, match="refine_: source: no folder or file"):
        refine(packed, tmp_path / "none")
    with pytest.raises(ValueError, match=r"refine_: the model must return logits|refine_: .*logits"):
        refine(packed, teacher.model)
    with pytest.raises(
        ValueError, match="refine_: no packed layer can be tuned; .*mxfp4: its scales are powers of two"
    ):
        refine(models("mxfp4", exclude=["lm_head", "embed"])[1], teacher)
    with pytest.raises(TypeError, match="refine_"):
        refine("model", teacher)
    with pytest.raises(ValueError, match="refine_: the model is compiled"):
        refine(torch.compile(packed), teacher)
    with pytest.raises(ValueError, match="refine_: no gradient reaches the logits"):
        still = models(exclude=["lm_head"])[1]
        still.model.forward = torch.no_grad()(still.model.forward)
        refine(still, teacher, norms=False)
    broken = copy.deepcopy(teacher)
    with torch.no_grad():
        broken.lm_head.weight[3] = torch.nan
    with pytest.raises(ValueError, match="refine_: the logits of the float model are not finite"):
        refine(packed, broken)
    with pytest.raises(ValueError, match=r"refine_: .*not the same model|refine_: .*logits"):
        bert = tiny_bert()
        isqtorch.quantize_(bert.bert, "q4_0", progress=False)
        refine(bert.bert, teacher)


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--isq", "afq3", "--refine", "3"], "--refine needs a text to learn from"),
        (["--refine", "3", "--calibration", "self"], "--isq"),
        (["--isq", "afq3", "--refine", "0", "--calibration", "self"], "--refine must be 1 or more steps, got 0"),
    ],
)
def test_the_command_checks_first(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", "-m", MODEL, "-o", str(tmp_path / "out"), *words]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text((DEMO / "calibration.txt").read_text(encoding="utf-8")[:8000], encoding="utf-8")
    common = ["quantize", "-m", MODEL, "--isq", "afq3", "--calibration-file", str(text)]
    assert main([*common, "-o", str(tmp_path / "plain")]) == 0
    capsys.readouterr()
    assert main([*common, "-o", str(tmp_path / "refined"), "--refine", "8", "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert any("refined 56 weights and 17 norms" in note for note in notes)
    load = transformers.AutoModelForCausalLM.from_pretrained
    plain, refined = (load(tmp_path / name) for name in ("plain", "refined"))
    assert state_bytes(plain) != state_bytes(refined)
    assert torch.equal(plain.lm_head.weight.plain, refined.lm_head.weight.plain)
