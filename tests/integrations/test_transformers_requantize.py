"""requantize_ on transformers models: the checkpoint is found again, and read as loading reads it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hf import MODELS, load
from models import state_bytes
from moe_models import FAMILIES, build
from safetensors.torch import load_file, save_file
from synthetic import write_llama

from isqtorch import IsqConfig, quantize_, requantize_

Folders = Callable[[str], Path]
HERE = Path(__file__).resolve().parent


def same(a: Any, b: Any) -> None:
    assert state_bytes(a) == state_bytes(b)
    assert {n: type(m) for n, m in a.named_modules()} == {n: type(m) for n, m in b.named_modules()}
    assert a.config.to_dict() == b.config.to_dict()
    assert {e.name: e.stored for e in a.isq_report.layers} == {e.name: e.stored for e in b.isq_report.layers}


@pytest.mark.parametrize("immediate", [True, False], ids=["immediate", "deferred"])
@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_model_quantized_afresh(checkpoints: Folders, name: str, immediate: bool) -> None:
    folder = checkpoints(name)
    model = load(folder, quantization_config=IsqConfig("q2k")) if immediate else load(folder)
    if not immediate:
        quantize_(model, "q2k")
    report = requantize_(model, "q8_0")
    same(model, load(folder, quantization_config=IsqConfig("q8_0")))
    assert f"made from the weights in {folder}" in report.notes


@pytest.mark.parametrize("family", FAMILIES)
def test_experts(family: str, tmp_path: Path) -> None:
    """Matrices that are joined into stacks, turned or renamed while loading are so again."""
    build(family).save_pretrained(tmp_path)
    cls = type(build(family))

    def loaded(fmt: str) -> Any:
        return cls.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=IsqConfig(fmt))

    model = loaded("q4_0")
    requantize_(model, "q8_0")
    same(model, loaded("q8_0"))
    deferred = cls.from_pretrained(tmp_path, dtype=torch.bfloat16)
    quantize_(deferred, "q4_0")
    requantize_(deferred, "q8_0", source=tmp_path)
    assert state_bytes(deferred) == state_bytes(model)


def test_options_of_the_config_stay_in_force(llama: Path) -> None:
    config = {"topology": {"0": "q6k"}, "exclude": ["v_proj"], "modules_to_not_convert": ["lm_head"]}
    model = load(llama, quantization_config=IsqConfig("q2k", **config))
    requantize_(model, "q8_0")
    assert state_bytes(model) == state_bytes(load(llama, quantization_config=IsqConfig("q8_0", **config)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_cast_as_while_loading(llama: Path, dtype: torch.dtype) -> None:
    model = load(llama, dtype=dtype, quantization_config=IsqConfig("q2k"))
    requantize_(model, "afq4")  # its scales have the type of the weights
    same(model, load(llama, dtype=dtype, quantization_config=IsqConfig("afq4")))


def test_shards_prefixes_and_a_path_that_was_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModel

    MODELS["llama"]().save_pretrained(tmp_path / "model", max_shard_size="1MB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    monkeypatch.chdir(tmp_path)
    model = AutoModel.from_pretrained("model")  # "model.layers..." in the files, "layers..." in this model
    quantize_(model, "q2k")
    monkeypatch.chdir("/")
    requantize_(model, "q8_0")
    want = AutoModel.from_pretrained(tmp_path / "model", quantization_config=IsqConfig("q8_0"))
    assert state_bytes(model) == state_bytes(want)


def test_a_model_from_the_hubs_cache(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found in the cache by name and commit, without the network, which the tests do not have."""
    from huggingface_hub import constants, file_download

    folder = tmp_path / "models--someone--llama"
    commit = "0123456789" * 4
    (folder / "snapshots").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(commit)
    os.symlink(llama, folder / "snapshots" / commit, target_is_directory=True)
    for module in (constants, file_download):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path), raising=False)
    model = load(llama)
    model.config._name_or_path, model.config._commit_hash = "someone/llama", commit
    quantize_(model, "q2k")
    (folder / "refs/main").write_text("f" * 40)
    report = requantize_(model, "q8_0")
    assert any("models--someone--llama" in note for note in report.notes)
    assert state_bytes(model) == state_bytes(load(llama, quantization_config=IsqConfig("q8_0")))


# ---- weights that the checkpoint does not have -----------------------------------------------------------------------


def test_merged_before_quantizing(llama: Path) -> None:
    """What merging adapters leaves: norms are those of the checkpoint, and the weights nearly so."""
    model = load(llama)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    quantize_(model, "q4k")
    before = state_bytes(model)
    with pytest.raises(
        ValueError,
        match=r"layers\.1\.mlp\.up_proj\.weight \(by up to .*\) was not what the checkpoint has when .* Give source",
    ):
        requantize_(model, "q8_0")
    assert state_bytes(model) == before
    requantize_(model, "q3k", source="stored")
    with pytest.raises(ValueError, match="was not what the checkpoint has"):
        requantize_(model, "q8_0")
    requantize_(model, "q5k", source=llama)  # the user knows better, and is asked once
    requantize_(model, "q8_0")
    assert state_bytes(model) == state_bytes(load(llama, quantization_config=IsqConfig("q8_0")))


def test_trained_after_quantizing(llama: Path) -> None:
    model = load(llama, quantization_config=IsqConfig("q4k"))
    with torch.no_grad():
        model.model.norm.weight[5] += 0.25
    with pytest.raises(ValueError, match=r"model\.norm\.weight \(by up to .*\) is not what .* has"):
        requantize_(model, "q8_0")


def test_a_checkpoint_that_is_gone(tmp_path: Path) -> None:
    MODELS["llama"]().save_pretrained(tmp_path)
    model = load(tmp_path, quantization_config=IsqConfig("q4k"))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors: no such file\. Give source="):
        requantize_(model, "q8_0")


def test_new_heads_and_heads_of_another_size(llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification as Auto

    model = Auto.from_pretrained(llama, num_labels=40, quantization_config=IsqConfig("q4k"))
    head = model.score.weight.detach().clone()
    requantize_(model, "q8_0")  # the head from what it is
    assert torch.equal(model.score.weight, torch.ops.isqtorch.quantize(head, "q8_0"))
    with pytest.raises(ValueError, match=r"has no score\.weight\. Give source=.* or exclude the layer"):
        requantize_(model, "q5_0")
    requantize_(model, "q5_0", exclude="score")
    Auto.from_pretrained(llama, num_labels=64).save_pretrained(tmp_path)
    options = {"num_labels": 48, "ignore_mismatched_sizes": True}
    other = Auto.from_pretrained(tmp_path, quantization_config=IsqConfig("q4k"), **options)
    assert requantize_(other, "q8_0", exclude="score")["score"].stored is None


def test_a_packed_checkpoint(llama: Path, tmp_path: Path) -> None:
    load(llama, quantization_config=IsqConfig("q4k")).save_pretrained(tmp_path)
    model = load(tmp_path)
    with pytest.raises(ValueError, match="not known where"):
        requantize_(model, "q8_0")
    with pytest.raises(ValueError, match=f"{tmp_path}: is quantized by isq itself"):
        requantize_(model, "q8_0", source=tmp_path)
    requantize_(model, "q8_0", source=llama)
    assert state_bytes(model) == state_bytes(load(llama, quantization_config=IsqConfig("q8_0")))


def test_adapters_are_not_lost(llama: Path) -> None:
    """The layers of a model in PEFT's wrapper have other names: an error, and the stored weights if they are asked for."""
    peft = pytest.importorskip("peft")
    model = load(llama, quantization_config=IsqConfig("q8_0"))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"not known where|base_layer"):
        requantize_(wrapped, "q4_0")
    requantize_(wrapped, "q4_0", source="stored")
    assert model.model.layers[0].self_attn.q_proj.base_layer.format == "q4_0"


def lose(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]


def widen(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors[name] = torch.cat([tensors[name]] * 2)


def narrow(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        if ".1.mlp.experts." in name:
            tensors[name] = tensors[name][:32].clone()


@pytest.mark.parametrize("change", [lose, widen, narrow])
def test_damaged_experts_are_named(tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    built = build("qwen3_moe")
    built.save_pretrained(tmp_path)
    model = type(built).from_pretrained(tmp_path, quantization_config=IsqConfig("q4_0"))
    before = state_bytes(model)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"requantize_: .*layers\.1\.mlp\.experts\.(gate_up|down)_proj"):
        requantize_(model, "q8_0")
    assert state_bytes(model) == before


# ---- while it runs ---------------------------------------------------------------------------------------------------


def test_generating_threads_see_one_model_or_the_other(llama: Path) -> None:
    model = load(llama, quantization_config=IsqConfig("q2k")).eval()
    ids, stop = torch.arange(24)[None], threading.Event()
    results: list[torch.Tensor] = []

    def run() -> None:
        with torch.no_grad():
            while not stop.is_set():
                results.append(model(ids).logits)

    want = []
    for fmt in ("q8_0", "q2k"):
        requantize_(model, fmt)
        with torch.no_grad():
            want.append(model(ids).logits)
    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for fmt in ("q8_0", "q2k", "q8_0"):
            requantize_(model, fmt)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    which = {next((i for i, y in enumerate(want) if torch.equal(y, result)), None) for result in results}
    assert which == {0, 1}, "a mixture" if None in which else "the model did not change"


# ---- memory ----------------------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys
sys.path[:0] = [{root!r}, {here!r}]
import torch
from benchmarks.models.memory import Peak
from transformers import AutoModelForCausalLM
import isqtorch
model = AutoModelForCausalLM.from_pretrained({folder!r}, quantization_config=isqtorch.IsqConfig("q4_0"))
isqtorch.requantize_(model, "q4_0", include="layers.0.self_attn.k_proj")  # first-time costs
with Peak() as memory:
    report = isqtorch.requantize_(model, "q8_0", include="")
print(json.dumps({{"before": report.bytes_before, "after": report.bytes_after, **memory.peak}}))
"""


@pytest.fixture
def wide(tmp_path: Path) -> Iterator[Path]:
    """201 MB in bf16, the largest weight 34 MB."""
    write_llama(tmp_path, 1, "90MB")
    yield tmp_path
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_is_both_packed_models_and_one_weight(wide: Path) -> None:
    script = SCRIPT.format(root=str(HERE.parents[1]), here=str(HERE), folder=str(wide))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    taken = json.loads(done.stdout)
    weight = 2048 * 8192 * 2
    assert taken["after"] > 1.8 * taken["before"] * 0.9
    assert taken["total"] < 1.05 * taken["after"] + weight + (8 << 20), taken  # the old model was there before
