"""What was quantized is saved and loaded again without a bit changed, however it came to be; and files that lie are refused."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hf import MODELS, load, logits
from models import state_bytes
from safetensors.torch import load_file

import isqtorch
from isqtorch import IsqConfig, checkpoint
from isqtorch.integrations.transformers.skeleton import packed_formats

Folders = Callable[[str], Path]


def reload(model: Any, folder: Path, **options: Any) -> Any:
    """Save, load, and check that nothing changed."""
    model.save_pretrained(folder, **options)
    again = load(folder)
    assert state_bytes(again) == state_bytes(model)
    assert [str(module) for module in again.modules()] == [str(module) for module in model.modules()]
    assert torch.equal(logits(again), logits(model))
    return again


def stored_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


# ---- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_round_trips(checkpoints: Folders, tmp_path: Path, name: str) -> None:
    """Also of what was loaded itself, and after forwards (`reload` computes logits)."""
    model = load(checkpoints(name), quantization_config=IsqConfig("q4k"))
    again = reload(model, tmp_path / "1")
    third = reload(again, tmp_path / "2")
    assert (tmp_path / "1/config.json").read_text() == (tmp_path / "2/config.json").read_text()
    assert third.config.quantization_config.to_dict() == model.config.quantization_config.to_dict()


def test_tied_weights_are_stored_once(checkpoints: Folders, tmp_path: Path) -> None:
    from safetensors import safe_open

    again = reload(load(checkpoints("tied"), quantization_config=IsqConfig("q4k")), tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()
        assert file.get_slice("model.embed_tokens.weight").get_dtype() == "U8"


def test_shards_and_the_layout_of_this_version(llama: Path, tmp_path: Path) -> None:
    model = load(llama, quantization_config=IsqConfig("afq4"))
    reload(model, tmp_path, max_shard_size="100kB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    reload(model, tmp_path, save_original_format=False)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]


def test_saving_over_the_files_that_are_mapped(llama: Path, tmp_path: Path) -> None:
    load(llama, quantization_config=IsqConfig("q4k")).save_pretrained(tmp_path)
    model = load(tmp_path)
    before = state_bytes(copy.deepcopy(model))
    reload(model, tmp_path)
    assert state_bytes(model) == before


def test_what_config_json_holds(llama: Path, tmp_path: Path) -> None:
    topology = tmp_path / "topology.yaml"
    topology.write_text("0: q6k\n/o_proj/: null\n1: {isq: 5}\n")
    imatrix = {f"model.layers.{i}.mlp.up_proj": torch.ones(256) for i in range(2)}
    config = IsqConfig(4, topology=topology, imatrix=imatrix, exclude="v_proj", modules_to_not_convert=["lm_head"])
    model = load(llama, quantization_config=config)
    topology.unlink()
    reload(model, tmp_path / "saved")
    layer = dict.fromkeys(("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", "self_attn.k_proj", "self_attn.q_proj"))
    assert stored_config(tmp_path / "saved") == {
        "quant_method": "isq",
        "format_version": 1,
        "isqtorch_version": isqtorch.__version__,
        "isq": 4,
        "topology": {"0": "q6k", "/o_proj/": None, "1": 5},
        "imatrix": "imatrix",
        "exclude": ["v_proj"],
        "modules_to_not_convert": ["lm_head"],
        "layers": {
            "model.embed_tokens": "q5k",
            **{f"model.layers.0.{name}": "q6k" for name in layer},
            **{f"model.layers.1.{name}": "q5k" for name in layer},
        },
    }


def test_the_base_model_and_other_heads(llama: Path, tmp_path: Path) -> None:
    """Paths begin differently in a model and in its base; each loads what the other saved."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    model = load(llama, quantization_config=IsqConfig("q4k"))
    model.save_pretrained(tmp_path / "whole")
    base = AutoModel.from_pretrained(tmp_path / "whole")
    assert state_bytes(base) == state_bytes(model.model)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole", num_labels=2)
    assert state_bytes(classifier.model) == state_bytes(model.model) and type(classifier.score) is torch.nn.Linear
    base.save_pretrained(tmp_path / "base")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert state_bytes(whole.model) == state_bytes(model.model) and type(whole.lm_head) is torch.nn.Linear


def test_offloaded_to_disk(llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = load(llama, quantization_config=IsqConfig("q4k"))
    model.save_pretrained(tmp_path / "saved")
    device_map = {"model": "cpu", "lm_head": "disk"}
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", device_map=device_map, offload_folder=tmp_path / "off"
    )
    assert again.lm_head.weight.device.type == "meta" and torch.equal(logits(again), logits(model))


def test_push_to_hub_uploads_what_is_saved(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedModel, modeling_utils

    class Hub:
        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return type("Url", (), {"repo_id": repo_id})

    class Card:
        def save(self, path: str) -> None:
            Path(path).write_text("card")

    uploaded: dict[str, bytes] = {}

    def upload(self: Any, folder: str, repo_id: str, *_: Any, **__: Any) -> None:
        uploaded.update({path.name: path.read_bytes() for path in Path(folder).iterdir()})

    monkeypatch.setattr(modeling_utils, "hf_api", Hub)
    monkeypatch.setattr(modeling_utils, "create_and_tag_model_card", lambda *_, **__: Card())
    monkeypatch.setattr(PreTrainedModel, "_upload_modified_files", upload)
    model = load(llama, quantization_config=IsqConfig("q4k"))
    model.save_pretrained(tmp_path / "there", push_to_hub=True, repo_id="me/model")
    (tmp_path / "downloaded").mkdir()
    for name, content in uploaded.items():
        (tmp_path / "downloaded" / name).write_bytes(content)
    assert state_bytes(load(tmp_path / "downloaded")) == state_bytes(model)


# ---- models that were quantized after loading ------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_quantize_leaves_a_model_as_loading_does(checkpoints: Folders, tmp_path: Path, name: str) -> None:
    deferred, immediate = load(checkpoints(name)), load(checkpoints(name), quantization_config=IsqConfig(4))
    report = isqtorch.quantize_(deferred, 4)
    assert deferred.isq_report is report
    for attribute in ("is_quantized", "quantization_method"):
        assert getattr(deferred, attribute) == getattr(immediate, attribute)
    assert deferred.config.to_dict() == immediate.config.to_dict()
    assert deferred.config._is_quantized and type(deferred.hf_quantizer) is type(immediate.hf_quantizer)
    reload(deferred, tmp_path)


def whole_trunk(model: Any) -> None:
    """A trunk that was quantized by itself, in the model around it."""
    trunk = copy.deepcopy(model.model)
    isqtorch.quantize_(trunk, "q4k")
    model.model = trunk


def one_block(model: Any) -> None:
    isqtorch.quantize_(model.model.layers[1], "q8_0")


def half_way(model: Any) -> None:
    """Memory ran out while the model was quantized."""
    from isqtorch.inplace import quantize

    calls, real = iter(range(100)), quantize.pack_weight

    def pack_weight(*args: Any) -> torch.Tensor:
        if next(calls) == 3:
            raise MemoryError
        return real(*args)

    with mock.patch.object(quantize, "pack_weight", pack_weight), pytest.raises(MemoryError):
        isqtorch.quantize_(model, "q5k")


@pytest.mark.parametrize("change", [whole_trunk, one_block, half_way])
def test_layers_that_came_into_the_model_by_hand(llama: Path, tmp_path: Path, change: Callable[[Any], None]) -> None:
    """Nothing has recorded them yet: the model around them was never quantized."""
    model = load(llama)
    change(model)
    assert not hasattr(model, "hf_quantizer")
    reload(model, tmp_path)
    assert stored_config(tmp_path)["layers"] == packed_formats(model) != {}


def test_a_class_of_ones_own_around_a_model(llama: Path, tmp_path: Path) -> None:
    """Its save_pretrained leaves the packed part to transformers, which records it."""

    class Own(torch.nn.Module):
        def __init__(self, part: Any) -> None:
            super().__init__()
            self.part, self.head = part, torch.nn.Linear(8, 8)

        def save_pretrained(self, folder: Path) -> None:
            self.part.save_pretrained(folder)

    model = Own(load(llama, quantization_config=IsqConfig("q4k")))
    model.save_pretrained(tmp_path)
    assert state_bytes(load(tmp_path)) == state_bytes(model.part)


def test_adapters_are_saved_by_themselves(llama: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = load(llama)
    isqtorch.quantize_(model.model.layers[0], "q4k")  # and nothing has recorded it
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved and all("lora" in name for name in saved)


def test_importance_and_rule_are_recorded(llama: Path, tmp_path: Path) -> None:
    """As loading with IsqConfig records them: by the file's name; not where no layer used it."""
    columns = {f"model.layers.{i}.mlp.up_proj": torch.rand(256) + 0.1 for i in range(2)}
    isqtorch.Imatrix(columns).save(tmp_path / "mine.cimatrix")
    options = {"imatrix": tmp_path / "mine.cimatrix", "rule": "search"}
    immediate, deferred = load(llama, quantization_config=IsqConfig("afq4", **options)), load(llama)
    isqtorch.quantize_(deferred, "afq4", **options)
    assert deferred.config.to_dict() == immediate.config.to_dict()
    assert state_bytes(deferred) == state_bytes(immediate)
    assert immediate.isq_report.imatrix == "mine.cimatrix" and immediate.isq_report.rule == "search"
    reload(deferred, tmp_path / "saved")
    written = stored_config(tmp_path / "saved")
    assert written["imatrix"] == "mine.cimatrix" and written["rule"] == "search"
    isqtorch.requantize_(deferred, "q8_0", imatrix=columns)
    deferred.save_pretrained(tmp_path / "again")
    assert not {"imatrix", "rule"} & set(stored_config(tmp_path / "again"))


def test_requantize_and_dequantize(llama: Path, tmp_path: Path) -> None:
    model = load(llama, quantization_config=IsqConfig("q8_0"))
    isqtorch.requantize_(model, "q3k", include="mlp")
    again = reload(model, tmp_path / "again")
    assert stored_config(tmp_path / "again")["layers"]["model.layers.0.mlp.up_proj"] == "q3k"
    assert again.model.layers[0].self_attn.q_proj.format == "q8_0"
    isqtorch.dequantize_(model)
    assert not hasattr(model.config, "quantization_config") and not model.is_quantized and model.isq_report is None
    model.save_pretrained(tmp_path / "float")
    assert "quantization_config" not in json.loads((tmp_path / "float/config.json").read_text())
    assert state_bytes(load(tmp_path / "float")) == state_bytes(model)
    model.half()  # transformers refuses this for quantized models


def test_dequantize_of_transformers(llama: Path, tmp_path: Path) -> None:
    model = load(llama, quantization_config=IsqConfig("q8_0"))
    model.save_pretrained(tmp_path / "packed")  # turns config.dtype into a string
    model.dequantize()
    assert type(model.lm_head) is torch.nn.Linear and model.lm_head.weight.dtype == torch.bfloat16
    reload(model, tmp_path / "float")


def test_one_file_loaded_into_a_model(llama: Path, tmp_path: Path) -> None:
    model = load(llama, quantization_config=IsqConfig("q4k"))
    checkpoint.save(model, tmp_path / "one.safetensors")
    again = load(llama)
    checkpoint.load_(again, tmp_path / "one.safetensors")
    assert state_bytes(reload(again, tmp_path / "folder")) == state_bytes(model)


@pytest.mark.parametrize("name", MODELS)
def test_what_the_command_writes(checkpoints: Folders, tmp_path: Path, name: str) -> None:
    """`isqtorch quantize` writes one file and the configuration; transformers loads that, too."""
    model = load(checkpoints(name))
    isqtorch.quantize_(model, "q4k")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    checkpoint.save(model, tmp_path / "model.safetensors")
    assert state_bytes(load(tmp_path, dtype=model.dtype)) == state_bytes(model)


def test_plan_takes_the_original_model(packed: Path) -> None:
    with pytest.raises(ValueError, match="is quantized by isqtorch already; plan takes the original model"):
        isqtorch.plan(packed, "q4k")


def test_a_layer_that_the_user_took_out(llama: Path, tmp_path: Path) -> None:
    """config.json describes the model as it is when it is saved."""
    model = load(llama, quantization_config=IsqConfig("q4k"))
    model.set_submodule("lm_head", torch.nn.Linear(256, 512, bias=False, dtype=torch.bfloat16))
    reload(model, tmp_path)
    assert "lm_head" not in stored_config(tmp_path)["layers"]


def test_copies_are_independent(llama: Path, tmp_path: Path) -> None:
    model = load(llama, quantization_config=IsqConfig("q4k"))
    other = copy.deepcopy(model)
    isqtorch.dequantize_(other)
    reload(model, tmp_path)


# ---- registration ----------------------------------------------------------------------------------------------------

READ = "m = AutoModelForCausalLM.from_pretrained({folder!r}); assert m.lm_head.format == 'q6k'"


@pytest.mark.parametrize(
    "imports",
    [
        "import isqtorch, importlib; importlib.reload(isqtorch)\nfrom transformers import AutoModelForCausalLM",
        "import transformers.modeling_utils, isqtorch\nfrom transformers import AutoModelForCausalLM",
    ],
)
def test_a_saved_model_loads_after_importing_isqtorch(packed: Path, imports: str) -> None:
    script = f"{imports}\n{READ.format(folder=str(packed))}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_without_isqtorch_loading_fails_loudly(packed: Path) -> None:
    script = f"from transformers import AutoModelForCausalLM\n{READ.format(folder=str(packed))}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert "Unknown quantization type, got isq" in done.stdout + done.stderr


def test_an_old_transformers_is_named(tmp_path: Path) -> None:
    """Everything but IsqConfig works with it."""
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers/__init__.py").write_text("__version__ = '5.22.2'\n")
    (tmp_path / "transformers/modeling_utils.py").write_text("")
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import isqtorch, transformers.modeling_utils\n"
        "try: isqtorch.IsqConfig\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith("isqtorch.IsqConfig needs transformers >= 5.23, this is 5.22.2. Upgrade it")
