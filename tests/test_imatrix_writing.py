"""Importance matrices written to files: as llama.cpp writes them, there and back, and used for quantizing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import golden
from imatrix_files import GOLDEN
from torch import nn

import isqtorch
from isqtorch.formats import formats, get_format
from isqtorch.importance.imatrix import Imatrix, read_imatrix

# ---- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target"),
    [("imatrix.gguf", "imatrix.gguf"), ("legacy.imatrix",) * 2, ("imatrix.gguf", "legacy.imatrix")],
)
def test_written_as_llama_cpp_writes(source: str, target: str, tmp_path: Path) -> None:
    """Byte for byte; the second golden file is what llama.cpp makes of the content of the first."""
    path = tmp_path / target
    read_imatrix(GOLDEN / f"ggml_{source}").save(path)
    assert path.read_bytes() == (GOLDEN / f"ggml_{target}").read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == [target]  # no temporary file stays


def same_weights(a: Imatrix, b: Imatrix) -> bool:
    return sorted(a) == sorted(b) and all(torch.equal(a[name].flatten(), b[name].flatten()) for name in a)


@pytest.mark.parametrize("source", ["imatrix.gguf", "legacy.imatrix"])
@pytest.mark.parametrize("through", [".gguf", ".imatrix", ".dat", ".cimatrix"])
def test_round_trips_keep_what_the_format_holds(source: str, through: str, tmp_path: Path) -> None:
    original = read_imatrix(GOLDEN / f"ggml_{source}")
    original.save(first := tmp_path / f"a{through}")
    copy = read_imatrix(first)
    if through == ".gguf":
        assert same_weights(copy, original) and copy.datasets == original.datasets
        for name in original:
            assert torch.equal(copy.counts[name], original.counts[name])
            assert torch.equal(copy.sums[name], original.sums[name])
    elif through == ".cimatrix":  # keeps the weights; zeros for an expert without data
        for name in original:
            stored, want = copy[name], original[name].flatten()
            seen = (original.counts[name] > 0).repeat_interleave(want.numel() // original.counts[name].numel())
            assert torch.equal(stored[seen], want[seen]) and not stored[~seen].any()
    else:  # scaled by the number of chunks and back: rounded once where that is no power of two
        for name in original:
            torch.testing.assert_close(copy[name].flatten(), original[name].flatten(), rtol=2e-7, atol=0)
        assert copy.chunk_count == original.chunk_count and copy.datasets == original.datasets[-1:]
    copy.save(second := tmp_path / f"b{through}")
    assert second.read_bytes() == first.read_bytes()


@pytest.mark.parametrize("kind", [".gguf", ".imatrix", ".cimatrix"])
@pytest.mark.parametrize("start", [".gguf", ".imatrix", ".cimatrix"])
def test_weights_survive_every_pair_of_formats(start: str, kind: str, tmp_path: Path) -> None:
    matrix = Imatrix({"blk.0.attn_q.weight": torch.rand(7), "other.layer": torch.rand(3), "é": [0.0, 1e-30]})
    matrix.save(tmp_path / f"a{start}")
    one = read_imatrix(tmp_path / f"a{start}")
    one.save(tmp_path / f"b{kind}")
    two = read_imatrix(tmp_path / f"b{kind}")
    assert same_weights(matrix, one) and same_weights(one, two)


def test_layers_get_gguf_names(tmp_path: Path) -> None:
    stack, single = torch.rand(2, 8), torch.rand(8)
    path = "model.layers.0.mlp.experts"
    matrix = Imatrix(
        {
            f"{path}.gate_up_proj": stack,
            "model.layers.0.self_attn.q_proj": single,
            "lm_head": single,
            "model.visual.blocks.0.attn.proj": single,  # another tower
            "model.encoder.layers.0.fc1": single,  # two layers, one GGUF name: both keep theirs
            "model.decoder.layers.0.fc1": 2 * single,
        },
        {f"{path}.gate_up_proj": torch.tensor([4, 0])},
    )
    matrix.save(tmp_path / "x.gguf")
    again = read_imatrix(tmp_path / "x.gguf")
    assert sorted(again) == [
        "blk.0.attn_q.weight",
        *(f"blk.0.ffn_{x}_exps.weight" for x in ("gate", "gate_up", "up")),
        "model.decoder.layers.0.fc1",
        "model.encoder.layers.0.fc1",
        "model.visual.blocks.0.attn.proj",
        "output.weight",
    ]
    for layer in matrix:
        if "experts" not in layer:
            assert torch.equal(again.vector(layer, 8), matrix[layer])
    assert again.vector(f"{path}.gate_up_proj", 8, experts=2)[1].tolist() == [1.0] * 8
    assert again.unseen["blk.0.ffn_up_exps.weight"] == 1


def test_saving_what_cannot_be_saved(tmp_path: Path) -> None:
    matrix = Imatrix({"a": [1.0]})
    with pytest.raises(ValueError, match=r"x.txt: the name of an importance matrix must end in .gguf, .imatrix"):
        matrix.save(tmp_path / "x.txt")
    with pytest.raises(FileNotFoundError):
        matrix.save(tmp_path / "nowhere" / "x.gguf")
    with pytest.raises(ValueError, match="nothing to save"):
        Imatrix({}).save(tmp_path / "x.gguf")
    (tmp_path / "x.gguf").write_bytes(b"old")
    with pytest.raises(ValueError, match="more than 63 bytes: llama.cpp could not read"):
        Imatrix({"n" * 60: [1.0]}).save(tmp_path / "x.gguf")
    assert (tmp_path / "x.gguf").read_bytes() == b"old"


# ---- the goldens through the public door -----------------------------------------------------------------------------

WEIGHTED = [name for name in formats() if get_format(name).takes_importance]


@pytest.mark.parametrize("suffix", [".gguf", ".imatrix", ".cimatrix"])
@pytest.mark.parametrize("variant", ["pos", "zeros"])
@pytest.mark.parametrize("kind", WEIGHTED)
@pytest.mark.filterwarnings("ignore:importance of")
def test_golden_bytes_with_importance_from_a_file(kind: str, variant: str, suffix: str, tmp_path: Path) -> None:
    """A model with a layer per case, quantized with the importance of all of them in one file."""
    data = golden("ggml_public") | golden("ggml_levels")
    ggml = kind[:-1] + "_K" if kind.endswith("k") else kind
    cases = [key.split("/")[2] for key in data if key.startswith(f"q/{ggml}/") and key.endswith(f"/{variant}")]
    assert len(cases) > 10
    model = nn.Module()
    for case in cases:
        rows, columns = data[f"x/{case}"].shape
        layer = nn.Linear(columns, rows, bias=False)
        layer.weight = nn.Parameter(data[f"x/{case}"].clone())
        model.add_module(case, layer)
    Imatrix({case: data[f"imx/{case}/{variant}"] for case in cases}).save(tmp_path / f"x{suffix}")
    isqtorch.quantize_(model, kind, imatrix=tmp_path / f"x{suffix}", fallback="error")
    wrong = [
        case for case in cases if not torch.equal(model.get_submodule(case).weight, data[f"q/{ggml}/{case}/{variant}"])
    ]
    assert not wrong
