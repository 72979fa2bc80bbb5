"""`explain`, and the list of kernels that it and `linear` share."""

from __future__ import annotations

import json

import pytest
from helpers import ALL_FORMATS
from models import MoEModel, mlp, tiny_llama
from torch import nn

import isqtorch
from isqtorch import ops
from isqtorch.explain import _kernels
from isqtorch.modules import QuantEmbedding, QuantLinear
from isqtorch.text import ranges


def test_every_number_of_rows_has_one_kernel(isa: str) -> None:
    info = ops.cpu_info()
    up_to_here = info.isa_compiled[: info.isa_compiled.index(isa) + 1]
    assert list(info.linear) == [fmt.name for fmt in ALL_FORMATS]
    assert info.isa_of_formats in info.isa_with_formats and info.isa_of_formats in up_to_here
    for kernels in info.linear.values():
        expected = 1
        for use in kernels:
            assert use.first == expected and use.kernel and use.why and use.level in up_to_here
            assert use.rows == (f"{use.first}-{use.last}" if use.last else f"{use.first}+")
            expected = (use.last or 0) + 1
        assert kernels[-1].last is None


def test_levels_are_told_apart() -> None:
    """A level that shares another's kernels names that one; the baseline has no matrix product on x86."""
    info = ops.cpu_info()
    if "amx" in info.isa_supported:
        ops.set_cpu_isa("amx")
        few, handful, many = ops.cpu_info().linear["q4k"]
        assert (few.level, handful.level, many.level) == ("avx512bf16", "amx", "amx")
        assert "int8 tiles" in handful.kernel and "bf16 tiles" in many.kernel
    if "avx2" in info.isa_supported:
        ops.set_cpu_isa("baseline")
        assert "torch" in ops.cpu_info().linear["q4k"][1].kernel
    ops.set_cpu_isa("")


def test_a_model_is_grouped() -> None:
    pytest.importorskip("transformers")
    model = tiny_llama(layers=4)
    isqtorch.quantize_(model, "q4k", topology={"1": "fp8"})
    found = isqtorch.explain(model)
    quantized = {name for name, layer in model.named_modules() if isinstance(layer, (QuantLinear, QuantEmbedding))}
    assert {layer.name for layer in found.layers} == quantized
    layer = found["model.layers.2.mlp.down_proj"]
    assert (layer.op, layer.format, layer.shape, layer.device) == ("linear", "q4k", (256, 512), "cpu")
    assert layer.bits_per_weight == 4.5
    assert [use.rows for use in layer.kernels] == [use.rows for use in ops.cpu_info().linear["q4k"]]
    groups = dict(found.groups)
    assert len(groups["model.layers.[0,2-3].mlp.down_proj"]) == 3
    assert len(groups["model.layers.1.mlp.down_proj"]) == 1
    text = str(found)
    assert len(text.splitlines()) < 26 and "model.layers.[0,2-3].self_attn.q_proj" in text
    assert found["model.embed_tokens"].op == "embedding"
    with pytest.raises(KeyError):
        found["model.norm"]


def test_every_output_has_kernel_level_and_reason(isa: str) -> None:
    layer = QuantLinear.from_float(nn.Linear(256, 8), "q4k")
    found = isqtorch.explain(layer)
    assert len(found.layers) == 1 and found.layers[0].name == ""
    as_dict = json.loads(found.to_json())
    assert as_dict["groups"][0]["layers"] == [""] and as_dict["groups"][0]["shape"] == [8, 256]
    for use, described in zip(ops.cpu_info().linear["q4k"], as_dict["groups"][0]["kernels"], strict=True):
        assert described == {"rows": use.rows, "kernel": use.kernel, "level": use.level, "why": use.why}
        for text in (str(found), found.to_markdown()):
            assert f"{use.rows}: {use.kernel}" in text and f"{use.kernel}, level {use.level}: {use.why}" in text
    assert f"CPU kernels: {isa}, chosen by set_cpu_isa" in str(found)
    assert found.to_markdown().startswith("| layer | count |") and "(QuantLinear)" in found.to_markdown()


def test_experts_are_grouped_over_all_their_numbers() -> None:
    model = MoEModel()
    isqtorch.quantize_(model, "q4k")
    names = [name for name, _ in isqtorch.explain(model).groups]
    assert "layers.[0-1].mlp.experts.[0-3]" in names and "layers.[0-1].attention" in names


def test_layers_of_other_devices() -> None:
    model = nn.Sequential(
        QuantLinear(256, 8, format="q4k", device="meta"), QuantEmbedding(8, 256, format="q8_0", device="meta")
    )
    found = isqtorch.explain(model)
    assert [layer.kernels[0].kernel for layer in found.layers] == ["none", "none"]
    assert "CPU kernels" not in str(found) and "meta holds no data" in str(found)
    (use,) = _kernels("linear", "q4k", "cuda", ops.cpu_info())
    assert (use.rows, use.kernel, use.level) == ("any", "plain PyTorch reference", "") and "cuda" in use.why


def test_a_shard_has_the_shape_of_its_bytes() -> None:
    layer = QuantLinear.from_float(nn.Linear(512, 8), "q4k")
    layer.weight = nn.Parameter(layer.weight.data[:, :144].contiguous(), requires_grad=False)
    assert isqtorch.explain(layer).layers[0].shape == (8, 256)


def test_nothing_quantized_is_said() -> None:
    found = isqtorch.explain(mlp())
    assert not found.layers and found.to_dict()["groups"] == []
    for text in (str(found), found.to_markdown()):
        assert "Sequential has no quantized layers" in text and "quantize_" in text


def testranges() -> None:
    assert ranges([3, 0, 1, 2, 7, 9, 10]) == "0-3,7,9-10" and ranges([4]) == "4"
