"""calibration="self": the model writes its own calibration text."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import isqtorch
from isqtorch.importance.self_written import draw, write_windows
from isqtorch.importance.windows import token_windows
from tests.models import tiny_llama, tiny_moe


class Tokenizer:
    """Adds BOS 1 before a text, if asked to; 0 to 2 are special."""

    bos_token_id = 1
    all_special_ids = (0, 1, 2)

    def __init__(self, adds_bos: bool) -> None:
        self.adds_bos = adds_bos

    def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * self.adds_bos + [3 + ord(letter) % 90 for letter in text]}

    def __len__(self) -> int:
        return 100


# ---- what is written -------------------------------------------------------------------------------------------------


def test_the_text_is_seeded_and_leaves_the_random_state_alone() -> None:
    model = tiny_llama().train()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = write_windows(model, sequences=5, tokens=12, progress=False)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert one.shape == (5, 12) and one.dtype == torch.int64
    assert torch.equal(one, write_windows(model, sequences=5, tokens=12, progress=False))
    assert not torch.equal(one, write_windows(model, sequences=5, tokens=12, seed=1, progress=False))


@pytest.mark.parametrize("adds_bos", [True, False])
def test_windows_begin_as_texts_do(adds_bos: bool) -> None:
    ids = write_windows(tiny_llama(), Tokenizer(adds_bos), sequences=40, tokens=5, progress=False)
    first = ids[:, int(adds_bos)]
    assert bool((ids[:, 0] == 1).all()) == adds_bos
    assert (
        len(first.unique()) > 10 and int(first.min()) > 2 and int(first.max()) < 100
    )  # no special, no untrained token


def test_an_end_of_text_does_not_end_a_window() -> None:
    model = tiny_llama()
    model.generation_config.eos_token_id = list(range(500))
    ids = write_windows(model, sequences=3, tokens=20, progress=False)
    assert ids.shape == (3, 20) and int(ids[:, 1:].min()) >= 500


def test_the_context_of_the_model_is_the_longest_window() -> None:
    model = tiny_llama()
    model.config.max_position_embeddings = 16
    assert write_windows(model, sequences=2, tokens=50, progress=False).shape == (2, 16)


def test_settings_of_generate_do_not_matter() -> None:
    model = tiny_llama()
    before = write_windows(model, sequences=3, tokens=10, progress=False)
    model.generation_config.update(do_sample=True, top_k=1, temperature=0.1, repetition_penalty=5.0, num_beams=3)
    assert torch.equal(before, write_windows(model, sequences=3, tokens=10, progress=False))


def test_draws_have_the_probabilities_of_the_nucleus() -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.03, 0.01, 0.01])  # the first four hold 98 %
    draws = draw(p.expand(40_000, -1), torch.Generator().manual_seed(0))
    share = torch.bincount(draws, minlength=6) / len(draws)
    assert share[4:].sum() == 0
    torch.testing.assert_close(share[:4], p[:4] / 0.98, atol=0.01, rtol=0)
    certain = torch.zeros(3, 5)
    certain[:, 2] = 1
    assert draw(certain, torch.Generator()).tolist() == [2, 2, 2]


def test_logits_that_are_not_finite() -> None:
    model = tiny_llama()
    nn.init.constant_(model.lm_head.weight, float("inf"))
    with pytest.raises(ValueError, match=r"quantize_: the model's logits are not finite"):
        write_windows(model, op="quantize_", sequences=2, tokens=4, progress=False)


# ---- who can write ---------------------------------------------------------------------------------------------------


def encoder() -> Any:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    )


def speech() -> Any:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return WhisperForConditionalGeneration(
        WhisperConfig(vocab_size=64, d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64, pad_token_id=0, **sizes)
    )


def sentences() -> Any:
    from transformers import BertConfig, BertModel  # the model inside of all-MiniLM

    return BertModel(
        BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    )


def with_encoder() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: nn.Sequential(nn.Linear(64, 64)), "Sequential has no method generate of transformers"),
        (encoder, "BertForMaskedLM has no method generate"),
        (sentences, "BertModel has no method generate"),
        (with_encoder, "T5ForConditionalGeneration has an encoder and cannot begin a text"),
        (speech, "WhisperForConditionalGeneration has an encoder and cannot begin a text"),
    ],
)
def test_who_cannot_write(make: Any, why: str) -> None:
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"quantize_: calibration='self' .*{why}.*: give a text, token ids or an imp"):
        isqtorch.quantize_(model, 4, calibration="self", progress=False)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# ---- in a request ----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of 8 sequences of 16 tokens."""
    import isqtorch.importance.self_written as writing

    monkeypatch.setitem(writing.write_windows.__kwdefaults__, "sequences", 8)
    monkeypatch.setitem(writing.write_windows.__kwdefaults__, "tokens", 16)


def packed(model: nn.Module) -> list[torch.Tensor]:
    return [value for value in model.state_dict().values() if value.dtype == torch.uint8]


def same(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(packed(one), packed(two), strict=True))


def test_quantize_calibrates_on_what_the_model_writes() -> None:
    model = tiny_llama()
    written = write_windows(model, progress=False)
    by_self, by_ids, by_im, without = (copy.deepcopy(model) for _ in range(4))
    report = isqtorch.quantize_(by_self, "q4k", calibration="self", progress=False)
    isqtorch.quantize_(by_ids, "q4k", calibration=written, progress=False)
    im = isqtorch.collect_imatrix(model, progress=False)
    isqtorch.quantize_(by_im, "q4k", imatrix=im, progress=False)
    isqtorch.quantize_(without, "q4k", progress=False)
    assert same(by_self, by_ids) and same(by_self, by_im) and not same(by_self, without)
    said = "text that the model wrote itself (8 sequences of 16 tokens, without a BOS token because no tokenizer was given)"
    assert any(said in note for note in report.notes) and im.datasets == (said,)
    assert im.tokens == 8 * 16


@pytest.mark.parametrize("rule", [None, "feedback"])
@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral"])
def test_experts_that_no_token_reached(family: str, rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All their columns count alike, and the report says where they are. With feedback they have the moments of the layer."""
    import isqtorch.importance.self_written as writing

    monkeypatch.setitem(writing.write_windows.__kwdefaults__, "sequences", 1)
    monkeypatch.setitem(writing.write_windows.__kwdefaults__, "tokens", 2)
    model = tiny_moe(family)
    im = isqtorch.collect_imatrix(model, progress=False)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    alone = int((im.counts[name] == 0).nonzero()[0])
    weight = model.model.layers[0].mlp.experts.gate_up_proj[alone].detach().clone()
    report = isqtorch.quantize_(model, "q4_0", include="experts", rule=rule, calibration="self", progress=False)
    missing = im.unseen[name]
    assert any("saw no token in calibration: all their columns count alike" in note for note in report.notes)
    assert any(f"{name} ({missing} of 6)" in note for note in report.notes), report.notes
    want = torch.ops.isqtorch.quantize(weight, "q4_0", torch.ones(weight.shape[1]), None)
    assert torch.equal(model.model.layers[0].mlp.experts.gate_up_proj.plain[alone], want)


def test_with_a_tokenizer_nothing_is_said_of_bos() -> None:
    report = isqtorch.quantize_(tiny_llama(), "q4k", calibration="self", tokenizer=Tokenizer(True), progress=False)
    assert any("(8 sequences of 16 tokens)" in note for note in report.notes)


def test_requantize_calibrates_on_what_the_packed_model_writes() -> None:
    model = tiny_llama()
    isqtorch.quantize_(model, "q8_0", progress=False)
    report = isqtorch.requantize_(model, "q4k", source="stored", calibration="self", progress=False)
    assert report.imatrix is not None and any("the model wrote itself" in note for note in report.notes)


def test_feedback_takes_it() -> None:
    report = isqtorch.quantize_(tiny_llama(), "q4_0", rule="feedback", calibration="self", progress=False)
    assert any(note.startswith("feedback: ") for note in report.notes)
    moments = isqtorch.collect_moments(tiny_llama(), "self", progress=False)
    assert moments.datasets[0].startswith("text that the model wrote itself")


@pytest.mark.parametrize("probe", [None, "kl"])
def test_auto_measures_on_it_and_the_model_writes_once(probe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    calls = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda *args, **more: calls.append(1) or generate(*args, **more))
    report = isqtorch.quantize_(model, "auto", target_bpw=5, calibration="self", probe=probe, progress=False)
    assert report.choice is not None and report.choice.measure == "kl" and len(calls) == 1
    assert report.bits_per_weight <= 5


def test_auto_with_an_imatrix_uses_the_text_for_its_probe() -> None:
    model = tiny_llama()
    im = isqtorch.collect_imatrix(model, progress=False)
    report = isqtorch.quantize_(model, "auto", target_bpw=5, imatrix=im, calibration="self", progress=False)
    assert report.choice is not None and report.choice.measure == "kl"


def test_a_file_named_self_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("self").write_text("some text " * 40)
    windows = token_windows(tiny_llama(), Path("self"), Tokenizer(False), "x", chunk=10)
    assert windows.dataset == "self" and windows.ids.shape[1] == 10


def test_windows_of_ids_are_read_as_they_are() -> None:
    model = tiny_llama()
    rows = torch.arange(60).view(4, 15)
    assert torch.equal(token_windows(model, rows, Tokenizer(True), "x").ids, rows)
    assert isqtorch.collect_imatrix(model, rows, progress=False).chunk_count == 4
    with pytest.raises(ValueError, match="must be integers"):
        token_windows(model, rows.float(), None, "x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": "self", "calibration_file": "x.txt"}, "give either calibration or calibration_file"),
        ({"calibration": "self", "imatrix": {"lm_head": torch.ones(256)}}, "give either imatrix or calibration_file"),
        ({"calibration": 3.5}, "calibration must be 'self'"),
        ({"calibration": []}, "calibration must be 'self'"),
        ({"calibration": ""}, "calibration is an empty path"),
        ({"calibration": "x.txt"}, "needs tokenizer="),
    ],
)
def test_bad_calibration(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        isqtorch.quantize_(tiny_llama(), "q4k", progress=False, **options)
    with pytest.raises(FileNotFoundError):
        isqtorch.quantize_(tiny_llama(), "q4k", calibration="no.txt", tokenizer=Tokenizer(True), progress=False)
