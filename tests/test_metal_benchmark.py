"""The benchmark of the Metal kernels without a Mac: what is measured and written, with a made-up clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from benchmarks import bench_ops, metal
from benchmarks.cuda.session import Results, Session


class MadeUp:
    def seconds(self, calls: Sequence[Callable[[], object]]) -> float:
        for call in calls:
            call()
        return 1e-3


def test_everything_is_measured_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metal, "QUICK_SHAPES", [(64, 256)])
    monkeypatch.setattr(metal, "chip", lambda: "M3 Max")
    monkeypatch.setattr(Session, "bandwidth", lambda self: self.results.facts.update(read=3.5e11, copy=3e11))
    session = Session("cpu", MadeUp(), MadeUp(), cache=0, deadline=1e12)
    results = metal.measure(session, ["afq4", "q4k"], quick=True)
    ours = [(case.format, case.m) for case in results.cases if case.who == "isqtorch"]
    assert ours == [("afq4", 1), ("afq4", 32), ("q4k", 1), ("q4k", 32), ("afq4", 0), ("afq4+search", 0), ("q4k", 0)]
    assert not results.faults and "## Faults" not in metal.markdown(results)
    results.faults.append("quantize q4k: decoded weights differ")
    text = metal.markdown(Results.from_json(results.to_json()))
    assert "## Faults\n\n- quantize q4k: decoded weights differ\n" in text
    assert "# M3 Max" in text and "400 GB/s by specification" in text and "## 64 x 256, microseconds" in text
    row = next(line for line in text.splitlines() if line.startswith("| isqtorch | q4k"))
    assert "0, 0%" in row and row.count("1000") == 2  # 9 KB in a millisecond


def test_without_a_mac_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if metal.torch.backends.mps.is_available():
        pytest.skip("this is a Mac")
    assert bench_ops.main(["--device", "mps", "--quick", "--output", str(tmp_path)]) == 1
    assert "torch sees no MPS device here" in capsys.readouterr().err and not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        bench_ops.main(["--device", "mps", "--formats", "q9"])
    assert "unknown format 'q9'" in capsys.readouterr().err
