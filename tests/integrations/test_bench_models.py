"""The benchmark of whole models runs from end to end, on a model of a few megabytes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import bench_models
from benchmarks.models import session
from benchmarks.models.engines import BF16, TRANSFORMERS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_small_mixture_of_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = {"bitsandbytes": ("nf4",)}
    monkeypatch.setattr(session, "FORMATS", missing)
    monkeypatch.setenv("ISQTORCH_PEERS_PYTHON", sys.executable)
    results = bench_models.measure(["moe"], ["q4k"], quick=True, peers=True, cache=tmp_path)
    (ours,) = results.ours()
    plain = results.beside(ours, TRANSFORMERS, BF16)
    assert plain and ours.name == "moe q4k"
    assert 0.27 < ours.size / plain.size < 0.33
    assert ours.identical is True
    assert 0 < ours.error < 0.3 and plain.error == 0
    assert ours.peak["total"] > ours.peak["anonymous"] > 0.9 * ours.size
    assert ours.load_ratio() > 0.5
    assert ours.prefill_rate(512) > 0 and ours.decode_rate > 0 and len(ours.decode) == 2
    assert ours.bandwidth_share > 0
    assert results.overhead["q4k"]["microseconds"] < 100
    found = {run.who for run in results.runs} | {what.split()[0] for what in results.skipped}
    assert {"bitsandbytes", "llama.cpp"} <= found | {what.split()[1] for what in results.skipped if " " in what}
    text = bench_models.markdown(results)
    assert "| moe | isqtorch | q4k |" in text and "Small models" in text
    assert [path.name.split("-")[0] for path in tmp_path.iterdir()] == ["moe"]  # the checkpoint, and nothing else
