"""The sweep over all types of models: a sample of it, and what it does with types that fail."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from sweep import building, checks, inputs, known, results, shrink, table
from sweep.checks import Row, check_type
from sweep.children import Limits, run
from sweep.choices import Choices

import isqtorch

SAMPLE = {  # type -> share of the weights that is packed at least
    "llama": 0.99,
    "llama4_text": 0.99,
    "mistral": 0.99,
    "mixtral": 0.99,
    "qwen2": 0.99,
    "qwen2_moe": 0.99,
    "qwen3": 0.99,
    "qwen3_moe": 0.99,
    "qwen3_vl_moe": 0.85,
    "gemma": 0.99,
    "gemma2": 0.99,
    "gemma3": 0.75,
    "gemma3_text": 0.99,
    "gemma4": 0.99,
    "phi": 0.99,
    "phi3": 0.99,
    "phimoe": 0.99,
    "deepseek_v2": 0.99,
    "deepseek_v3": 0.99,
    "gpt_oss": 0.99,
    "glm4": 0.99,
    "glm4_moe": 0.99,
    "mamba": 0.6,
    "whisper": 0.8,
    "t5": 0.85,
    "bert": 0.85,
    # What was wrong in a whole sweep:
    "chinese_clip": 0.6,  # it writes zeros to a row of a loaded table
    "exaone": 0.99,  # only Auto classes read what it saved
    "inkling_text": 0.9,  # shared experts in stacks
    "jetmoe": 0.99,  # its routes are close decisions
    "marian": 0.85,  # its files lack computed tables
    "olmo": 0.99,  # it has no float parameter
}


@pytest.mark.parametrize("kind", SAMPLE)
def test_a_type_passes_every_check(kind: str, tmp_path: Path) -> None:
    row = check_type(kind, tmp_path)
    assert not row.not_built and not row.failures
    assert row.share >= SAMPLE[kind] and 4 < row.bits < 32 and row.cls
    assert row.error is not None and row.bound is not None and 0 < row.error <= row.bound  # the model was called


def test_the_checks_fail_where_something_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each promise is broken once."""
    right = isqtorch.quantize_

    def wrong(model: torch.nn.Module, fmt: str) -> object:
        """Quantize, and change one packed byte of the model; it is small, so no size changes."""
        report = right(model, fmt)
        name = next(layer.name for layer in report.quantized if layer.kind == "linear")
        with torch.no_grad():
            model.get_submodule(name)._parameters["weight"].plain[0, 20] ^= 1
        return report

    monkeypatch.setattr(checks.isqtorch, "quantize_", wrong)
    row = check_type("llama", tmp_path)
    assert "has other bytes" in row.failures["immediate"]
    assert {"reload", "plan", "experts", "forward"}.isdisjoint(row.failures)
    monkeypatch.undo()

    monkeypatch.setattr(checks, "expected_error", lambda report: 1e-6)
    monkeypatch.setattr(checks, "_PLAN", -1.0)
    (tmp_path / "again").mkdir()
    row = check_type("llama", tmp_path / "again")
    assert row.failures.keys() == {"forward", "plan"} and "is expected at most" in row.failures["forward"]


def test_experts_that_are_left_are_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = isqtorch.quantize_
    monkeypatch.setattr(checks.isqtorch, "quantize_", lambda model, fmt: right(model, fmt, exclude="experts"))
    row = check_type("mixtral", tmp_path)
    assert "experts" in row.failures["experts"] and "immediate" in row.failures


def _end(kind: str, folder: Path) -> Row:
    """A check that goes wrong in the way that the name of the type says."""
    if kind == "hangs":
        time.sleep(60)
    if kind == "crashes":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "eats":
        torch.ones(2**40)
    if kind == "raises":
        raise KeyError("spam")
    (folder / "file").write_text("is removed")
    return Row(kind, cls=str(folder))


def test_a_type_that_hangs_or_crashes_ends_alone() -> None:
    began = time.monotonic()
    kinds = ["hangs", "crashes", "eats", "raises", "works"]
    rows = {row.kind: row for row in run(kinds, _end, Limits(seconds=5, gigabytes=64), jobs=2)}
    assert rows.keys() == set(kinds) and time.monotonic() - began < 30
    assert rows["hangs"].failures == {"limits": "it takes more than 5 s"}
    assert rows["crashes"].failures == {"limits": "it crashed: SIGKILL"}
    assert "limits" in rows["eats"].failures
    assert rows["raises"].failures == {"limits": "KeyError: 'spam'"}
    assert not rows["works"].failures and not Path(rows["works"].cls).exists()


def test_known_failures_are_explained_and_must_fail() -> None:
    rows = [
        Row("a", failures={"plan": "spam"}),
        Row("b", failures={"plan": "spam", "forward": "ham"}),
        Row("c"),
        Row("d", not_built="no class"),
    ]
    entries = {("a", "plan"): "because", ("c", "plan"): "mended", ("d", "plan"): "?", ("absent", "plan"): "not run"}
    assert known.unknown(rows, entries) == ["b: plan: spam", "b: forward: ham"]
    assert [line.split(":")[0] for line in known.outdated(rows, entries)] == ["c", "d"]
    assert "there is no check 'spam'" in known.outdated(rows, {("a", "spam"): ""})[0]
    text = table.markdown(rows, "5.0")
    assert "| a |" in text and "| d | no class |" in text and "Of 4 types, 3 were made, and 1 pass" in text


def test_a_configuration_keeps_one_layer_of_every_kind() -> None:
    defaults = {
        "num_hidden_layers": 6,
        "layer_types": ["s", "s", "f", "s", "s", "f"],
        "per_layer_config": {"02": {"head_dim": 512}, "05": {"head_dim": 512}},
        "hidden_size": 4096,
        "vocab_size": 99999,
        "pad_token_id": 99998,
        "eos_token_id": [7, 8],
        "image_token_id": 99990,
        "text_config": {"model_type": "x", "n_layer": 40, "hidden_size": 64},
    }
    small = next(shrink.candidates(defaults, {"text_config.hidden_size": 128}))
    assert small["num_hidden_layers"] == 2 and small["layer_types"] == ["s", "f"]
    assert small["per_layer_config"] == {"1": {"head_dim": 512}}
    assert small["hidden_size"] == 256 and small["vocab_size"] == 512 and small["eos_token_id"] == [7, 8]
    assert (
        small["pad_token_id"] != small["image_token_id"] and max(small["pad_token_id"], small["image_token_id"]) < 512
    )
    assert small["text_config"] == {"model_type": "x", "n_layer": 2, "hidden_size": 128}
    assert defaults["hidden_size"] == 4096  # is not changed


def test_a_type_without_a_class_is_not_built(tmp_path: Path) -> None:
    row = check_type("sam_prompt_encoder", tmp_path)
    assert "no class" in row.not_built and not row.failures
    with pytest.raises(building.NotBuilt):
        building.build("sam_prompt_encoder")


def test_a_type_that_transformers_does_not_read_again_is_not_built(tmp_path: Path) -> None:
    row = check_type("inkling_audio", tmp_path)
    assert "does not read what it saved" in row.not_built and not row.failures


def test_choices_are_repeated_where_they_fit() -> None:
    made, first = Choices(), torch.tensor([[1.0, 3.0, 2.0, 0.0]])
    with made.noted():
        torch.topk(first, 2)
        first.topk(1, dim=-1)
    with made.repeated():
        again = torch.topk(-first, k=2, dim=-1)
        assert again.indices.tolist() == [[1, 2]] and again.values.tolist() == [[-3.0, -2.0]]
        assert first.topk(3).indices.shape == (1, 3)  # another shape than before: chosen anew
        assert first.topk(1).indices.tolist() == [[1]]  # there is nothing more to repeat
    assert torch.topk(-first, 2).indices.tolist() == [[3, 0]] and first.topk(1).indices.tolist() == [[1]]


def test_a_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert results.read(path) == {}
    results.append(path, Row("a", share=0.5))
    results.append(path, Row("b", failures={"plan": "spam"}))
    results.append(path, Row("a", share=0.75))
    with path.open("a") as file:
        file.write('{"kind": "c", "sh')  # killed while writing
    rows = results.read(path)
    assert rows == {"a": Row("a", share=0.75), "b": Row("b", failures={"plan": "spam"})}
    results.append(path, Row("c"))
    assert results.read(path).keys() == {"a", "b", "c"}


def test_inputs_follow_the_signature() -> None:
    model = building.build("whisper").model
    first = next(iter(inputs.candidates(model)))
    assert first.keys() == {"input_features", "decoder_input_ids"}
