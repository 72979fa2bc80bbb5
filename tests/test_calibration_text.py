"""Collecting importance from a text: chunks, files, and quantize_'s calibration_file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import tiny_llama
from torch import Tensor

import isqtorch
from isqtorch.auto.curvature import measure_curvature

# ---- a text ----------------------------------------------------------------------------------------------------------


class Words:
    """A tokenizer: one token per character; BOS before a text."""

    bos_token_id = 1

    def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1, *(2 + ord(c) % 500 for c in text)]}


def test_chunks_and_bos() -> None:
    model = tiny_llama(layers=1)
    model.train()
    batches: list[Tensor] = []
    model.model.register_forward_pre_hook(lambda m, a, k: batches.append(k["input_ids"]), with_kwargs=True)
    im = isqtorch.collect_imatrix(model, "abcdefghij" * 10, Words(), chunk=30)
    assert [list(ids.shape) for ids in batches] == [[1, 30]] * 3 and all(int(ids[0, 0]) == 1 for ids in batches)
    assert batches[1][0, 1:].tolist() == [2 + ord("abcdefghij"[i % 10]) for i in range(30, 59)]
    assert (im.chunk_count, im.chunk_size, im.datasets, im.tokens) == (3, 30, ("text",), 90)
    assert model.training


@pytest.mark.parametrize(
    ("options", "shape"), [({}, (2, 127)), ({"max_tokens": 70}, (1, 70)), ({"chunk": 200}, (2, 127))]
)
def test_chunks_fit_the_context(options: dict[str, int], shape: tuple[int, int]) -> None:
    im = isqtorch.collect_imatrix(tiny_llama(layers=1), torch.arange(300) % 512, **options)
    assert (im.chunk_count, im.chunk_size) == shape and im.datasets == ("token ids",)


def test_text_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "calibration.txt"
    path.write_text("some text " * 20)
    model = tiny_llama(layers=1)
    for given in (path, str(path)):
        im = isqtorch.collect_imatrix(model, given, Words(), chunk=50)
        assert im.datasets == (str(path),) and im.tokens == 200
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8 text"):
        isqtorch.collect_imatrix(model, path, Words())
    with pytest.raises(FileNotFoundError):
        isqtorch.collect_imatrix(model, tmp_path / "nowhere", Words())
    with pytest.raises(ValueError, match="0 tokens are too few"):
        isqtorch.collect_imatrix(model, torch.tensor([], dtype=torch.int64))
    with pytest.raises(ValueError, match="chunk must be an integer of 2 or more, got 1"):
        isqtorch.collect_imatrix(model, torch.arange(9), chunk=1)


# ---- quantize_ -------------------------------------------------------------------------------------------------------


def test_calibration_file(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    path.write_text("a text to calibrate with " * 30)
    one, two = tiny_llama(), tiny_llama()
    report = isqtorch.quantize_(one, "q4k", calibration_file=path, tokenizer=Words())
    im = isqtorch.collect_imatrix(two, path, Words())
    isqtorch.quantize_(two, "q4k", imatrix=im)
    for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert any(str(path) in note and "5 chunks of 127 tokens" in note for note in report.notes), report.notes
    again = isqtorch.requantize_(one, "q3k", source="stored", calibration_file=path, tokenizer=Words())
    assert any(str(path) in note for note in again.notes)


def test_calibration_file_is_refused_before_it_runs(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    path.write_text("text " * 30)
    model = tiny_llama(layers=1)
    for options, message in (
        ({}, "calibration_file needs tokenizer"),
        ({"tokenizer": Words(), "imatrix": {"x": torch.ones(4)}}, "either imatrix or calibration_file"),
        ({"tokenizer": Words(), "rule": "none"}, "rule must be None"),
    ):
        with pytest.raises(ValueError, match=message):
            isqtorch.quantize_(model, "q4k", calibration_file=path, **options)
    assert not any(isinstance(module, isqtorch.QuantLinear) for module in model.modules())


def test_chunks_of_the_probe_begin_with_bos() -> None:
    model = tiny_llama(layers=1).float()
    batches: list[Tensor] = []
    model.model.register_forward_pre_hook(lambda m, a, k: batches.append(k["input_ids"]), with_kwargs=True)
    for tokenizer in (Words(), None):
        text = torch.arange(2, 302) % 512 if tokenizer is None else "abcdefghij" * 30
        measure_curvature(model, ["lm_head"], tokenizer, text, progress=False)
    assert [int(ids[0, 0]) for ids in batches] == [1, 1, 2, 174]
    assert batches[1][0, 1:].tolist() == [2 + ord("abcdefghij"[i % 10]) for i in range(173, 300)]
