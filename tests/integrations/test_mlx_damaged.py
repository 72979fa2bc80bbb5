"""MLX folders that are damaged or hostile: an error that names the file, and no memory out of proportion."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from mlx_folders import converted, write
from test_mlx import BF16, CPU, FOUR, empty, llama, opened, switched
from torch import Tensor

import isqtorch
from isqtorch.integrations.checkpoints.assemble import assemble
from isqtorch.integrations.checkpoints.mlx.checkpoint import MlxCheckpoint
from isqtorch.integrations.checkpoints.mlx.settings import is_mlx
from tests.models import tiny_moe

UP = "model.layers.0.mlp.up_proj"


def folder_with(tmp_path: Path, quantization: Any = FOUR, **changes: Tensor | None) -> Path:
    """A folder of a small model with some tensors of `UP` replaced, or left out (None)."""
    source = llama(layers=1)
    tensors, _ = converted(source, lambda path: FOUR)
    for leaf, tensor in changes.items():
        tensors.pop(f"{UP}.{leaf}", None)
        tensors |= {} if tensor is None else {f"{UP}.{leaf}": tensor}
    return write(tmp_path, tensors, source.config.to_dict(), quantization=quantization)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"bits": 7, "group_size": 64}, r"'bits' is 7, affine has 1, 2, 3, 4, 5, 6, 8"),
        ({"bits": 10**9, "group_size": 64}, r"'bits' is 1000000000"),
        ({"bits": "4", "group_size": 64}, r"'bits' is '4'"),
        ({"bits": True, "group_size": 64}, r"'bits' is True"),
        ({"bits": 4, "group_size": 0}, r"'group_size' is 0, affine has 32, 64, 128"),
        ({"bits": 4, "group_size": -64}, r"'group_size' is -64"),
        ({"bits": 4, "group_size": 64.0}, r"'group_size' is 64\.0"),
        ({"bits": 4, "group_size": 64, "mode": "affin"}, r"'mode' is 'affin', must be one of affine, mxfp4"),
        ({"bits": 4, "group_size": 64, "mode": ["affine"]}, r"'mode' is \['affine'\]"),
        ({"bits": 8, "group_size": 32, "mode": "mxfp4"}, r"'bits' is 8, mxfp4 has 4"),
        ([4, 64], r"'quantization' must be an object, got list"),
        (FOUR | {UP: {"bits": 11}}, r"quantization\['model\.layers\.0\.mlp\.up_proj'\]: 'bits' is 11"),
        (
            FOUR | {UP: {"bits": 8, "group_size": 64}},
            r"up_proj: 32 words and 4 scales in a row are not affine with 8 bits",
        ),
        (FOUR | {UP: False}, r"up_proj has scales, so it is quantized, and config\.json does not say how"),
        (FOUR | {"model.layers.9.x": FOUR}, r"config\.json says that model\.layers\.9\.x is quantized, and the files"),
        (FOUR | {"model.norm": FOUR}, r"config\.json says that model\.norm is quantized"),
        (None, r"\.scales|has scales, so it is quantized"),
    ],
)
def test_settings_that_make_no_sense_are_errors(quantization: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        opened(folder_with(tmp_path, quantization))


def words(rows: int = 512, columns: int = 32) -> Tensor:
    return torch.zeros(rows, columns, dtype=torch.uint32)


def scales(rows: int = 512, columns: int = 4, dtype: torch.dtype = BF16) -> Tensor:
    return torch.zeros(rows, columns, dtype=dtype)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": None}, r"up_proj\.weight is quantized \(uint32\), and .*up_proj\.scales is missing"),
        ({"biases": None}, r"up_proj\.biases is missing"),
        ({"weight": words().int()}, r"up_proj\.weight must be uint32 \[\.\., N, words\], got I32"),
        ({"weight": words().float()}, r"up_proj\.weight must be uint32 .* got F32"),
        ({"weight": words(511)}, r"up_proj\.scales is BF16 \[512, 4\], which does not fit weight U32 \[511, 32\]"),
        ({"weight": words(512, 31)}, r"up_proj: 31 words and 4 scales in a row are not"),
        ({"weight": words(512, 0)}, r"up_proj\.weight must be uint32"),
        ({"weight": words()[:, 0]}, r"up_proj\.weight must be uint32"),
        ({"scales": scales(512, 5)}, r"up_proj\.biases is BF16 \[512, 4\], which does not fit scales BF16 \[512, 5\]"),
        ({"scales": scales(dtype=torch.int32)}, r"up_proj\.scales must be of a float type or uint8, got I32"),
        ({"scales": scales(dtype=torch.uint8)}, r"up_proj\.scales is U8, which affine does not have|are not"),
        ({"biases": scales(dtype=torch.uint8)}, r"up_proj\.biases is U8 \[512, 4\], which does not fit"),
        ({"biases": scales(256)}, r"up_proj\.biases is BF16 \[256, 4\], which does not fit"),
        ({"scales": scales() / 0}, r"up_proj"),
        (
            {"weight": words(256), "scales": scales(256), "biases": scales(256)},
            r"up_proj\.weight is .* and the configuration",
        ),
        (
            {"weight": words(512, 48), "scales": scales(512, 6), "biases": scales(512, 6)},
            r"up_proj: 48 words and 6 scales in a row are not affine with 4 bits in groups of 64, and the layer has 256",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_errors(changes: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        opened(folder_with(tmp_path, **changes))


def test_an_index_that_points_elsewhere_is_an_error(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    (folder / "model.safetensors").rename(tmp_path.parent / "elsewhere.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match="not a plain file name"):
        MlxCheckpoint(folder)
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"model-00001-of-00002\.safetensors: no such file"):
        MlxCheckpoint(folder)


def test_a_folder_without_config_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json, so it is no MLX folder"):
        MlxCheckpoint(tmp_path)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "falcon_h1", "nonsense", None, 7, ["llama"]])
def test_architectures_whose_layout_is_not_known_are_refused(model_type: Any, tmp_path: Path) -> None:
    """mlx-lm folds factors into the weights of falcon_h1 and joins others of deepseek_v3: names alone do not tell."""
    folder = write(tmp_path, {"a": torch.zeros(1)}, {"model_type": model_type}, quantization=FOUR)
    with pytest.raises(ValueError, match=r"not known how MLX stores the weights of model_type .* Known are .*llama"):
        MlxCheckpoint(folder)


def test_folders_of_other_quantizers_are_not_taken_for_mlx(tmp_path: Path) -> None:
    entry = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    folder = write(tmp_path, {"a": torch.zeros(1)}, {"model_type": "llama"}, quantization_config=entry)
    assert not is_mlx(json.loads((folder / "config.json").read_text()))
    with pytest.raises(ValueError, match=r"'quant_method' is 'gptq', so this is a quantized folder of another program"):
        MlxCheckpoint(folder)


def test_a_configuration_that_transformers_refuses_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    config = json.loads((folder / "config.json").read_text()) | {"hidden_size": "wide"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json: .*hidden_size"):
        MlxCheckpoint(folder).config()


def test_a_file_that_changes_after_opening_is_an_error(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    checkpoint = MlxCheckpoint(folder)
    model = empty(checkpoint)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(ValueError, match="was replaced or written to|not a complete safetensors file"):
        assemble(model, checkpoint, None, CPU)


def test_two_tensors_of_one_parameter_are_an_error(tmp_path: Path) -> None:
    source, entry = tiny_moe(), {"bits": 4, "group_size": 32}
    tensors, _ = converted(source, lambda path: entry, names=switched())
    name = "model.layers.0.mlp.switch_mlp.up_proj"
    for leaf in ("weight", "scales", "biases"):
        tensors[f"{name.replace('switch_mlp', 'experts')}.{leaf}"] = tensors[f"{name}.{leaf}"].clone()
    with pytest.raises(
        ValueError, match=r"experts\.up_proj\.weight and .*switch_mlp\.up_proj\.weight are both .*gate_up_proj"
    ):
        opened(write(tmp_path, tensors, source.config.to_dict(), quantization=entry))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_hidden_layers": 10**9}, "'num_hidden_layers' is 1000000000, and can be at most 512"),
        ({"head_dim": 10**9}, "'head_dim' is 1000000000, and can be at most"),
        ({"vision_config": {"hidden_size": 1e30}}, "'hidden_size' is 1e[+]30, and can be at most"),
        ({"head_dim": 10**5}, "numbers in its weights, and the files have"),
        ({"vocab_size": 10**9}, "'vocab_size' is 1000000000, and can be at most"),
        ({"hidden_act": "nope"}, "makes no model of its configuration .KeyError: 'nope'"),
        ({"hidden_act": 5}, "config.json: StrictDataclass"),
    ],
)
def test_a_configuration_of_absurd_size_is_refused_at_once(
    entries: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = folder_with(tmp_path)
    config = json.loads((folder / "config.json").read_text()) | entries
    (folder / "config.json").write_text(json.dumps(config))
    began = time.process_time()
    with pytest.raises(ValueError, match=message) as raised:
        isqtorch.load(folder)
    assert "\n" not in str(raised.value) and str(folder) in str(raised.value)
    assert time.process_time() - began < 3
