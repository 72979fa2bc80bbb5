"""isqtorch.load and the commands on checkpoints of other programs: blocks as they are, packed anew, and changed later."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import DEMO
from mlx_folders import converted, write
from models import logits, state_bytes, tiny_moe
from serving import start

import isqtorch
from isqtorch.cli import main
from isqtorch.inplace.origin import Origin
from isqtorch.modules import PackedModule

TEXT = DEMO.parent / "heldout.txt"


def demo(**options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32, **options).eval()


def as_it_is(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: tensor}


def switched(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The names of experts in MLX: the gate and up projections apart."""
    path, found, leaf = name.rpartition(".experts.")
    if not found:
        return {name: tensor}
    parts = zip(("gate_proj", "up_proj"), tensor.chunk(2, dim=1), strict=True) if "up" in leaf else [(leaf, tensor)]
    return {f"{path}.switch_mlp.{part}.weight": rows for part, rows in parts}


def mlx(folder: Path, model: Any = None, names: Any = as_it_is, group: int = 64) -> Path:
    """The demo model, or another one, as an MLX folder with 4 bits."""
    model = demo() if model is None else model
    tensors, _ = converted(model, lambda path: {"bits": 4, "group_size": group}, names=names)
    write(folder, tensors, model.config.to_dict(), quantization={"group_size": group, "bits": 4})
    for file in DEMO.glob("token*"):
        shutil.copy(file, folder)
    return folder


def gguf(path: Path) -> Path:
    """The demo model as a GGUF file, mostly in q4_0."""
    model = demo()
    isqtorch.quantize_(model, "q4_0", topology={"0": "q5k"}, progress=False)
    path = path.with_suffix(".gguf")
    isqtorch.export_gguf(model, path, transformers.AutoTokenizer.from_pretrained(DEMO))
    return path


WRITERS: dict[str, Callable[[Path], Path]] = {"mlx": mlx, "gguf": gguf}
FORMATS = {"mlx": "afq4", "gguf": "q4_0"}  # of most weights


@pytest.fixture(scope="module", params=list(WRITERS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def source(kind: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(WRITERS[kind](tmp_path_factory.mktemp(kind) / "demo"))


def decoded(source: str) -> Any:
    """The model with the float values that the blocks mean."""
    model = isqtorch.load(source).model
    isqtorch.dequantize_(model)
    return model


def test_blocks_stay_and_are_saved(source: str, kind: str, tmp_path: Path) -> None:
    model, tokenizer, report = isqtorch.load(source)
    assert type(model) is transformers.LlamaForCausalLM and not model.training
    assert report is model.isq_report and FORMATS[kind] in {layer.stored for layer in report.layers}
    assert (
        tokenizer("The function")["input_ids"]
        == transformers.AutoTokenizer.from_pretrained(DEMO)("The function")["input_ids"]
    )
    assert model.generation_config.eos_token_id == demo().generation_config.eos_token_id
    with torch.no_grad():
        near = torch.nn.functional.cosine_similarity(logits(model).flatten(), logits(demo()).flatten(), dim=0)
    assert near > 0.98
    model.save_pretrained(tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert state_bytes(again) == state_bytes(model) and torch.equal(logits(again), logits(model))
    assert state_bytes(isqtorch.load(tmp_path / "ours").model) == state_bytes(model)


def test_packed_anew_is_what_quantize_makes_of_the_values(source: str) -> None:
    model, _, report = isqtorch.load(source, "q4k", exclude="lm_head", progress=False)
    want = decoded(source)
    isqtorch.quantize_(want, "q4k", exclude="lm_head|embed", progress=False)
    state, other = model.state_dict(), want.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, isqtorch.QuantLinear) and "lm_head" not in name:
            assert module.format == "q4k" and state[f"{name}.weight"].equal(other[f"{name}.weight"])
    assert report.requested == "q4k" and any("their errors stay" in note for note in report.notes)
    assert not any("their errors stay" in note for note in isqtorch.load(source).report.notes)


def test_the_format_changes_later_and_back(source: str) -> None:
    loaded = isqtorch.load(source)
    first = state_bytes(loaded.model)
    report = isqtorch.requantize_(loaded.model, "q2k", progress=False)
    assert any("they are quantized there (" in note and "their errors stay" in note for note in report.notes)
    direct = isqtorch.load(source, "q2k", progress=False)
    assert state_bytes(loaded.model) == state_bytes(direct.model)
    topology = isqtorch.load(source).report.topology()
    report = isqtorch.requantize_(loaded.model, None, topology=topology, progress=False, measure_error=True)
    assert {layer.error for layer in report.quantized} == {0.0}
    assert state_bytes(loaded.model) == first  # the blocks of the file again, and not blocks of decoded blocks

    model = demo()
    isqtorch.quantize_(model, "q2k", progress=False)
    isqtorch.requantize_(model, "q4k", source=source, progress=False)
    again = isqtorch.load(source, "q4k", progress=False).model
    name = "model.layers.0.mlp.up_proj"
    assert model.get_submodule(name).weight.equal(again.get_submodule(name).weight)


def test_auto_and_calibration(source: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT.read_text(encoding="utf-8")[:4000], encoding="utf-8")
    model, _, report = isqtorch.load(source, "auto", target_bpw=4.0, formats=["q2k", "q4k", "q6k"], progress=False)
    assert report.bits_per_weight <= 4.0 and report.choice is not None and model.isq_report is report
    loaded = isqtorch.load(source, "q3k", calibration_file=text, progress=False)
    assert loaded.imatrix is not None and loaded.report.imatrix is not None
    again = isqtorch.load(source, "q3k", imatrix=loaded.imatrix, progress=False)
    assert state_bytes(again.model) == state_bytes(loaded.model)


def test_the_type_of_the_model(source: str) -> None:
    model, _, _ = isqtorch.load(source, dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert {module.dtype for module in model.modules() if isinstance(module, PackedModule)} == {torch.bfloat16}
    origin = Origin.of(model)
    assert origin is not None and origin.files and origin.trouble is None


def test_commands(source: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["-m", source, "--prompt", "The function returns", "--max-new-tokens", "8", "--json"]
    assert main(["run", *few]) == 0, capsys.readouterr().err
    reply = json.loads(capsys.readouterr().out)
    assert reply["generated_tokens"] == 8

    out = tmp_path / "kept"
    assert main(["quantize", "-m", source, "-o", str(out)]) == 0, capsys.readouterr().err
    assert FORMATS[kind] in capsys.readouterr().out
    assert main(["run", "-m", str(out), *few[2:]]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == reply["text"]

    assert main(["quantize", "-m", source, "--isq", "q4k", "-o", str(tmp_path / "anew"), "--json"]) == 0
    assert "q4k" in {layer["stored"] for layer in json.loads(capsys.readouterr().out)["layers"]}

    small = ["--text", str(TEXT), "--tokens", "300", "--context", "64", "--json"]
    assert main(["perplexity", source, *small, "--isq", "q8_0", "--kl"]) == 0, capsys.readouterr().err
    result = json.loads(capsys.readouterr().out)
    assert result["kl_mean"] < 0.01  # from the model of the file, not from another one
    assert main(["imatrix", source, str(TEXT), "-o", str(tmp_path / "im.gguf"), "--max-tokens", "600"]) == 0
    few = ["--prompt-len", "8", "--gen-len", "2", "--repeat", "1", "--in-process"]
    assert main(["bench", "-m", source, *few]) == 0
    assert FORMATS[kind] in capsys.readouterr().out


def test_a_running_model_changes_its_format(source: str) -> None:
    from isqtorch.app.model import LoadedModel

    loaded = LoadedModel(source)
    assert not loaded.packed and loaded.report is not None
    loaded.requantize("q2k")
    assert loaded.report.requested == "q2k" and any("their errors stay" in note for note in loaded.report.notes)
    assert state_bytes(loaded.model) == state_bytes(isqtorch.load(source, "q2k", progress=False).model)


def test_fused_experts_are_saved_and_load_again(tmp_path: Path) -> None:
    folder = mlx(tmp_path / "mlx", tiny_moe().float(), switched, group=32)
    model = isqtorch.load(folder).model
    assert any(isinstance(module, isqtorch.QuantExperts) for module in model.modules())
    model.save_pretrained(tmp_path / "ours")
    again = isqtorch.load(tmp_path / "ours").model
    assert state_bytes(again) == state_bytes(model) and torch.equal(logits(again), logits(model))
    isqtorch.requantize_(model, "q8_0", progress=False)
    assert state_bytes(model) == state_bytes(isqtorch.load(folder, "q8_0", progress=False).model)


def test_a_gguf_file_is_served(tmp_path: Path) -> None:
    pytest.importorskip("openai")
    pytest.importorskip("fastapi")
    source = gguf(tmp_path / "demo")
    server = start(tmp_path, "-m", str(source), "--port", "0")
    try:
        assert server.ready["model"] == "demo" and server.ready["isq"] is None
        assert "q4_0" in {layer["stored"] for layer in server.ready["report"]["layers"]}
        first = server.text("The function returns")
        report = server.re_isq("q8_0")
        assert any("their errors stay" in note for note in report["notes"])
        model, tokenizer, _ = isqtorch.load(source)
        ids = model.generate(
            **tokenizer("The function returns", return_tensors="pt"), max_new_tokens=12, do_sample=False
        )
        assert tokenizer.decode(ids[0, 3:], skip_special_tokens=True) == first
    finally:
        assert "Traceback" not in server.end()
