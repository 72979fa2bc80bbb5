"""The writer of safetensors files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from isqtorch.files import tensors_writing
from isqtorch.files.tensors import TensorStore
from isqtorch.files.tensors_writing import Member, Piece, write_shards


def piece(**tensors: Tensor) -> Piece:
    members = tuple(Member(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items())
    return Piece(members, lambda: list(tensors.values()))


def test_tensors_of_all_sizes_are_aligned(tmp_path: Path) -> None:
    """Else torch cannot make tensors of the mapped file."""
    tensors = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "half": torch.randn(5).half(),
        "double": torch.randn(3, dtype=torch.float64),
        "words": torch.arange(7).to(torch.uint32),
        "empty": torch.empty(0, 4),
        "number": torch.tensor(2.5),
        "flag": torch.tensor([True, False, True]),
        "turned": torch.randn(4, 6).t(),
    }
    together = piece(
        codes=torch.arange(6).to(torch.uint32), scales=torch.randn(2, 3).bfloat16(), biases=torch.randn(2, 3).bfloat16()
    )
    size = write_shards(
        tmp_path, [*(piece(**{name: tensor}) for name, tensor in tensors.items()), together], {"format": "mlx"}
    )
    found = load_file(tmp_path / "model.safetensors")
    assert set(found) == {*tensors, "codes", "scales", "biases"}
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert size == sum(t.numel() * t.element_size() for t in found.values())
    assert not (tmp_path / "model.safetensors.index.json").exists()


def test_shards_and_their_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors_writing, "SHARD_BYTES", 100)
    write_shards(tmp_path, [piece(**{f"t{n}": torch.full((10,), float(n))}) for n in range(5)], {"format": "mlx"})
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [path.name for path in files] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    store = TensorStore(files)
    assert index["weight_map"] == {name: stored.file.name for name, stored in store.tensors.items()}
    assert store.metadata == {"format": "mlx"}
    assert store.read("t3").tolist() == [3.0] * 10


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([piece(a=torch.zeros(1)), piece(a=torch.zeros(1))], "a would be twice"),
        ([piece(a=torch.zeros(1, dtype=torch.complex64))], "a is torch.complex64, which safetensors files do not have"),
    ],
)
def test_what_cannot_be_written_is_an_error(pieces: list[Piece], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_shards(tmp_path, pieces, {})
