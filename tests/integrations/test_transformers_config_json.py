"""What config.json of a packed folder may not say: an error that names it, before anything is computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hf import load
from safetensors.torch import load_file

import isqtorch
from isqtorch import IsqConfig


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format_version=2), "format_version 2, newer than 1, .* Upgrade isqtorch"),
        (lambda c: c.update(format_version="1"), "format_version is '1', must be a positive number"),
        (lambda c: c.update(format_version=True), "format_version is True"),
        (lambda c: c.pop("layers"), "has no 'layers'"),
        (lambda c: c.update(layers=[1]), "'layers' must map paths of layers to formats, got list"),
        (lambda c: c["layers"].update({"lm_head": 4}), "'layers' must map strings to strings, got 'lm_head': 4"),
        (lambda c: c["layers"].update({"lm_head": "q9z"}), "layer 'lm_head': .*q9z"),
        (
            lambda c: c["layers"].update({"model.nothing": "q4k"}),
            "'model.nothing', which LlamaForCausalLM does not have",
        ),
        (lambda c: c["layers"].update({"model.norm": "q4k"}), "model.norm is packed as q4k, but it is a LlamaRMSNorm"),
        (lambda c: c["layers"].update({"model": "q4k"}), "model is packed as q4k, but it is a LlamaModel"),
        (lambda c: c["layers"].update({"model.layers.0.mlp.up_proj": "q8_0"}), "no weight of that shape"),
        (lambda c: c["layers"].pop("lm_head"), "lm_head.weight is U8 in the file, and not packed according to config"),
    ],
)
def test_lies_of_config_json(packed: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    from transformers import AutoModelForCausalLM

    rewrite(packed, change)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(packed, ignore_mismatched_sizes=True)


def test_a_format_that_does_not_fit(tmp_path: Path) -> None:
    from models import tiny_llama
    from transformers import AutoModelForCausalLM

    model = tiny_llama(hidden=192)
    isqtorch.quantize_(model, "q8_0")
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda c: c["layers"].update({"lm_head": "q4k"}))
    with pytest.raises(ValueError, match="lm_head is packed as q4k, but its 192 columns are not a multiple of 256"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_tied_layers_with_two_formats(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    load(checkpoints("tied"), quantization_config=IsqConfig("q4k")).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda c: c["layers"].update({"lm_head": "q4k"}))
    with pytest.raises(ValueError, match=r"lm_head \(q4k\) and model.embed_tokens \(q6k\) share one weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_float_weights_behind_a_packed_config(packed: Path, llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    (packed / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"weight is BF16 in the file, and packed according to config.json"):
        AutoModelForCausalLM.from_pretrained(packed)


def test_a_shard_that_is_missing_weights(packed: Path) -> None:
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    state = load_file(packed / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file({name: tensor.clone() for name, tensor in state.items()}, packed / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match="model.layers.1.mlp.up_proj is packed as q4k, and the checkpoint has no weight"
    ):
        AutoModelForCausalLM.from_pretrained(packed)


def test_another_config_for_a_packed_model(packed: Path) -> None:
    with pytest.warns(UserWarning, match="The `quantization_config` from the model will be used"):
        model = load(packed, quantization_config=IsqConfig("q8_0"))
    assert model.model.layers[0].mlp.up_proj.format == "q4k"


def test_layers_are_not_an_option(llama: Path) -> None:
    with pytest.raises(ValueError, match="'layers' describes a saved model"):
        load(llama, quantization_config=IsqConfig("q4k", layers={"lm_head": "q4k"}))
