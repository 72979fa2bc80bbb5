"""plan of a checkpoint agrees with what load does, for many classes; without the classes it says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import DEMO, MODELS, written
from models import tiny_llama
from test_load_checkpoints import FORMATS, WRITERS

import isqtorch
from isqtorch.cli import main

ROOT = DEMO.parents[2]


def mamba() -> Any:
    config = transformers.MambaConfig(vocab_size=512, hidden_size=256, num_hidden_layers=2, state_size=16)
    return transformers.MambaForCausalLM(config)


def mamba2() -> Any:
    """config.json holds an infinity, which JSON does not have."""
    config = transformers.Mamba2Config(
        vocab_size=512, hidden_size=256, num_hidden_layers=2, state_size=16, num_heads=8, n_groups=2
    )
    assert config.time_step_limit[1] == float("inf")
    return transformers.Mamba2ForCausalLM(config)


def aria() -> Any:
    config = transformers.AriaTextConfig(
        vocab_size=512, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, moe_num_experts=8, moe_topk=2, moe_num_shared_experts=1, pad_token_id=0,
    )  # fmt: skip
    return transformers.AriaTextForCausalLM(config)


def marian() -> Any:
    """The files lack the tables of positions, which are computed."""
    config = transformers.MarianConfig(
        vocab_size=512, d_model=256, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=256, decoder_ffn_dim=256, max_position_embeddings=512,
        pad_token_id=511, decoder_start_token_id=511,
    )  # fmt: skip
    return transformers.MarianMTModel(config)


def siglip_text() -> Any:
    """A part of a model, which no Auto class has."""
    config = transformers.SiglipTextConfig(
        vocab_size=512, hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4
    )
    return transformers.SiglipTextModel(config)


OTHERS = {build.__name__: build for build in (mamba, mamba2, aria, marian, siglip_text)}


def facts(report: isqtorch.QuantReport) -> Any:
    layers = [(layer.name, layer.shape, layer.stored, layer.reason, layer.bytes_after) for layer in report.layers]
    return layers, report.bytes_before, report.bytes_after, report.numel


@pytest.mark.parametrize("name", [*MODELS, *OTHERS])
def test_the_plan_is_the_report(name: str, tmp_path: Path) -> None:
    if name in MODELS:
        written(name, tmp_path)
    else:
        OTHERS[name]().to(torch.bfloat16).save_pretrained(tmp_path)
    planned = isqtorch.plan(tmp_path, "q4k")
    assert planned.planned and not planned.notes
    assert facts(planned) == facts(isqtorch.load(tmp_path, "q4k", progress=False).report)


@pytest.mark.parametrize("kind", list(WRITERS))
def test_the_plan_of_another_programs_file_is_the_report(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = WRITERS[kind](tmp_path / "demo")
    for fmt in ("q8_0", FORMATS[kind]):
        planned = isqtorch.plan(folder, fmt)
        assert facts(planned) == facts(isqtorch.load(folder, fmt, progress=False).report)
        assert any(f"what is packed anew is made of decoded {kind.upper()} weights" in note for note in planned.notes)
    assert main(["plan", "-m", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes_now"] == isqtorch.load(folder).report.bytes_after and found["cache_bytes"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"hidden_size": 512}, "its config.json does not fit its tensors"),
        ({"num_hidden_layers": 3}, "its config.json does not fit its tensors"),
        ({"num_hidden_layers": 10**9}, "more layers than a model has"),
        ({"model_type": "poetry"}, "transformers has no model_type 'poetry'"),
        ({"architectures": ["LlamaForPoetry"]}, "no model can be made of its config.json"),
        ({"num_attention_heads": "four"}, "no model can be made of its config.json"),
    ],
)
def test_where_no_model_can_be_made_the_note_says_why(change: dict[str, Any], why: str, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    report = isqtorch.plan(tmp_path, "q4k")
    assert any("without the rules that need the model's classes" in note and why in note for note in report.notes)
    path.unlink()
    assert facts(report)[1:3] == facts(isqtorch.plan(tmp_path, "q4k"))[1:3]


def test_without_transformers_the_note_says_what_to_install(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    code = (
        "import sys; import importlib.util as u; sys.modules['transformers'] = None\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'transformers' else find(name, *a)\n"
        f"import isqtorch; print(isqtorch.plan({str(tmp_path)!r}, 4).notes)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120, check=False
    )
    assert "transformers is not installed (pip install 'isqtorch[hf]')" in done.stdout, done.stderr[-500:]
