"""The logic of the benchmark of whole models, on made-up measurements and small tensors; nothing is timed here."""

from __future__ import annotations

import json
import mmap
import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import isqtorch
from benchmarks import bench_models
from benchmarks.models import tables
from benchmarks.models.checkpoints import BLOCK, matrix
from benchmarks.models.engines import (
    BF16,
    ISQTORCH,
    LLAMA_CPP,
    LLAMA_CPP_SLEEPING,
    MISTRAL_RS,
    OPENVINO,
    TRANSFORMERS,
    Ours,
)
from benchmarks.models.gguf_writer import gguf_name, interleaved, write_gguf
from benchmarks.models.llama_cpp import _has_openmp
from benchmarks.models.memory import Peak, resident
from benchmarks.models.neighbours import Neighbours
from benchmarks.models.results import ModelResults, Run
from benchmarks.models.session import Session
from benchmarks.models.targets import judge
from benchmarks.peers import Unavailable
from benchmarks.targets import Target

MB = 10**6
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


def made_up(others: float = 0.01) -> ModelResults:
    """A llama that meets every target by a little."""
    read = {"bandwidth": [9.5e9, 10e9, 10.5e9]}
    plain = Run(
        "llama", TRANSFORMERS, BF16, "q4k", 2500 * MB, prefill={"128": [1.0]}, decode=[0.26, 0.24, 0.26], others=[0.0]
    )
    ours = Run(
        "llama",
        ISQTORCH,
        "q4k",
        "q4k",
        800 * MB,
        load=[3.0, 2.4],
        peak={"total": 872 * MB, "anonymous": 810 * MB},
        kept={"total": 820 * MB, "anonymous": 805 * MB},
        read=[0.5, 0.6],
        quantize=[2.1, 2.0],
        reload=[0.9],
        reload_peak={"total": 30 * MB, "anonymous": 16 * MB},
        identical=True,
        error=0.4,
        prefill={"128": [0.5, 0.4], "512": [2.0]},
        decode=[0.1, 0.1],
        others=[others, others],
        token_bytes=850 * MB,
        **read,
    )
    theirs = Run("llama", LLAMA_CPP, "q4k", "q4k", 800 * MB, decode=[0.17], others=[0.0])
    sleeping = Run("llama", LLAMA_CPP_SLEEPING, "q4k", "q4k", 800 * MB, decode=[0.16], others=[0.0])
    skipped = {"moe isqtorch q4k": "no such model here", "torchao": "not installed: pip install torchao"}
    facts = {
        "host": ["made up"],
        "quick": False,
        "reader": "C, one stream",
        "command": "python -m benchmarks.bench_models",
        "seconds": 1,
    }
    overhead = {"q4k": {"microseconds": 2.5, "nn.Linear": 2.0}}
    return ModelResults([plain, ours, theirs, sleeping], overhead, skipped, facts)


def named(results: ModelResults, what: str, against: str = "") -> Target:
    (found,) = [t for t in judge(results) if t.what.startswith(what) and against in t.against]
    return found


@pytest.mark.parametrize(
    ("what", "against", "ratio"),
    [
        ("peak memory while loading, llama", "packed", 1.09),
        ("loading a packed", "", 0.9),
        ("anonymous", "", 0.02),
        ("load and quantize", "", 1.2),
        ("QuantLinear", "", 2.5),
        ("decoding", "bf16", 2.6),
        ("decoding", "llama.cpp", 1.6),
        ("decoding, llama", "read bandwidth", 0.85),
    ],
)
def test_ratios(what: str, against: str, ratio: float) -> None:
    target = named(made_up(), what, against)
    assert list(target.ratios.values()) == pytest.approx([ratio])
    assert target.met is True


def test_no_program_is_faster_than_memory() -> None:
    """We reach 85 % of the bandwidth and are 1.6 times as fast as llama.cpp: 1.6 / 0.85 is what the machine allows."""
    assert named(made_up(), "decoding", "llama.cpp").limits == pytest.approx({"llama q4k": 1.6 / 0.85})


def test_units_are_shown() -> None:
    measured = {target.what.split()[0]: (target.target, target.measured) for target in judge(made_up())}
    assert measured["loading"] == ("<= 1.00 s", "1 of 1; worst llama q4k: 0.90 s")
    assert measured["QuantLinear"] == ("<= 3.00 us", "1 of 1; worst q4k: 2.50 us")
    assert measured["anonymous"] == ("<= 5 %", "1 of 1; worst llama q4k: 2 %")


def test_what_was_not_measured_says_why() -> None:
    target = named(made_up(), "peak memory while loading, moe")
    assert (target.met, target.measured) == (None, "not measured; no such model here")


def test_other_bits_than_were_saved_miss_the_target() -> None:
    results = made_up()
    results.ours()[0].identical = False
    target = named(results, "loading a packed")
    assert target.met is False
    assert "llama q4k: other weights than were saved" in target.measured


def test_speeds_are_not_judged_on_a_busy_machine() -> None:
    for against in ("bf16", "llama.cpp", "read bandwidth"):
        target = named(made_up(others=0.3), "decoding", against)
        assert (target.met, target.left_out) == (None, ["llama q4k"])


def test_a_small_model_is_compared_with_its_group() -> None:
    """Of two groups, each with bf16 and mistral.rs, what took turns counts; llama.cpp has a bound for each model."""
    results = ModelResults(facts=made_up().facts)
    for fmt, ours, theirs in (("q8_0", 0.010, 0.013), ("q4k", 0.010, 0.011)):
        results.runs += [
            Run("smollm2", TRANSFORMERS, BF16, fmt, decode=[0.02]),
            Run(
                "smollm2",
                ISQTORCH,
                fmt,
                fmt,
                100 * MB,
                load=[0.9, 0.8],
                load_gguf=[1.1],
                read=[0.1],
                quantize=[0.2],
                decode=[ours],
            ),
            Run("smollm2", MISTRAL_RS, fmt, fmt, decode=[theirs]),
            Run("smollm2", LLAMA_CPP, fmt, fmt, decode=[0.009]),
        ]
    mistral = named(results, "decoding, smollm2", "mistral.rs")
    assert all(target.met is None for target in judge(results) if target.what.startswith(("load and", "anonymous")))
    assert mistral.ratios == pytest.approx({"smollm2 q8_0": 1.3, "smollm2 q4k": 1.1}) and mistral.met is False
    assert named(results, "decoding", "llama.cpp").met is True
    packing = named(results, "packing while loading")
    assert (
        packing.ratios["smollm2 q8_0"] == 0.9
        and packing.ratios["smollm2 q8_0 from GGUF"] == 1.1
        and packing.met is False
    )


def test_groups() -> None:
    """Each of our formats with those that have it; bf16 is in every group, so that all can be compared with it."""
    groups = Session.groups("smollm2", ["q8_0", "fp8"], peers=True)
    plain = (TRANSFORMERS, BF16)
    theirs = [LLAMA_CPP, LLAMA_CPP_SLEEPING, MISTRAL_RS, OPENVINO]
    assert groups["q8_0"] == [plain, *((who, "q8_0") for who in (ISQTORCH, *theirs))]
    assert groups["fp8"] == [plain, (ISQTORCH, "fp8")]
    assert [who for who, _ in groups["other libraries"]] == [TRANSFORMERS, "bitsandbytes", "torchao", "torchao"]
    assert Session.groups("llama", ["q8_0"], peers=False) == {"q8_0": [plain, (ISQTORCH, "q8_0")]}
    assert MISTRAL_RS not in dict(Session.groups("llama", ["q8_0"], peers=True)["q8_0"])


def test_openmp_is_found_in_the_library(tmp_path: Path) -> None:
    assert not _has_openmp(tmp_path)
    (tmp_path / "libggml-cpu.so").write_bytes(b"ELF of threads of its own")
    assert not _has_openmp(tmp_path)
    (tmp_path / "libggml-cpu-haswell.so").write_bytes(b"ELF GOMP_parallel")
    assert _has_openmp(tmp_path)


def test_report_has_every_part_and_survives_json(tmp_path: Path) -> None:
    results = made_up()
    again = ModelResults.from_json(json.loads(json.dumps(results.to_json())))
    assert again == results
    text = bench_models.markdown(again)
    assert text.count("\n## ") == 7
    assert "| llama | isqtorch | q4k | 800 | 2.40 | - | 0.50 | 2.00 | 1.20 | 872 | 810 | 1.09 | 820 |" in text
    assert "| llama | isqtorch | q4k | 284.4 | 256.0 | 10.0 | 2.60 | 85 % | 2 | 1 % | 0.400 |" in text
    assert "- memory, read by all threads (C, one stream): 10.0 GB/s, 9.5 to 10.5" in text
    assert "- torchao: not installed: pip install torchao" in text
    bench_models.write(again, tmp_path / "models-cpu-date.json")
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md"}


def test_a_report_without_anything_measured() -> None:
    results = ModelResults(facts=made_up().facts)
    assert all(target.met is None for target in judge(results))
    assert "nothing was left out" in bench_models.markdown(results)
    assert tables.noise(results) == "no rounds"


def test_made_up_weights_repeat_but_rows_differ() -> None:
    weight = matrix((600, 2048), 3)
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, matrix((600, 2048), 3))
    assert torch.equal(weight.flatten()[BLOCK:], weight.flatten()[: weight.numel() - BLOCK])
    assert len({row.numpy().tobytes() for row in weight.view(torch.int16)}) == 600
    assert not torch.equal(weight, matrix((600, 2048), 4))
    assert 0.01 < float(weight.float().std()) < 0.03


@pytest.mark.skipif(not resident(), reason="the system does not tell")
def test_peak_is_more_than_what_stays() -> None:
    with Peak() as memory:  # mmap, because an allocator may have freed pages at hand
        kept = mmap.mmap(-1, 10 * MB, flags=PRIVATE)
        kept.write(bytes(10 * MB))
        with mmap.mmap(-1, 20 * MB, flags=PRIVATE) as freed:
            freed.write(bytes(20 * MB))
            time.sleep(0.05)  # some samples
    assert memory.peak["total"] >= 29 * MB
    assert memory.peak["anonymous"] >= 29 * MB
    assert 9 * MB <= memory.kept["anonymous"] < 19 * MB
    kept.close()


def test_neighbours_take_what_the_process_does_not() -> None:
    with Neighbours(os.getpid()) as others:
        sum(range(3_000_000))
    assert others.share is None or 0 <= others.share <= 1.1


def test_names_of_gguf() -> None:
    assert gguf_name("model.embed_tokens") == "token_embd"
    assert gguf_name("model.layers.12.mlp.up_proj") == "blk.12.ffn_up"
    assert gguf_name("model.layers.0.mlp.experts.down_proj") == "blk.0.ffn_down_exps"


def test_rows_of_a_rotated_matrix() -> None:
    """A head of 4 rows: 0 and 2 are rotated together by transformers, 0 and 1 by llama.cpp."""
    rows = np.arange(8)[:, None].repeat(3, 1)
    assert interleaved(rows, heads=2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_a_model_that_has_no_gguf_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(Unavailable, match="no GGUF of a bert"):
        write_gguf(tmp_path, tmp_path / "model.gguf")


def test_a_model_that_stayed_in_float_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isqtorch, "load", lambda source, fmt: SimpleNamespace(model=torch.nn.Linear(64, 64)))
    with pytest.raises(Unavailable, match="98 % of the bytes of the model are matrices that were not quantized"):
        Ours().load(Path("made-up"), "q4k")
