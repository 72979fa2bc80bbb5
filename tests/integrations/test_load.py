"""isqtorch.load and the commands on models of many classes: each is loaded, packed and written as its own class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import DEMO, MODELS, OF_TEXT, embedder, written
from models import state_bytes, tiny_llama
from safetensors.torch import load_file, save_file

import isqtorch
from isqtorch.cli import main

TEXT = str(DEMO.parent / "heldout.txt")


def inputs(name: str) -> dict[str, torch.Tensor]:
    ids = torch.arange(3, 12)[None]
    if name == "whisper":
        return {"input_features": torch.ones(1, 8, 40), "decoder_input_ids": ids}
    if name == "vit":
        return {"pixel_values": torch.ones(1, 3, 16, 16)}
    return {"input_ids": ids, **({"decoder_input_ids": ids} if name == "t5" else {})}


def outputs(model: Any, name: str) -> torch.Tensor:
    with torch.no_grad():
        found = model(**inputs(name))
    return found[0] if name == "bert" else found.logits


@pytest.mark.parametrize("name", MODELS)
def test_every_class_is_loaded_packed_and_written_as_itself(name: str, tmp_path: Path) -> None:
    source, out = written(name, tmp_path / "source"), tmp_path / "out"
    cls = type(MODELS[name]())
    floats = isqtorch.load(source)
    assert type(floats.model) is cls and not floats.model.training and not floats.report.quantized
    want = cls.from_pretrained(source)
    assert state_bytes(floats.model) == state_bytes(want)

    model, tokenizer, report = isqtorch.load(source, "q8_0", progress=False)
    isqtorch.quantize_(want, "q8_0", progress=False)
    assert type(model) is cls and state_bytes(model) == state_bytes(want) and report is model.isq_report
    assert (tokenizer is not None) == (name in OF_TEXT)

    assert main(["quantize", "-m", str(source), "--isq", "q8_0", "-o", str(out)]) == 0
    assert json.loads((out / "config.json").read_text())["architectures"] == [cls.__name__]
    again = isqtorch.load(out)
    assert type(again.model) is cls and torch.equal(outputs(again.model, name), outputs(want, name))
    assert again.report.bits_per_weight == report.bits_per_weight


@pytest.mark.parametrize(("name", "file"), [("whisper", "WhisperProcessor"), ("vit", "ViTImageProcessor")])
def test_the_processor_is_loaded_and_written(name: str, file: str, tmp_path: Path) -> None:
    source, out = written(name, tmp_path / "source"), tmp_path / "out"
    assert type(isqtorch.load(source).processor).__name__.startswith(file)
    assert main(["quantize", "-m", str(source), "--isq", "q8_0", "-o", str(out)]) == 0
    assert type(transformers.AutoProcessor.from_pretrained(out)).__name__.startswith(file)


def test_a_processor_that_does_not_load_is_said_and_its_files_are_kept(tmp_path: Path) -> None:
    source, out = written("gemma3", tmp_path / "source"), tmp_path / "out"
    content = '{"image_processor_type": "Gemma3ImageProcessor", "processor_class": "Gemma3Processor"}'
    (source / "preprocessor_config.json").write_text(content)  # the demo model's tokenizer has no token for images
    with pytest.warns(
        UserWarning, match=r"the processor of .*source does not load \(.*boi_token_id\): it runs on text"
    ):
        assert main(["quantize", "-m", str(source), "--isq", "q8_0", "-o", str(out)]) == 0
    assert (out / "preprocessor_config.json").read_text() == content


def test_a_sentence_embedder_keeps_its_files(tmp_path: Path) -> None:
    source, out = embedder(tmp_path / "source"), tmp_path / "out"
    for _ in range(2):  # the second time it replaces its own folder
        assert main(["quantize", "-m", str(source), "--isq", "q8_0", "-o", str(out), "--force"]) == 0
    for name in (
        "modules.json",
        "1_Pooling/config.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
    ):
        assert (out / name).read_bytes() == (source / name).read_bytes()


def test_a_model_without_a_tokenizer_gets_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers makes up a tokenizer of five tokens for some types."""
    source, out = tmp_path / "source", tmp_path / "out"
    MODELS["bert"]().save_pretrained(source)
    assert isqtorch.load(source).tokenizer is None
    assert main(["quantize", "-m", str(source), "--isq", "q8_0", "-o", str(out)]) == 0
    assert not list(out.glob("*token*"))
    for file in written("whisper", tmp_path / "whisper").glob("token*"):
        file.unlink()
    with pytest.warns(UserWarning, match="there are no files of its tokenizer"):
        assert tuple(isqtorch.load(tmp_path / "whisper"))[1] is None
    tiny_llama().save_pretrained(tmp_path / "llama")
    for command in (
        ["run", "-m", str(tmp_path / "llama"), "-p", "x"],
        ["imatrix", str(tmp_path / "llama"), TEXT, "-o", "x.gguf"],
    ):
        assert main(command) == 1
        assert f"has no tokenizer, and {command[0]} needs one" in capsys.readouterr().err


def test_the_text_of_an_image_text_model_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(written("gemma3", tmp_path / "source"))
    few = ["-m", source, "--isq", "q8_0", "--prompt", "The function", "--max-new-tokens", "5", "--json"]
    assert main(["run", *few]) == 0, capsys.readouterr().err
    reply = json.loads(capsys.readouterr().out)
    model, tokenizer, _ = isqtorch.load(source, "q8_0", progress=False)
    ids = model.generate(**tokenizer("The function", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert reply["text"] == tokenizer.decode(ids[0, reply["prompt_tokens"] :], skip_special_tokens=True)
    assert main(["perplexity", source, "--text", TEXT, "--tokens", "64", "--context", "32"]) == 0
    assert main(["bench", "-m", source, "--in-process", "--prompt-len", "8", "--gen-len", "2", "--repeat", "1"]) == 0


def test_an_encoder_with_a_decoder_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(written("t5", tmp_path / "source"))
    assert main(["run", "-m", source, "--prompt", "The function", "--max-new-tokens", "5", "--json"]) == 0
    reply = json.loads(capsys.readouterr().out)
    model, tokenizer, _ = isqtorch.load(source)
    ids = model.generate(**tokenizer("The function", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert reply["text"] == tokenizer.decode(ids[0, 1:], skip_special_tokens=True)
    assert reply["generated_tokens"] == ids.shape[1] - 1
    assert main(["bench", "-m", source, "--in-process", "--prompt-len", "8", "--gen-len", "3", "--repeat", "1"]) == 0
    assert main(["perplexity", source, "--text", TEXT]) == 1
    assert "T5ForConditionalGeneration, which has an encoder beside its decoder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("whisper", "whose input is input_features"),
        ("vit", "whose input is pixel_values"),
        ("bert", "which does not generate text"),
    ],
)
def test_what_is_no_model_of_text_is_refused_where_text_is_needed(
    name: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(written(name, tmp_path / "source"))
    commands = [["run", "-m", source, "-p", "x"], ["perplexity", source, "--text", TEXT]]
    if name != "bert":  # its embeddings are served: test_server_api.py
        commands.append(["serve", "-m", source])
    for command in commands:
        assert main(command) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"is a {type(MODELS[name]()).__name__}, {why}" in error and f"but {command[0]} needs" in error


def test_an_encoder_is_calibrated_on_a_text(tmp_path: Path) -> None:
    source, out = written("bert", tmp_path / "source"), tmp_path / "im.gguf"
    assert main(["imatrix", str(source), TEXT, "-o", str(out), "--max-tokens", "512"]) == 0
    (tmp_path / "text.txt").write_text(Path(TEXT).read_text(encoding="utf-8")[:4000])
    loaded = isqtorch.load(source, "q4_0", calibration_file=tmp_path / "text.txt", progress=False)
    assert loaded.report.imatrix is not None and loaded.imatrix is not None
    again = isqtorch.load(source, "q4_0", imatrix=loaded.imatrix)
    assert state_bytes(again.model) == state_bytes(loaded.model)


def test_types_and_devices() -> None:
    assert isqtorch.load(DEMO).model.dtype == torch.bfloat16
    assert isqtorch.load(DEMO, "q4k", dtype="float32").model.dtype == torch.float32
    for wrong in ("int8", torch.int8, "spam", torch.float8_e4m3fn, 7):
        with pytest.raises(ValueError, match="load: dtype must be a float type"):
            isqtorch.load(DEMO, dtype=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="load: device 'abacus' is not a torch device"):
        isqtorch.load(DEMO, device="abacus")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"imatrix": "x.gguf"}, "load: imatrix needs a format"),
        ({"exclude": "lm_head"}, "load: exclude needs a format"),
        ({"isq": "q4z"}, "q4z"),
        ({"isq": "auto"}, "load: 'auto' needs one of target_bpw"),
        ({"isq": "q4k", "target_bpw": 4}, "load: target_bpw is for the format 'auto'"),
        ({"isq": "q4k", "imatrix": {}, "calibration_file": TEXT}, "load: give either imatrix or calibration_file"),
        ({"isq": "q4k", "topology": {"0": {"device": "cpu", "isq": "q4k"}}}, "load: topology entry .* names a device"),
        ({"isq": "q4k", "fallback": "upp"}, "load: fallback must be one of"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        isqtorch.load(DEMO, **options)


def test_a_missing_calibration_text(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="load: no calibration text"):
        isqtorch.load(DEMO, 4, calibration_file=tmp_path / "none.txt")


def test_topology_alone_is_a_request() -> None:
    _, _, report = isqtorch.load(DEMO, topology={"0": "q8_0"}, progress=False)
    assert {layer.stored for layer in report.quantized} == {"q8_0"}
    assert all(".layers.0." in layer.name for layer in report.quantized)


def test_a_file_of_checkpoint_save(tmp_path: Path) -> None:
    loaded = isqtorch.load(DEMO, "q4k", progress=False)
    isqtorch.checkpoint.save(loaded.model, tmp_path / "model.safetensors")
    loaded.model.config.to_json_file(tmp_path / "config.json")
    content = json.loads((tmp_path / "config.json").read_text())
    content.pop("quantization_config", None)
    (tmp_path / "config.json").write_text(json.dumps(content))
    again = isqtorch.load(tmp_path)
    assert state_bytes(again.model) == state_bytes(loaded.model) and again.tokenizer is None
    assert again.report.bits_per_weight == loaded.report.bits_per_weight
    with pytest.raises(ValueError, match="is quantized already; give no format"):
        isqtorch.load(tmp_path, 4)


def test_an_encoder_without_its_pooler(tmp_path: Path) -> None:
    """Embedders are often stored so. The pooler is not made up."""
    source, out = written("bert", tmp_path / "source"), tmp_path / "out"
    tensors = load_file(source / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if "pooler" not in n}, source / "model.safetensors", {"format": "pt"})
    model, _, report = isqtorch.load(source, "q8_0", progress=False)
    assert model.pooler is None and any("without the pooler" in note for note in report.notes)
    assert main(["quantize", "-m", str(source), "--isq", "q8_0", "-o", str(out)]) == 0
    assert not any("pooler" in name for name in load_file(out / "model.safetensors"))
    assert state_bytes(isqtorch.load(out).model) == state_bytes(model)


@pytest.mark.parametrize(
    ("damage", "message"),
    [("shape", "other shapes than its config.json says"), ("cut", "damaged|not a complete safetensors file")],
)
def test_files_that_do_not_fit_or_are_damaged(damage: str, message: str, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    if damage == "shape":
        content = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(content | {"intermediate_size": 64}))
    else:
        path = tmp_path / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1000])
    for fmt in (None, "q8_0"):
        with pytest.raises(ValueError, match=message):
            isqtorch.load(tmp_path, fmt, progress=False)


def test_code_of_a_repository_runs_only_if_it_is_trusted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "modeling_poem.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class PoemConfig(LlamaConfig):\n    model_type = 'poem'\n"
        "class PoemForCausalLM(LlamaForCausalLM):\n    config_class = PoemConfig\n"
    )
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    names = {"AutoConfig": "modeling_poem.PoemConfig", "AutoModelForCausalLM": "modeling_poem.PoemForCausalLM"}
    content |= {"model_type": "poem", "architectures": ["PoemForCausalLM"], "auto_map": names}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="trust_remote_code"):
        isqtorch.load(tmp_path)
    assert main(["run", "-m", str(tmp_path), "-p", "x"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    loaded = isqtorch.load(tmp_path, "q8_0", trust_remote_code=True, progress=False)
    assert type(loaded.model).__name__ == "PoemForCausalLM"
    isqtorch.quantize_(model, "q8_0", progress=False)
    assert state_bytes(loaded.model) == state_bytes(model)
