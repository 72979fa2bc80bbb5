"""export_mlx: folders for mlx-lm, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from test_mlx import opened
from torch import Tensor

import isqtorch
from isqtorch.formats import formats, get_format
from isqtorch.formats.codebook import mxfp4_codes
from isqtorch.modules.parameter import plain_bytes
from tests.integrations.gguf_models import tiny_model, write_model
from tests.models import logits, quantized, state_bytes, tiny_gpt2, tiny_llama, tiny_moe

DEMO = Path(__file__).resolve().parent.parent.parent / "examples" / "demo_model" / "model"
AFFINE = [name for name in formats(variants=True) if get_format(name).solver == "affine"]


def llama(**options: Any) -> Any:
    return tiny_llama(dtype=torch.float32, **options)


def export(model: Any, folder: Path) -> Path:
    isqtorch.export_mlx(model, folder, tokenizer=False)
    return folder


def packed(model: Any, fmt: str) -> Any:
    """Packed in a format. The table and the head, which mxfp4 would promote to a format that MLX lacks, get afq6."""
    topology = {"/embed_tokens|lm_head/": "afq6"} if fmt == "mxfp4" else None
    isqtorch.quantize_(model, fmt, topology=topology, progress=False)
    return model


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "mlx"}
            tensors.update({name: file.get_tensor(name) for name in file.keys()})
    return json.loads((folder / "config.json").read_text()), tensors


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("fmt", [*AFFINE, "mxfp4"])
def test_there_and_back_bit_for_bit(fmt: str, tied: bool, tmp_path: Path) -> None:
    source = packed(llama(tied=tied), fmt)
    assert source.lm_head.format
    model, report = opened(export(source, tmp_path / "mlx"))
    assert not report.notes
    assert state_bytes(model) == state_bytes(source)
    assert model.config.quantization_config.layers == source.config.quantization_config.layers
    assert torch.equal(logits(model), logits(source))


FAMILIES = {
    "gpt2": tiny_gpt2,
    "qwen3": tiny_moe,
    "mixtral": lambda: tiny_moe("Mixtral"),
    "gpt_oss": lambda: tiny_moe("GptOss"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_there_and_back(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = quantized(FAMILIES[family]().to(dtype), "afq4g32")
    model, report = opened(export(source, tmp_path / "mlx"))
    assert not report.notes
    assert state_bytes(model.to(dtype)) == state_bytes(source)


def test_a_float_model_there_and_back(tmp_path: Path) -> None:
    source = llama(tied=True)
    config, tensors = read(export(source, tmp_path / "mlx"))
    assert "quantization" not in config and "quantization_config" not in config
    assert set(tensors) == set(source.state_dict()) - {"lm_head.weight"}
    assert state_bytes(opened(tmp_path / "mlx")[0]) == state_bytes(source)


def test_a_float_folder_is_recognized_by_who_wrote_its_weights(tmp_path: Path) -> None:
    """MLX turns the weights of convolutions, and config.json does not tell."""
    from tests.tiny_decoders import tiny

    source = tiny("mamba")
    _, tensors = read(export(source, tmp_path / "mlx"))
    name = "backbone.layers.0.mixer.conv1d.weight"
    assert torch.equal(tensors[name], source.state_dict()[name].transpose(1, 2))
    found = isqtorch.load(tmp_path / "mlx", dtype="float32")
    assert state_bytes(found.model) == state_bytes(source)
    assert isqtorch.load(tmp_path / "mlx", "q8_0").report.quantized


def test_the_tensors_are_those_that_mlx_defines(tmp_path: Path) -> None:
    """Decoded with the packing that the tests write themselves."""
    source = quantized(llama(), "afq4")
    config, tensors = read(export(source, tmp_path / "mlx"))
    assert (
        config["quantization"]
        == config["quantization_config"]
        == {"group_size": 64, "bits": 4, "mode": "affine"}
        | {path: {"group_size": 64, "bits": 6, "mode": "affine"} for path in ("lm_head", "model.embed_tokens")}
    )
    path = "model.layers.0.mlp.up_proj"
    words, scales, biases = (tensors[f"{path}.{leaf}"] for leaf in ("weight", "scales", "biases"))
    assert words.dtype == torch.uint32 and tuple(words.shape) == (512, 256 * 4 // 32)
    assert scales.dtype == biases.dtype == torch.bfloat16 and scales.shape == biases.shape == (512, 4)
    ones = (words.long()[..., None] >> torch.arange(32)) & 1
    codes = (ones.reshape(512, 256, 4) << torch.arange(4)).sum(-1).view(512, 4, 64)
    decoded = codes * scales.float()[..., None] + biases.float()[..., None]
    assert torch.equal(decoded.view(512, 256), source.model.layers[0].mlp.up_proj.dequantize())


def test_scales_of_float16(tmp_path: Path) -> None:
    _, tensors = read(export(quantized(llama().half(), "afq4"), tmp_path / "mlx"))
    assert {t.dtype for name, t in tensors.items() if name.endswith((".scales", ".biases"))} == {torch.float16}


@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral", "GptOss"])
def test_experts_are_stacks_for_each_projection(family: str, tmp_path: Path) -> None:
    source = quantized(tiny_moe(family), "afq4g32")
    config, tensors = read(export(source, tmp_path / "mlx"))
    place = {
        "Qwen3Moe": "model.layers.0.mlp.switch_mlp",
        "Mixtral": "model.layers.0.block_sparse_moe.switch_mlp",
        "GptOss": "model.layers.0.mlp.experts",
    }[family]
    experts = next(module for module in source.modules() if isinstance(module, isqtorch.QuantExperts))
    rows = experts.dequantize("gate_up_proj")
    gate, up = (rows[:, 0::2], rows[:, 1::2]) if family == "GptOss" else rows.chunk(2, 1)
    for role, wanted in (("gate_proj", gate), ("up_proj", up), ("down_proj", experts.dequantize("down_proj"))):
        parts = (tensors[f"{place}.{role}.{leaf}"] for leaf in ("weight", "scales", "biases"))
        packed = isqtorch.QuantizedTensor.from_mlx(*parts, bits=4)
        assert torch.equal(packed.dequantize(torch.float32), wanted.float())
    if family == "GptOss":
        assert torch.equal(tensors[f"{place}.gate_proj.bias"], experts.gate_up_proj_bias[:, 0::2])
        assert torch.equal(tensors[f"{place}.up_proj.bias"], experts.gate_up_proj_bias[:, 1::2])
    assert not any("experts.gate_up" in name for name in tensors)
    assert config["quantization"]["bits"] == 4


def test_mxfp4(tmp_path: Path) -> None:
    source = packed(llama(), "mxfp4")
    config, tensors = read(export(source, tmp_path / "mlx"))
    assert config["quantization"] == {"group_size": 32, "bits": 4, "mode": "mxfp4"} | {
        path: {"group_size": 64, "bits": 6, "mode": "affine"} for path in ("lm_head", "model.embed_tokens")
    }
    path = "model.layers.0.mlp.up_proj"
    codes, scales = mxfp4_codes(plain_bytes(source.model.layers[0].mlp.up_proj.weight))
    assert torch.equal(tensors[f"{path}.weight"].view(torch.uint8), codes)
    assert torch.equal(tensors[f"{path}.scales"], scales)
    assert f"{path}.biases" not in tensors


def test_settings_that_mlx_lm_reads_under_older_names(tmp_path: Path) -> None:
    """It takes a default where it finds none: another theta would be another model."""
    source = llama()
    source.config.rope_parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500000.0}
    config, _ = read(export(source, tmp_path / "mlx"))
    assert config["rope_theta"] == 500000.0
    assert config["rope_scaling"] == {"rope_type": "linear", "type": "linear", "factor": 4.0}
    assert opened(tmp_path / "mlx")[0].config.rope_parameters["rope_theta"] == 500000.0


@pytest.mark.parametrize("said", [True, False])
def test_the_configuration_says_whether_the_head_is_tied(said: bool, tmp_path: Path) -> None:
    source = llama(tied=said)
    source.config.tie_word_embeddings = not said
    assert read(export(source, tmp_path / "mlx"))[0]["tie_word_embeddings"] is said


def test_large_models_are_written_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isqtorch.files.tensors_writing.SHARD_BYTES", 100_000)
    source = quantized(llama(), "afq4")
    folder = export(source, tmp_path / "mlx")
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(read(folder)[1])
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in read(folder)[1].values())
    assert state_bytes(opened(folder)[0]) == state_bytes(source)


def test_the_demo_model_there_and_back(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    isqtorch.quantize_(source, "afq4", progress=False)
    isqtorch.export_mlx(source, tmp_path / "mlx")
    found = isqtorch.load(tmp_path / "mlx")
    assert state_bytes(found.model) == state_bytes(source)
    assert found.model.generation_config.to_dict() == source.generation_config.to_dict()
    text = "The quick brown fox"
    assert found.tokenizer(text)["input_ids"] == AutoTokenizer.from_pretrained(DEMO)(text)["input_ids"]
    isqtorch.export_mlx(found.model, tmp_path / "again")
    for path in (tmp_path / "mlx").iterdir():
        if path.name != "config.json":
            assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_formats_that_mlx_lacks_are_refused(tmp_path: Path) -> None:
    source = quantized(llama(), "q4k")
    message = (
        r"embed_tokens\.weight is q6k, which MLX does not have; it has afq2, .*mxfp4.*requantize_\(model, 'afq4'\)"
    )
    with pytest.raises(ValueError, match=message):
        export(source, tmp_path / "mlx")
    assert not list(tmp_path.iterdir())


def test_architectures_that_mlx_lm_lacks_are_refused(tmp_path: Path) -> None:
    from tests.models import tiny_bert

    with pytest.raises(NotImplementedError, match=r"export_mlx: models of type 'bert' cannot be written\. .*llama"):
        export(tiny_bert(), tmp_path / "mlx")
    with pytest.raises(ValueError, match=r"export_mlx: the model is a Linear, must be a model of transformers"):
        export(torch.nn.Linear(64, 64), tmp_path / "mlx")


def test_types_that_mlx_lacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is torch\.float64, which MLX does not have"):
        export(llama().double(), tmp_path / "mlx")


def test_weights_that_are_not_here_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is on the meta device and has no values"):
        export(llama().to("meta"), tmp_path / "mlx")


def test_folders_with_files_are_not_replaced(tmp_path: Path) -> None:
    source = llama(layers=1)
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        export(source, tmp_path)
    source.config._name_or_path = str(tmp_path)
    with pytest.raises(FileExistsError, match="is the model itself"):
        export(source, tmp_path)
    with pytest.raises(FileExistsError, match="lies in the folder of the model"):
        export(source, tmp_path / "inside")
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("isqtorch.integrations.checkpoints.mlx.writer.write_shards", fail)
    with pytest.raises(OSError, match="disk full"):
        export(llama(layers=1), tmp_path / "mlx")
    assert not list(tmp_path.iterdir())


def test_a_missing_tokenizer_is_an_error_that_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"export_mlx: no tokenizer is found .* tokenizer=False"):
        isqtorch.export_mlx(llama(layers=1), tmp_path / "mlx")
    assert not list(tmp_path.iterdir())


def test_heads_that_mlx_lm_has_otherwise(tmp_path: Path) -> None:
    """It has no head for gpt2, and always one for phi."""
    from tests.tiny_decoders import tiny

    with pytest.raises(
        ValueError, match=r"head has weights of its own, and mlx-lm uses the embedding for models of type 'gpt2'"
    ):
        export(tiny("gpt2"), tmp_path / "mlx")
    source = quantized(tiny("stablelm, tied"), "afq4g32")
    _, tensors = read(export(source, tmp_path / "mlx"))
    for leaf in ("weight", "scales", "biases"):
        assert torch.equal(tensors[f"lm_head.{leaf}"], tensors[f"model.embed_tokens.{leaf}"])
    model, report = opened(tmp_path / "mlx")
    assert state_bytes(model) == state_bytes(source) and not report.notes


def test_models_that_mlx_lm_computes_otherwise_are_refused(tmp_path: Path) -> None:
    from tests.tiny_decoders import tiny

    with pytest.raises(NotImplementedError, match=r"'glm' cannot be written for mlx-lm, which turns all of a head"):
        export(tiny("glm"), tmp_path / "mlx")
    with pytest.raises(NotImplementedError, match=r"'gpt_neox' cannot be written for mlx-lm, whose hidden layers"):
        export(tiny("gpt_neox"), tmp_path / "mlx")
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    from isqtorch.cli import main

    arguments = ["export", "--to", "mlx", "-o", str(tmp_path / "mlx")]
    assert main([*arguments, "-m", str(DEMO), "--isq", "afq4"]) == 0
    source = AutoModelForCausalLM.from_pretrained(DEMO, dtype="auto")
    isqtorch.quantize_(source, "afq4", progress=False)
    found = isqtorch.load(tmp_path / "mlx")
    assert state_bytes(found.model) == state_bytes(source)
    assert found.tokenizer is not None
    assert main([*arguments, "-m", str(DEMO), "--isq", "afq4"]) == 1
    assert "is not an empty folder" in capsys.readouterr().err


def test_the_command_refuses_before_it_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from isqtorch.app.model import LoadedModel
    from isqtorch.cli import main
    from tests.tiny_decoders import tiny

    def fail(*args: Any, **options: Any) -> None:
        raise AssertionError("loaded")

    def refusal(model: Path, *options: str) -> str:
        assert main(["export", "--to", "mlx", "-o", str(tmp_path / "mlx"), "-m", str(model), *options]) == 1
        return capsys.readouterr().err

    tiny("glm").save_pretrained(tmp_path / "glm")
    packed(llama(), "q4k").save_pretrained(tmp_path / "q4k")
    write_model(tmp_path / "model.gguf", tiny_model("llama"))
    (tmp_path / "mixed.yaml").write_text("/up_proj/: q4_0\n")
    monkeypatch.setattr(LoadedModel, "__init__", fail)
    assert "cannot be written for mlx-lm" in refusal(tmp_path / "glm", "--isq", "afq4")
    assert "embed_tokens.weight is q6k, which MLX does not have" in refusal(DEMO, "--isq", "mxfp4")
    assert "is q6k, which MLX does not have" in refusal(DEMO, "--isq", "q4k_m")
    assert "up_proj.weight is q4_0" in refusal(DEMO, "--isq", "afq4", "--topology", str(tmp_path / "mixed.yaml"))
    auto = ["--isq", "auto", "--target-bpw", "4.5"]
    assert "--choose-from q4k: MLX has no q4k" in refusal(DEMO, *auto, "--choose-from", "afq4", "q4k")
    assert "which MLX does not have" in refusal(tmp_path / "q4k")  # packed already
    assert "which MLX does not have" in refusal(tmp_path / "model.gguf")
    assert not (tmp_path / "mlx").exists()


def test_what_can_be_written_is_not_refused_before_it_loads() -> None:
    from isqtorch.integrations.checkpoints.mlx import writer
    from isqtorch.integrations.opening import Opened
    from isqtorch.integrations.rehearsal import rehearsed
    from isqtorch.policy.options import Options
    from isqtorch.policy.request import Request

    opened = Opened.of(DEMO)
    topology = {"/embed_tokens|lm_head/": "afq6"}
    model = rehearsed(opened, Request("mxfp4", Options(topology=topology), "load"))
    writer.check_weights(model)
    loaded = isqtorch.load(DEMO, "mxfp4", topology=topology).model
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        name: tensor.shape for name, tensor in loaded.state_dict().items()
    }
    assert rehearsed(opened, Request("auto", Options(target_bpw=4.5), "load")) is None


def test_a_folder_beside_the_gguf_file_that_the_model_is_from(tmp_path: Path) -> None:
    write_model(tmp_path / "model.gguf", tiny_model("llama"))
    (tmp_path / "notes.txt").write_text("other things")
    model, _, _ = isqtorch.load(tmp_path / "model.gguf", "afq4")
    read(export(model, tmp_path / "model-mlx"))
    with pytest.raises(FileExistsError, match="holds the model"):
        export(model, tmp_path)
