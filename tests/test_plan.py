"""plan: the report of quantize_, foreseen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import MoEModel, mlp, tiny_bert, tiny_gpt2, tiny_llama
from safetensors.torch import save_file
from torch import nn

from isqtorch import checkpoint
from isqtorch.inplace.quantize import quantize_
from isqtorch.report.plan import plan
from isqtorch.report.report import QuantReport


def facts(report: QuantReport) -> dict[str, tuple]:
    """What must agree, for every weight that is stored."""
    return {
        layer.name: (
            layer.shape,
            layer.role,
            layer.requested,
            layer.stored,
            layer.reason,
            layer.bytes_before,
            layer.bytes_after,
        )
        for layer in report.weights
    }


def totals(report: QuantReport) -> tuple:
    return (
        report.bytes_before,
        report.bytes_after,
        report.numel,
        report.rest_bytes,
        len(report.promoted),
        len(report.fallbacks),
    )


MODELS = {
    "llama": tiny_llama,
    "tied": lambda: tiny_llama(tied=True),
    "hidden288": lambda: tiny_llama(hidden=288),
    "gpt2": tiny_gpt2,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fmt", [4, "afq3", "q8_0"])
def test_a_checkpoint_folder_agrees_with_quantize(tmp_path: Path, name: str, fmt) -> None:
    model = MODELS[name]()
    model.save_pretrained(tmp_path)
    planned = plan(tmp_path, fmt)
    live = plan(model, fmt)
    real = quantize_(model, fmt)
    assert planned.planned and live.planned and not real.planned
    assert facts(planned) == facts(live) == facts(real)
    assert totals(planned) == totals(live) == totals(real)
    assert "to quantize" in str(planned)


def test_bert_agrees_where_names_tell_enough(tmp_path: Path) -> None:
    model = tiny_bert()
    model.save_pretrained(tmp_path)
    planned = plan(str(tmp_path), 4)
    assert totals(planned)[:3] == totals(quantize_(model, 4))[:3]


def test_options_apply(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    options = {"topology": {"0": "q8_0"}, "exclude": ["k_proj"], "fallback": "skip"}
    assert facts(plan(tmp_path, 3, **options)) == facts(quantize_(model, 3, **options))
    assert plan(mlp(), 4, device="mps")["0"].stored == "afq4"


def test_meta_models_need_no_memory() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(8192, 28672, bias=False) for _ in range(100)))
    report = plan(model, 4)
    assert report.bytes_before == 100 * 8192 * 28672 * 4 and report.bits_per_weight == 4.5


def test_a_model_of_a_live_moe() -> None:
    assert facts(plan(MoEModel(), 4, organization="moqe")) == facts(quantize_(MoEModel(), 4, organization="moqe"))


def numbered_experts(gate: str, up: str, down: str, experts: int = 4) -> dict[str, torch.Tensor]:
    parts = {gate: (64, 256), up: (64, 256), down: (256, 64)}
    return {
        f"model.layers.0.mlp.experts.{e}.{part}.weight": torch.zeros(shape, dtype=torch.bfloat16)
        for e in range(experts)
        for part, shape in parts.items()
        if part
    }


@pytest.mark.parametrize(
    "names", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("", "up_proj", "down_proj")]
)
def test_numbered_experts_of_a_transformers_model_are_joined(tmp_path: Path, names: tuple[str, str, str]) -> None:
    """As transformers 5 does when it loads them."""
    tensors = numbered_experts(*names)
    tensors |= {
        "model.layers.0.mlp.gate.weight": torch.zeros(4, 256),
        "model.layers.0.attn.q.weight": torch.zeros(64, 256),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    apart = plan(tmp_path, "q8_0")  # not known to be a transformers model
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe", "hidden_size": 256}')
    report = plan(tmp_path, "q8_0")
    assert (report.bytes_before, report.bytes_after) == (apart.bytes_before, apart.bytes_after)
    up = "gate_up_proj" if names[0] else "up_proj"
    rows = 128 if names[0] else 64
    assert report[f"model.layers.0.mlp.experts.{up}"].shape == (4, rows, 256)
    assert report["model.layers.0.mlp.experts.down_proj"].shape == (4, 256, 64)
    assert {layer.kind for layer in report.quantized} == {"experts", "linear"} and len(report.quantized) == 3
    assert "router" in report["model.layers.0.mlp.gate"].reason
    assert len(plan(tmp_path, "q8_0", organization="moqe").quantized) == 2


def test_experts_that_differ_are_not_joined(tmp_path: Path) -> None:
    tensors = numbered_experts("gate_proj", "up_proj", "down_proj")
    del tensors["model.layers.0.mlp.experts.3.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe"}')
    assert {layer.kind for layer in plan(tmp_path, 4).layers} == {"linear"}


def test_stacks_of_experts_in_a_file(tmp_path: Path) -> None:
    """Upright or transposed; which one, the width of the model tells."""
    tensors = {
        "model.layers.0.mlp.experts.gate_up_proj": torch.zeros(4, 288, 128),
        "model.layers.0.mlp.experts.gate_up_proj_bias": torch.zeros(4, 128),
        "model.layers.0.mlp.experts.down_proj": torch.zeros(4, 64, 288),
        "model.layers.1.block_sparse_moe.input_linear.weight": torch.zeros(4, 128, 288),
        "model.layers.1.block_sparse_moe.output_linear.weight": torch.zeros(4, 288, 64),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "x", "text_config": {"hidden_size": 288}}')
    report = plan(tmp_path, "q4k")
    for layer in report.quantized:
        assert layer.kind == "experts" and layer.shape == (
            (4, 288, 64) if "down" in layer.name or "output" in layer.name else (4, 128, 288)
        )
    assert len(report.quantized) == 4
    assert {layer.stored for layer in report.quantized} == {"q5_0"}  # no K is a multiple of 256


def test_one_file_and_shards(tmp_path: Path) -> None:
    weights = {f"layers.{i}.up.weight": torch.zeros(32, 256, dtype=torch.bfloat16) for i in range(4)}
    one = tmp_path / "one.safetensors"
    save_file(weights | {"conv.weight": torch.zeros(4, 3, 3, 3), "scale": torch.tensor(1.0)}, one)
    report = plan(one, "q4k")
    assert len(report.quantized) == 4 and report["conv"].reason == "convolutions are never quantized"
    assert report.rest_bytes == 4 and report.bytes_after == 4 * 32 * 144 + 432 + 4

    folder = tmp_path / "sharded"
    folder.mkdir()
    names = list(weights)
    for i in range(2):
        save_file({name: weights[name] for name in names[2 * i : 2 * i + 2]}, folder / f"part-{i}.safetensors")
    save_file(weights, folder / "consolidated.safetensors")  # as some repositories have it
    index = {"weight_map": {name: f"part-{i // 2}.safetensors" for i, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert len(plan(folder, "q4k").quantized) == 4


def test_head_stored_twice_counts_once(tmp_path: Path) -> None:
    table = torch.zeros(64, 256)
    save_file({"embed_tokens.weight": table, "lm_head.weight": table.clone()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true}')
    report = plan(tmp_path, 4)
    assert report["lm_head"].tied_to == "embed_tokens" and report.bytes_after == 64 * 210


def test_nothing_behind_the_header_is_read(tmp_path: Path) -> None:
    """A sparse file of a terabyte would not fit anywhere; a plan of it takes milliseconds."""
    header = json.dumps(
        {"up.weight": {"dtype": "BF16", "shape": [1 << 20, 1 << 19], "data_offsets": [0, 1 << 40]}}
    ).encode()
    path = tmp_path / "big.safetensors"
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        try:
            file.truncate(8 + len(header) + (1 << 40))
        except OSError:
            pytest.skip("the file system has no sparse files of this size")
    assert plan(path, 4).bytes_before == 1 << 40


@pytest.mark.parametrize(
    ("prepare", "error", "message"),
    [
        (lambda d: d / "nope", FileNotFoundError, "not a file or folder"),
        (lambda d: "./nope", FileNotFoundError, "not a file or folder"),
        (lambda d: "nope.safetensors", FileNotFoundError, "not a file or folder"),
        (lambda d: d, FileNotFoundError, "holds no .safetensors file"),
        (lambda d: _write(d / "x.safetensors", b"\x08\0\0\0\0\0\0\0{}"), ValueError, "not a complete safetensors file"),
        (lambda d: _write(d / "model.safetensors.index.json", b"[]").parent, ValueError, "is not a JSON object"),
        (lambda d: _write(d / "model.safetensors.index.json", b"{}").parent, ValueError, "'weight_map' must map"),
        (
            lambda d: _write(d / "model.safetensors.index.json", b'{"weight_map": {"a": "../x.safetensors"}}').parent,
            ValueError,
            "is not a plain file name",
        ),
        (
            lambda d: _write(d / "model.safetensors.index.json", b'{"weight_map": {"a": "x.safetensors"}}').parent,
            FileNotFoundError,
            "x.safetensors: no such file",
        ),
        (lambda d: 7, TypeError, "must be an nn.Module, a path or a model id, got int"),
    ],
)
def test_bad_sources(tmp_path: Path, prepare, error, message: str) -> None:
    with pytest.raises(error, match=message):
        plan(prepare(tmp_path), 4)


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_a_quantized_checkpoint_is_refused(tmp_path: Path) -> None:
    model = mlp()
    quantize_(model, 4)
    checkpoint.save(model, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="quantized by isqtorch already"):
        plan(tmp_path, 4)


def test_the_hub_is_explained_when_it_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(repo: str) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", refuse)
    with pytest.raises(
        OSError, match=r"cannot read the headers of 'owner/name' from the Hub \(ConnectionError: no route"
    ):
        plan("owner/name", 4)


def test_headers_from_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub
    from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo

    tensors = {
        "wte.weight": TensorInfo("BF16", [64, 256], (0, 1)),
        "h.0.mlp.c_fc.weight": TensorInfo("BF16", [256, 512], (0, 1)),
    }
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "gpt2", "tie_word_embeddings": true}')
    repo = SafetensorsRepoMetadata(None, False, {}, {"model.safetensors": SafetensorsFileMetadata({}, tensors)})
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda repo_id: repo)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo_id, name: str(config))
    report = plan("owner/name", 4)
    assert report["h.0.mlp.c_fc"].shape == (512, 256) and report["wte"].stored == "q6k"
    assert "the output head is tied to wte (tie_word_embeddings) and shares its bytes" in report.notes
