"""Files of second moments: there and back, damaged and hostile ones, and what reads them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import IDS, state_bytes, tiny_llama, tiny_moe
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import isqtorch
from isqtorch.importance.moments import load_imatrix

KEY = "isqtorch_moments"
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def moments() -> isqtorch.Moments:
    ids = torch.randint(1, 60, (900,), generator=torch.Generator().manual_seed(0))
    return isqtorch.collect_moments(tiny_llama(dtype=torch.float32, layers=1), ids, chunk=30, progress=False)


@pytest.fixture
def path(moments: isqtorch.Moments, tmp_path: Path) -> Path:
    moments.save(tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


def content(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}, json.loads(file.metadata()[KEY])


def same(one: isqtorch.Moments, other: isqtorch.Moments) -> None:
    assert sorted(one) == sorted(other) and one.readers == other.readers and one.stacks == other.stacks
    assert (one.chunk_count, one.chunk_size, one.datasets) == (other.chunk_count, other.chunk_size, other.datasets)
    for name in one:
        assert torch.equal(one[name], other[name]) and torch.equal(one.counts[name], other.counts[name])
    for name, key in one.readers.items():
        parts = one.inputs[key]
        experts = len(parts) if one.stacks[key] else None
        mine, its = (m.of(name, parts[0].total.columns, experts) for m in (one, other))
        for expert in range(experts or 1):
            number = None if experts is None else expert
            assert torch.equal(mine.matrix(number), its.matrix(number))
            held, again = mine.judges(number), its.judges(number)
            assert (held is None) == (again is None)
            if held is not None:
                assert torch.equal(held[0], again[0]) and torch.equal(held[1], again[1])


# ---- there and back --------------------------------------------------------------------------------------------------


def test_there_and_back(moments: isqtorch.Moments, path: Path) -> None:
    same(moments, isqtorch.Moments.load(path))
    isqtorch.Moments.load(path).save(path.with_name("again.safetensors"))
    same(moments, isqtorch.Moments.load(path.with_name("again.safetensors")))


def test_experts_and_importance_without_moments(tmp_path: Path) -> None:
    model = tiny_moe().to(torch.bfloat16)
    with isqtorch.calibrate(model, moments=True) as moments, torch.no_grad():
        model(torch.randint(1, 60, (2, 9)))
    moments.save(tmp_path / "x.safetensors")
    loaded = isqtorch.Moments.load(tmp_path / "x.safetensors")
    same(moments, loaded)
    assert any(part.total.rows for part in loaded.inputs["model.layers.0.mlp.experts.down_proj"])  # few rows stay rows
    some = isqtorch.Moments({}, {}, {}, {"a": (torch.ones(4), torch.tensor([3]))})
    with pytest.raises(ValueError, match="nothing to save"):
        some.save(tmp_path / "y.safetensors")
    key, parts = next(iter(moments.inputs.items()))
    some = isqtorch.Moments({key: parts}, {key: key}, {key: False}, {"a": (torch.ones(4), torch.tensor([3]))})
    some.save(tmp_path / "y.safetensors")
    assert isqtorch.Moments.load(tmp_path / "y.safetensors")["a"].tolist() == pytest.approx([1 / 3] * 4)


def test_importance_alone_in_other_files(moments: isqtorch.Moments, tmp_path: Path) -> None:
    for name in ("x.gguf", "x.imatrix", "x.cimatrix"):
        moments.save(tmp_path / name)
        assert len(isqtorch.read_imatrix(tmp_path / name)) == len(moments)


def test_every_imatrix_argument_takes_the_file(moments: isqtorch.Moments, path: Path) -> None:
    model, other = tiny_llama(dtype=torch.float32, layers=1), tiny_llama(dtype=torch.float32, layers=1)
    for rule in (None, "feedback"):
        report = isqtorch.quantize_(model, "q4k", imatrix=path, rule=rule, progress=False)
        assert report.imatrix == "x.safetensors" and report.rule == rule
        isqtorch.quantize_(other, "q4k", imatrix=moments, rule=rule, progress=False)
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, other(IDS).logits)
        model, other = tiny_llama(dtype=torch.float32, layers=1), tiny_llama(dtype=torch.float32, layers=1)


def test_files_are_told_apart_by_their_content(moments: isqtorch.Moments, path: Path, tmp_path: Path) -> None:
    moments.save(tmp_path / "x.cimatrix")
    (tmp_path / "x.cimatrix").rename(tmp_path / "y.safetensors")
    path.rename(tmp_path / "z.cimatrix")
    assert type(load_imatrix(tmp_path / "y.safetensors")) is isqtorch.Imatrix
    assert isinstance(load_imatrix(tmp_path / "z.cimatrix"), isqtorch.Moments)
    name = "a" * 0x7B  # its length is "{" in a .cimatrix, where the header of safetensors begins
    isqtorch.Imatrix({name: torch.ones(4)}).save(tmp_path / "odd.cimatrix")
    assert list(load_imatrix(tmp_path / "odd.cimatrix") or ()) == [name]


def test_a_failed_write_leaves_the_old_file(
    moments: isqtorch.Moments, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("isqtorch.importance.moments_files.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        moments.save(path)
    assert path.read_bytes() == before and os.listdir(path.parent) == ["x.safetensors"]
    with pytest.raises(FileNotFoundError):
        moments.save(path.parent / "nowhere" / "x.safetensors")


# ---- damaged and hostile ---------------------------------------------------------------------------------------------


def _set(*keys: Any, value: Any) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    def change(tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        entry: Any = about
        for key in keys[:-1]:
            entry = entry[key]
        entry[keys[-1]] = value

    return change


def _tensor(name: str, value: Callable[[Tensor], Tensor] | None) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    def change(tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value(tensors[name]).contiguous()

    return change


def _filled(value: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: torch.full_like(tensor, value)


CASES: list[tuple[Callable[[dict[str, Tensor], dict[str, Any]], None], str]] = [
    (_set("version", value=2), "version 2; this isqtorch reads version 1"),
    (_set("inputs", value={}), "its inputs are no list"),
    (_set("inputs", value=[3]), "its inputs are no list"),
    (_set("inputs", value=[{}] * 40000), "at most 32768 entries"),
    (_set("others", value=None), "its others are no list"),
    (_set("datasets", value=[3]), "datasets are no list of names"),
    (_set("chunk_size", value="512"), "chunk_size is '512'"),
    (_set("inputs", 1, "key", value="a\n"), "unprintable"),
    (_set("inputs", 1, "key", value="a" * 2000), "a string of 1 to 1024 bytes"),
    (_set("inputs", 1, "key", value="model.layers.0.self_attn.q_proj"), "has the key of another"),
    (_set("inputs", 1, "readers", value=["model.layers.0.self_attn.q_proj"]), "reads two inputs"),
    (_set("inputs", 1, "readers", value="abc"), "no list of readers"),
    (_set("inputs", 1, "columns", value=0), "the columns of input 1 is 0"),
    (_set("inputs", 1, "columns", value=1 << 40), "must be a number from 1 to"),
    (_set("inputs", 1, "columns", value=128), r"tensor '1.0.held' is torch.float32 \[\d+, 256\]"),
    (_set("inputs", 1, "counts", value=[-1]), "the count of 1.0 is -1"),
    (_set("inputs", 1, "counts", value=[True]), "the count of 1.0 is True"),
    (_set("inputs", 1, "counts", value=[1, 2]), "no lists of counts of the same length"),
    (_set("inputs", 1, "counts", value=[]), "no lists of counts of the same length"),
    (_tensor("1.0.total", None), "has no tensor '1.0.rows'"),
    (_tensor("1.0.total", lambda t: t[:, :9]), r"is torch.float32 \[256, 9\]"),
    (_tensor("1.0.total", lambda t: t.double()), "is torch.float64"),
    (_tensor("1.0.squares", _filled(float("nan"))), "value 0 is nan, must be finite and not negative"),
    (_tensor("1.0.squares", _filled(-1.0)), "value 0 is -1"),
    (_tensor("1.0.held", lambda t: t.repeat(100, 1)), "rows, the limit is 2048"),
    (_tensor("1.0.held", lambda t: t.to(torch.int32)), "is torch.int32"),
    (_tensor("1.0.held_weights", _filled(float("inf"))), "held_weights must be finite"),
    (_tensor("1.0.held_weights", lambda t: t[:3]), r"held_weights' is torch.float32 \[3\]"),
    (_tensor("1.0.held_first", None), "has no tensor '1.0.held_first'"),
]


@pytest.mark.parametrize(("change", "message"), CASES, ids=[message[:40] for _, message in CASES])
def test_damaged_files(change: Any, message: str, path: Path) -> None:
    tensors, about = content(path)
    change(tensors, about)
    save_file(tensors, path, metadata={KEY: json.dumps(about)})
    with pytest.raises(ValueError, match=message) as caught:
        isqtorch.Moments.load(path)
    assert "x.safetensors" in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["1.0.total", "1.0.held"])
def test_values_that_are_not_finite_are_found_before_anything_is_packed(name: str, value: float, path: Path) -> None:
    tensors, about = content(path)
    tensors[name][3, 5] = value
    save_file(tensors, path, metadata={KEY: json.dumps(about)})
    model = tiny_llama(dtype=torch.float32, layers=1)
    before = state_bytes(model)
    with pytest.raises(ValueError, match=r"x.safetensors.*model.layers.0.self_attn.o_proj.*finite"):
        isqtorch.quantize_(model, "q4_0", rule="feedback", imatrix=path, progress=False)
    assert state_bytes(model) == before


def test_a_sum_that_is_no_second_moment(path: Path) -> None:
    """Lopsided, or with a negative square."""
    for row, column in ((3, 5), (3, 3)):
        tensors, about = content(path)
        tensors["1.0.total"][row, column] -= 1e6
        other = path.with_name("other.safetensors")
        save_file(tensors, other, metadata={KEY: json.dumps(about)})
        with pytest.raises(ValueError, match=r"self_attn.o_proj.*symmetric"):
            isqtorch.quantize_(tiny_llama(layers=1), "q4_0", rule="feedback", imatrix=other, progress=False)


def test_other_files(path: Path, tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="no entry 'isqtorch_moments'"):
        isqtorch.Moments.load(tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="no entry 'isqtorch_moments'"):
        isqtorch.quantize_(tiny_llama(), "q4k", imatrix=tmp_path / "weights.safetensors")
    (tmp_path / "text").write_text("not a file of moments")
    with pytest.raises(ValueError, match="not in the format safetensors"):
        isqtorch.Moments.load(tmp_path / "text")
    with pytest.raises(FileNotFoundError):
        isqtorch.Moments.load(tmp_path / "nothing.safetensors")
    with pytest.raises(ValueError, match="not a regular file"):
        isqtorch.Moments.load(tmp_path)
    for value in ("[", "[1]", "3", '"a"', "[" * 100000):
        save_file({"a": torch.ones(3)}, path, metadata={KEY: value})
        with pytest.raises(ValueError, match="not JSON|version None"):
            isqtorch.Moments.load(path)


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.999])
def test_cut_files(cut: float, path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(cut * len(data))])
    with pytest.raises((ValueError, OSError)):
        isqtorch.Moments.load(path)


def test_bytes_that_are_changed_never_do_more_than_an_error(path: Path) -> None:
    data, generator = path.read_bytes(), torch.Generator().manual_seed(0)
    length = 8 + int.from_bytes(data[:8], "little")
    for _ in range(200):
        damaged = bytearray(data)
        for _ in range(3):
            at = int(torch.randint(0, length, (1,), generator=generator))
            damaged[at] = int(torch.randint(0, 256, (1,), generator=generator))
        path.write_bytes(damaged)
        try:
            isqtorch.Moments.load(path)
        except (ValueError, OSError) as error:
            assert str(error)
