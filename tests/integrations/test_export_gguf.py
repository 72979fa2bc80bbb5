"""What export_gguf refuses, what it leaves as it was, and the command. tests/engines compares with llama.cpp."""

from __future__ import annotations

import resource
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import gguf
import models
import pytest
import torch
import transformers
from helpers import ALL_FORMATS
from hf import logits
from tiny_decoders import tiny
from torch import Tensor, nn

import isqtorch
from isqtorch.cli import main
from isqtorch.integrations.checkpoints.gguf.layout import COLUMN, Place
from isqtorch.integrations.checkpoints.gguf.outgoing import TYPES, entries, sources

ROOT = Path(__file__).resolve().parent.parent.parent
MODEL = str(ROOT / "examples" / "demo_model" / "model")
ABSENT = [fmt.name for fmt in ALL_FORMATS if fmt.name not in TYPES]


def refused(model: Any, folder: Path, *words: str, error: type[Exception] = ValueError, **options: Any) -> None:
    """The export fails with a message that has these words, and writes nothing."""
    before = sorted(folder.iterdir())
    with pytest.raises(error) as caught:
        isqtorch.export_gguf(model, folder / "x.gguf", **{"tokenizer": False, **options})
    assert sorted(folder.iterdir()) == before
    for word in ("export_gguf", *words):
        assert word in str(caught.value)


# ---- formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ABSENT)
def test_formats_that_gguf_lacks(format: str, tmp_path: Path) -> None:
    model = models.tiny_llama(layers=1)
    isqtorch.quantize_(model, "q8_0", topology={"/layers.0.mlp.up_proj$/": format}, progress=False)
    refused(model, tmp_path, "model.layers.0.mlp.up_proj", format, "requantize_", "--isq q4k")


def test_all_others_are_families_of_ggml() -> None:
    assert {"q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2k", "q3k", "q4k", "q5k", "q6k"} <= set(TYPES)
    assert {"q8_1", "q8k", "afq4", "hqq8", "fp8"} <= set(ABSENT)


@pytest.mark.parametrize("format", TYPES)
def test_every_format_of_gguf(format: str, tmp_path: Path) -> None:
    """The bytes of a matrix whose rows keep their order, by another reader."""
    model = models.tiny_llama(layers=1)
    isqtorch.quantize_(model, format, progress=False)
    isqtorch.export_gguf(model, tmp_path / "x.gguf", tokenizer=False)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    for name, layer in (("blk.0.ffn_up", "mlp.up_proj"), ("blk.0.attn_v", "self_attn.v_proj")):
        stored, module = tensors[f"{name}.weight"], model.get_submodule(f"model.layers.0.{layer}")
        assert stored.tensor_type.name.lower().replace("_", "") == format.replace("_", "")
        assert torch.equal(torch.from_numpy(stored.data.copy()), module.state_dict()["weight"])
        assert stored.shape.tolist() == [module.in_features, module.out_features]


# ---- models ----------------------------------------------------------------------------------------------------------


def test_an_unknown_architecture(tmp_path: Path) -> None:
    refused(models.tiny_bert(), tmp_path, "'bert'", "llama", "qwen3_moe", error=NotImplementedError)


def test_not_a_model_of_transformers(tmp_path: Path) -> None:
    refused(nn.Sequential(nn.Linear(4, 4)), tmp_path, "Sequential")


def test_a_trunk_without_its_head(tmp_path: Path) -> None:
    refused(models.tiny_llama().model, tmp_path, "no output head", "AutoModelForCausalLM")


def test_adapters(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(models.tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    refused(model, tmp_path, "adapters", "merge_and_unload")
    refused(model.base_model.model, tmp_path, "model.layers.0.self_attn.q_proj", "merge_and_unload")
    isqtorch.export_gguf(model.merge_and_unload(), tmp_path / "x.gguf", tokenizer=False)


def test_tensors_without_values(tmp_path: Path) -> None:
    model = models.tiny_llama()
    model.model.layers[1].mlp.to("meta")
    refused(model, tmp_path, "model.layers.1.mlp", "meta device")


def test_layers_of_another_quantizer(tmp_path: Path) -> None:
    class Int8Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.zeros(512, 256, dtype=torch.int8))
            self.register_buffer("scale", torch.ones(512))

    model = models.tiny_llama()
    model.model.layers[0].mlp.up_proj = Int8Linear()
    refused(model, tmp_path, "Int8Linear", "model.layers.0.mlp.up_proj")


def test_a_weight_without_a_place(tmp_path: Path) -> None:
    model = models.tiny_llama()
    model.model.layers[0].extra = nn.Linear(4, 4)
    refused(model, tmp_path, "no place for model.layers.0.extra.weight")


def test_what_the_file_cannot_say(tmp_path: Path) -> None:
    model = models.tiny_llama()
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    refused(model, tmp_path, "rope_type is 'dynamic'")


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu', and llama.cpp computes with 'silu'"),
        ("gpt2", {"activation_function": "relu"}, "activation_function is 'relu'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
        ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping is None"),
        ("gemma2", {"query_pre_attn_scalar": 7}, "query_pre_attn_scalar is 7"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 1, 1]}, "no_rope_layers"),
        ("cohere2", {"layer_types": ["full_attention"] * 5}, "no layer has a sliding window"),
        ("cohere", {"use_qk_norm": True}, "use_qk_norm"),
        ("qwen3", {"attention_bias": True}, "does not read model.layers.0.self_attn.o_proj.bias"),
        ("arcee", {"mlp_bias": True}, "does not read model.layers.0.mlp"),
        ("falcon", {"bias": True}, "does not read transformer.h.0.self_attention"),
        ("mamba", {"use_bias": True}, "does not read backbone.layers.0.mixer.in_proj.bias"),
        ("mamba", {"use_conv_bias": False}, "has no blk.0.ssm_conv1d.bias"),
        ("starcoder2", {"use_bias": False}, "has no blk.0.attn_output.bias"),
        ("exaone4", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}, "models of 64 layers"),
        ("olmoe", {"num_key_value_heads": 2}, "num_key_value_heads is 2"),
        ("dots1", {"num_key_value_heads": 2}, "num_key_value_heads is 2"),
        ("qwen3_5_text", {"linear_key_head_dim": 16}, "linear_key_head_dim and linear_value_head_dim differ"),
        ("deepseek_v2", {"q_lora_rank": None}, "q_lora_rank is None"),
        ("ernie4_5", {"use_bias": True}, "use_bias is True"),
        ("llama with yarn positions", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
         "original_max_position_embeddings": 32, "beta_fast": 16.0}}, "beta_fast of rope_parameters is 16.0"),
    ],
)  # fmt: skip
def test_what_llama_cpp_computes_in_another_way(
    case: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    refused(tiny(case, **changes), tmp_path, message)


@pytest.mark.parametrize("case", ["mistral", "mixtral", "starcoder2", "phi3"])
def test_sliding_windows_that_llama_cpp_lacks(case: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="attend to the last 100 tokens, and in llama.cpp to all"):
        isqtorch.export_gguf(tiny(case, sliding_window=100), tmp_path / "x.gguf", tokenizer=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        isqtorch.export_gguf(tiny(case, sliding_window=128), tmp_path / "x.gguf", tokenizer=False)


def test_an_untied_head_where_files_have_none(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.GemmaConfig(
        vocab_size=64, num_key_value_heads=1, head_dim=32, tie_word_embeddings=False, pad_token_id=0, **sizes
    )
    refused(transformers.GemmaForCausalLM(config), tmp_path, "output head", "tie_weights")


def test_packed_weights_whose_values_change(tmp_path: Path) -> None:
    model = models.tiny_llama()
    isqtorch.quantize_(model, "q8_0", progress=False)
    source = next(source for source in sources(model) if source.name.endswith("up_proj.weight"))
    with pytest.raises(ValueError, match=r"up_proj.weight is packed.*a last dim of 1 is added.*exclude="):
        entries("export_gguf", [(source, Place(("x",), changes=(COLUMN,)))])


@pytest.mark.parametrize("format", ["q8_0", "q4k"])
def test_packed_columns_in_another_order(format: str, tmp_path: Path) -> None:
    """Whole blocks move; columns inside of a block cannot. Qwen 3.5 has such a layer."""
    torch.manual_seed(0)
    fmt = isqtorch.get_format(format)
    layer = nn.Sequential(nn.Linear(4 * fmt.block, 8, bias=False))
    isqtorch.quantize_(layer, format, progress=False)
    (source,) = sources(layer)
    turn = torch.tensor([2, 0, 3, 1])

    def blocks(count: int) -> Tensor:
        return torch.arange(count).view(4, -1)[turn].flatten()

    (entry,) = entries("export_gguf", [(source, Place(("x",), columns=blocks))])
    assert entry.read is not None
    stored = torch.frombuffer(bytearray(b"".join(entry.read())), dtype=torch.uint8).view(8, -1)
    decoded = torch.ops.isqtorch.dequantize(stored, format, torch.float32)
    assert torch.equal(decoded[:, blocks(decoded.shape[1])], layer[0].dequantize())
    halves = Place(("x",), columns=lambda count: torch.arange(count).view(8, -1).flip(0).flatten())
    with pytest.raises(ValueError, match=f"0.weight is {format}.*cuts the blocks of {fmt.block}.*topology="):
        entries("export_gguf", [(source, halves)])


def test_the_text_part_of_a_model_with_images(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 64, "num_key_value_heads": 1, "head_dim": 32, "query_pre_attn_scalar": 32}
    vision = {**sizes, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    with pytest.warns(UserWarning, match="weights of images or sound are left out: model.vision_tower"):
        isqtorch.export_gguf(model, tmp_path / "whole.gguf", tokenizer=False, name="x")
    alone = transformers.Gemma3ForCausalLM(config.text_config)
    alone.model.load_state_dict(model.model.language_model.state_dict())
    isqtorch.export_gguf(alone, tmp_path / "text.gguf", tokenizer=False, name="x")
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "text.gguf").read_bytes()


def test_the_model_is_as_it_was(tmp_path: Path) -> None:
    model = models.tiny_llama(tied=True)
    isqtorch.quantize_(model, "q4k", progress=False)
    before: dict[str, Tensor] = {name: value.clone() for name, value in model.state_dict().items()}
    want = logits(model)
    isqtorch.export_gguf(model, tmp_path / "x.gguf", tokenizer=False)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(logits(model), want)


# ---- places ----------------------------------------------------------------------------------------------------------


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    model = models.tiny_llama()
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match="folder is a folder"):
        isqtorch.export_gguf(model, tmp_path / "folder", tokenizer=False)
    with pytest.raises(FileNotFoundError):
        isqtorch.export_gguf(model, tmp_path / "nowhere" / "x.gguf", tokenizer=False)


def test_the_file_of_the_model_itself(tmp_path: Path) -> None:
    models.tiny_llama().save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(FileExistsError, match="was loaded from"):
        isqtorch.export_gguf(model, tmp_path / "model.safetensors", tokenizer=False)


def command(*args: str | Path) -> int:
    return main(["export", "-m", MODEL, "--to", "gguf", *map(str, args)])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--isq", "q4k", "-o", tmp_path / "a.gguf") == 0
    assert f"wrote {tmp_path / 'a.gguf'}" in capsys.readouterr().err
    assert main(["quantize", "-m", MODEL, "--isq", "q4k", "-o", str(tmp_path / "packed")]) == 0
    packed = ["export", "-m", str(tmp_path / "packed"), "--to", "gguf", "--name", "model"]
    assert main([*packed, "-o", str(tmp_path / "b.gguf")]) == 0
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert command("-o", tmp_path / "a.gguf") == 1
    assert "exists" in capsys.readouterr().err
    assert command("-o", tmp_path / "a.gguf", "--force") == 0
    assert (tmp_path / "a.gguf").stat().st_size > 2 * (tmp_path / "b.gguf").stat().st_size


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-o", "there.txt", "--force"], "is not a GGUF file"),
        (["-o", "folder", "--force"], "is not a file"),
        (["-o", "link", "--force"], "is not a file"),
        (["-o", "nowhere/x.gguf"], "no folder"),
        (["-o", f"{MODEL}/x.gguf"], "lies in the folder of the model"),
        (["-o", "x.gguf", "--isq", "afq4"], "GGUF has no afq4"),
        (["-o", "x.gguf", "--isq", "nonsense"], "nonsense"),
        (["-o", "x", "--to", "mlx", "--isq", "q4k"], "MLX has no q4k"),
        (["-o", "x", "--to", "mlx", "--isq", "afq4g32", "--name", "x"], "--name and --pre-tokenizer are for --to gguf"),
        (["-o", "folder", "--to", "mlx"], "folder exists and is not an empty folder"),
        (["-o", "x.gguf", "--pre-tokenizer", "llama-bpe", "-m", "bert"], "'bert' cannot be written"),
    ],
)
def test_what_the_command_refuses(
    args: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.txt").write_text("mine")
    Path("folder").mkdir()
    Path("folder/mine").touch()
    Path("link").symlink_to("there.txt")
    models.tiny_bert().save_pretrained("bert")
    before = sorted(tmp_path.rglob("*"))
    assert command(*args) == 1
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("bytes_left", [100, 1 << 20])
def test_a_full_disk_is_one_line(tmp_path: Path, bytes_left: int) -> None:
    """A limit of the size of files stands for the disk."""
    run = subprocess.run(
        [sys.executable, "-m", "isqtorch", "export", "-m", MODEL, "--to", "gguf", "-o", str(tmp_path / "x.gguf")],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, bytes_left)),
    )
    assert run.returncode == 1 and "Traceback" not in run.stderr
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("isqtorch: ") and "x.gguf" in last
    assert not list(tmp_path.iterdir())


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the model is a NoneType, must be a model of transformers"):
        isqtorch.export_gguf(None, tmp_path / "x.gguf")  # type: ignore[arg-type]
