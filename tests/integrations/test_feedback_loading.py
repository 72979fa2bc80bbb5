"""rule="feedback" with IsqConfig, load and the commands."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import state_bytes, tiny_gpt2, tiny_llama, tiny_moe
from torch import nn

import isqtorch

transformers = pytest.importorskip("transformers")

DEMO = Path(__file__).resolve().parents[2] / "examples/demo_model"


def saved(make: Callable[[], Any], folder: Path) -> tuple[Any, isqtorch.Moments]:
    """A model, also as a checkpoint, and its moments."""
    model = make()
    model.save_pretrained(folder)
    ids = torch.randint(1, 60, (1500,), generator=torch.Generator().manual_seed(0))
    return model, isqtorch.collect_moments(model, ids, chunk=60, progress=False)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_moe], ids=["llama", "gpt2", "moe"])
@pytest.mark.parametrize("fmt", ["q4_0", "afq4"])
def test_packing_while_loading_gives_the_same_bytes(make: Any, fmt: str, tmp_path: Path) -> None:
    model, moments = saved(make, tmp_path / "model")
    moments.save(tmp_path / "x.safetensors")
    config = isqtorch.IsqConfig(fmt, rule="feedback", imatrix=tmp_path / "x.safetensors")
    loaded = type(model).from_pretrained(tmp_path / "model", quantization_config=config)
    report = isqtorch.quantize_(model, fmt, rule="feedback", imatrix=moments, progress=False)
    assert state_bytes(loaded) == state_bytes(model)
    outcomes = {layer.name: layer.feedback for layer in loaded.isq_report.layers if layer.feedback is not None}
    assert outcomes and outcomes.keys() == {layer.name for layer in report.layers if layer.feedback is not None}
    for name, outcome in outcomes.items():
        assert outcome.share == report[name].feedback.share
        assert outcome.feedback == pytest.approx(report[name].feedback.feedback, rel=1e-4)
    assert any(note.startswith("feedback: ") for note in loaded.isq_report.notes)
    loaded.save_pretrained(tmp_path / "packed")
    entry = transformers.AutoConfig.from_pretrained(tmp_path / "packed").quantization_config
    assert entry["rule"] == "feedback" and entry["imatrix"] == "x.safetensors"
    again = type(model).from_pretrained(tmp_path / "packed")
    assert state_bytes(again) == state_bytes(model)


def test_auto_while_loading(tmp_path: Path) -> None:
    model, moments = saved(tiny_moe, tmp_path / "model")
    options = {"rule": "feedback", "imatrix": moments, "target_bpw": 12, "formats": ["q4_0", "q8_0"]}
    loaded = type(model).from_pretrained(
        tmp_path / "model", quantization_config=isqtorch.IsqConfig("auto", **options), dtype=torch.float32
    )
    isqtorch.quantize_(model, "auto", progress=False, **options)
    assert state_bytes(loaded) == state_bytes(model)


def test_without_moments(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    config = isqtorch.IsqConfig(4, rule="feedback")
    with pytest.raises(ValueError, match="rule='feedback' needs second moments"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)


def test_moments_are_not_copied_with_the_configuration(tmp_path: Path) -> None:
    """transformers copies configurations, and moments may be larger than the model."""
    _, moments = saved(tiny_llama, tmp_path)
    assert copy.deepcopy(isqtorch.IsqConfig(4, rule="feedback", imatrix=moments)).options.imatrix is moments


def test_load_collects_and_packs(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text((DEMO / "calibration.txt").read_text(encoding="utf-8")[:9000])
    options = {"rule": "feedback", "calibration_file": text, "include": r"layers\.0\.", "progress": False}
    model, tokenizer, report = isqtorch.load(DEMO / "model", "q4_0", max_memory="1MB", **options)
    assert any("moments collected in" in note for note in report.notes)
    twin = isqtorch.load(DEMO / "model").model
    isqtorch.quantize_(twin, "q4_0", tokenizer=tokenizer, **options)
    assert state_bytes(twin) == state_bytes(model)


# ---- layer by layer --------------------------------------------------------------------------------------------------


class Words:
    """A tokenizer of one token per character."""

    def encode(self, text: str) -> list[int]:
        return [1 + ord(letter) % 60 for letter in text]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    generator = torch.Generator().manual_seed(0)
    path.write_text("".join(chr(97 + int(i)) for i in torch.randint(0, 26, (800,), generator=generator)))
    return path


def tied_llama() -> Any:
    return tiny_llama(tied=True)


@pytest.mark.parametrize("make", [tiny_llama, tied_llama, tiny_gpt2, tiny_moe])
def test_streaming_gives_what_quantize_gives(make: Any, text: Path, tmp_path: Path) -> None:
    """Heads, too: one that shares the table of the embedding, and another one."""
    make().save_pretrained(tmp_path / "model")
    options = {"rule": "feedback", "calibration_file": text, "tokenizer": Words()}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", quantization_config=isqtorch.IsqConfig("q4_0", **options)
    )
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=model.dtype)
    report = isqtorch.quantize_(twin, "q4_0", progress=False, **options)
    assert state_bytes(model) == state_bytes(twin)
    for layer in model.isq_report.layers:
        assert layer.stored == report[layer.name].stored
        assert (layer.feedback is None) == (report[layer.name].feedback is None), layer.name
    assert any("moments collected layer by layer while loading" in note for note in model.isq_report.notes)
    model.save_pretrained(tmp_path / "packed")
    assert "tokenizer" not in transformers.AutoConfig.from_pretrained(tmp_path / "packed").quantization_config


def test_a_model_that_cannot_run_layer_by_layer(text: Path, tmp_path: Path) -> None:
    """The encoder is another list of layers, and only the decoder's would be fed."""
    config = transformers.T5Config(
        vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "model")
    options = {"rule": "feedback", "calibration_file": text, "tokenizer": Words()}
    with pytest.raises(ValueError, match="is outside of the layers"):
        type(model).from_pretrained(tmp_path / "model", quantization_config=isqtorch.IsqConfig("q4_0", **options))


class Skipping(nn.Module):
    """Stands in for a decoder, whose layers are called as `how` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.embed = nn.Embedding(64, 32)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, input_ids: Any) -> Any:
        x = self.embed(input_ids)
        for number, layer in enumerate(self.layers):
            if self.how == "skips" and number == 1 and bool(input_ids[0, 0] % 2):
                continue
            if self.how == "changes":
                x = x + 1
            x = layer(x, x.mean()) if self.how == "differs" else layer(x)
            x = x[0] if self.how == "tuple" else x
        return x


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("", None),
        ("tuple", None),
        ("changes", "changes the hidden states between"),
        ("skips", "do not follow each other|in another way"),
        ("differs", "in another way for each window"),
    ],
)
def test_what_runs_layer_by_layer(how: str, message: str | None) -> None:
    from isqtorch.importance.windows import Windows
    from isqtorch.inplace.streaming import Misfit, _captured

    model = Skipping(how)
    windows = Windows(torch.arange(44).view(4, 11), "ids")
    before = [dict(vars(layer)) for layer in model.layers]
    if message is None:
        hidden, calls = _captured(model, model.layers, windows)
        assert len(hidden) == 4 and len(calls) == 3
        assert torch.equal(hidden[2], model.embed(windows.ids[2:3]))
    else:
        with pytest.raises(Misfit, match=message):
            _captured(model, model.layers, windows)
    assert [dict(vars(layer)) for layer in model.layers] == before


def test_load_streams_or_falls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from isqtorch.inplace import streaming

    text = tmp_path / "text.txt"
    text.write_text((DEMO / "calibration.txt").read_text(encoding="utf-8")[:9000])
    options = {"rule": "feedback", "calibration_file": text, "include": r"layers\.0\.", "progress": False}
    loaded = isqtorch.load(DEMO / "model", "q4_0", **options)
    assert any("layer by layer while loading" in note for note in loaded.report.notes)
    twin = isqtorch.load(DEMO / "model").model
    isqtorch.quantize_(twin, "q4_0", tokenizer=loaded.tokenizer, **options)
    assert state_bytes(twin) == state_bytes(loaded.model)

    def refuse(*_: Any) -> None:
        raise streaming.Misfit("planted")

    monkeypatch.setattr(streaming, "_captured_as", refuse)
    other = isqtorch.load(DEMO / "model", "q4_0", **options)
    assert any("moments collected with weights in q8_0" in note and "planted" in note for note in other.report.notes)
    assert [layer.stored for layer in other.report.layers] == [layer.stored for layer in loaded.report.layers]
    outcomes = [layer.feedback for layer in other.report.layers if layer.feedback is not None]
    assert len(outcomes) == 7 and all(outcome.share == 1 for outcome in outcomes)


def test_neither_the_floats_nor_all_moments_are_in_memory(text: Path, tmp_path: Path) -> None:
    """At a time: the packed model, one layer in floats with its moments, and the hidden states."""
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=16,
        num_attention_heads=8,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config)
    floats = sum(parameter.nbytes for parameter in model.model.layers.parameters())
    model.save_pretrained(tmp_path / "model")
    del model
    layer, moments = floats / 16, 4 * (3 * 512**2 + 1536**2)
    script = Path(__file__).with_name("feedback_memory.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "model"), str(text)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(found, floats, layer, moments)
    assert found["fed"] == 16 * 7 + 2  # the table counts under both of its names
    hidden = 800 * 512 * 4
    # four times the layer and its moments, for what packing needs besides: a factor, errors, both packed forms
    limit = found["size"] + 4 * (layer + moments) + 4 * hidden + 20e6
    assert found["peak_anonymous"] < limit < 0.75 * floats, (found, limit)
