"""Importance matrices: the values of llama.cpp's own files, the other file formats, and matrices made from a dict."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from imatrix_files import EXPECTED, GOLDEN, META, PAIR, Write, cimatrix, floats, gguf, legacy

from isqtorch.importance.imatrix import Imatrix, read_imatrix

# ---- golden files ----------------------------------------------------------------------------------------------------


def test_golden_gguf() -> None:
    imatrix = read_imatrix(GOLDEN / "ggml_imatrix.gguf")
    assert imatrix.format == "gguf"
    assert (imatrix.chunk_size, imatrix.chunk_count) == (EXPECTED["chunk_size"], EXPECTED["chunk_count"])
    assert list(imatrix.datasets) == EXPECTED["datasets"]
    assert sorted(imatrix) == sorted(EXPECTED["gguf"])
    for name, want in EXPECTED["gguf"].items():
        assert imatrix[name].dtype == torch.float32
        assert imatrix[name].shape == (
            (want["n_mat"], want["n_per_row"]) if want["n_mat"] > 1 else (want["n_per_row"],)
        )
        assert torch.equal(imatrix[name].flatten(), floats(want["weights"]))
        assert torch.equal(imatrix.sums[name].flatten(), floats(want["in_sum2"]))
        assert imatrix.counts[name].tolist() == want["counts"]


def test_golden_legacy() -> None:
    imatrix = read_imatrix(str(GOLDEN / "ggml_legacy.imatrix"))
    assert imatrix.format == "legacy"
    assert (imatrix.chunk_size, imatrix.chunk_count) == (None, EXPECTED["chunk_count"])
    assert list(imatrix.datasets) == EXPECTED["datasets"]
    assert sorted(imatrix) == sorted(EXPECTED["legacy"])
    for name, want in EXPECTED["legacy"].items():
        assert torch.equal(imatrix[name], floats(want["weights"]))
        assert torch.equal(imatrix.sums[name], floats(want["stored"]))
        assert imatrix.counts[name].tolist() == [want["ncall"]]


def test_golden_experts_agree() -> None:
    """The legacy file has experts one after another; asked for 4, both files give the same rows."""
    new, old = read_imatrix(GOLDEN / "ggml_imatrix.gguf"), read_imatrix(GOLDEN / "ggml_legacy.imatrix")
    name = "blk.1.ffn_down_exps.weight"
    for imatrix in (new, old):
        stack = imatrix.vector("model.layers.1.mlp.experts.down_proj", 64, experts=4)
        assert stack.shape == (4, 64)
        torch.testing.assert_close(stack.flatten(), floats(EXPECTED["gguf"][name]["weights"]), rtol=1e-6, atol=0)
        assert (stack[1] == 1).all()  # the expert that saw no token
        assert torch.equal(imatrix.vector("model.layers.1.mlp.experts.2.down_proj", 64), stack[2])


# ---- the two formats without a magic ---------------------------------------------------------------------------------


def test_cimatrix(write: Write) -> None:
    imatrix = read_imatrix(write(cimatrix({"model.layers.0.mlp.up_proj": [1.0, 2.0], "x": [0.5]})))
    assert imatrix.format == "cimatrix"
    assert {name: values.tolist() for name, values in imatrix.items()} == {
        "model.layers.0.mlp.up_proj": [1.0, 2.0],
        "x": [0.5],
    }


def test_cimatrix_experts_without_data(write: Write) -> None:
    imatrix = read_imatrix(write(cimatrix({"mlp.experts.up_proj": [1.0, 2.0, 0.0, 0.0, 0.0, 3.0]})))
    assert imatrix.vector("mlp.experts.up_proj", 2, experts=3).tolist() == [[1.0, 2.0], [1.0, 1.0], [0.0, 3.0]]


def test_legacy_without_trailer_and_without_calls(write: Write) -> None:
    imatrix = read_imatrix(write(legacy([(b"a", 4, [2.0, 8.0]), (b"b", 0, [3.0])])))
    assert imatrix["a"].tolist() == [0.5, 2.0]
    assert imatrix["b"].tolist() == [3.0]
    assert (imatrix.chunk_count, imatrix.datasets) == (None, ())


def test_gguf_version_2_and_foreign_tensors(write: Write) -> None:
    tensors = [*PAIR, ("x.in_sum", [4], [0.0] * 4)]  # written by newer llama.cpp
    imatrix = read_imatrix(write(gguf(tensors, version=2, types={"x.in_sum": 77})))
    assert imatrix["x"].tolist() == [0.5, 1.0, 1.5, 2.0]


@pytest.mark.parametrize("alignment", [1, 8, 4096])
def test_gguf_alignment(write: Write, alignment: int) -> None:
    meta = {**META, "general.alignment": (4, struct.pack("<I", alignment))}
    imatrix = read_imatrix(write(gguf(PAIR, meta, alignment=alignment)))
    assert imatrix["x"].tolist() == [0.5, 1.0, 1.5, 2.0]


# ---- from a dict -----------------------------------------------------------------------------------------------------


def test_from_a_dict() -> None:
    imatrix = Imatrix({"a": torch.tensor([1, 2], dtype=torch.bfloat16), "b": np.ones((2, 3)), "c": [0.0, 1.0]})
    assert len(imatrix) == 3 and list(imatrix) == ["a", "b", "c"]
    assert all(values.dtype == torch.float32 for values in imatrix.values())
    assert imatrix["c"].tolist() == [0.0, 1.0]  # zeros are data, not missing data


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"a": [1.0, float("nan")]}, "entry 'a': value 1 is nan"),
        ({"a": [1.0, float("inf")]}, "value 1 is inf"),
        ({"a": [[1.0], [-0.5]]}, "value 1 is -0.5"),
        ({"a": []}, r"shape \[0\]"),
        ({"a": 1.0}, r"shape \[\]"),
        ({"a": torch.ones(1, 1, 1)}, r"shape \[1, 1, 1\]"),
        ({"a": "text"}, "not a tensor of numbers"),
        ({"": [1.0]}, "name of an entry"),
        ({1: [1.0]}, "name of an entry"),
        ({"a" * 1025: [1.0]}, "name of an entry"),
    ],
)
def test_bad_dict(entries: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Imatrix(entries)


def test_counts_must_fit() -> None:
    with pytest.raises(ValueError, match=r"counts have shape \[3\], must be \[2\]"):
        Imatrix({"a": torch.ones(2, 4)}, {"a": torch.ones(3)})
