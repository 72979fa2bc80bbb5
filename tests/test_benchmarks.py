"""The logic of the benchmark report, on made-up measurements; and that small tables are made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import bench_feedback, report, tables, workloads
from benchmarks.peers import MODULES, Unavailable, ggml, module
from benchmarks.peers.process import PeerProcess
from benchmarks.results import BF16, GGML, MEMORY, OURS, Case, Results
from benchmarks.targets import Target, judge
from benchmarks.timing import Samples, Spent, interleave

WEIGHTS = 4096 * 4096
MB = 9_437_184  # of q4_0 and q4k


def made_up(fmt: str = "q4k", ggml_path: str = "AMX") -> Results:
    """One format, every kind of group. We read 9 of 10 GB/s, and are 1.5 times as fast as ggml hot, 3 times at many rows."""
    results = Results()

    def add(group: str, who: str, seconds: float, **facts: object) -> None:
        case = Case(group, who, **{"format": fmt, "nbytes": MB, "weights": WEIGHTS, **facts})  # type: ignore[arg-type]
        results.add(case, seconds, seconds)

    add(f"dram {fmt}", MEMORY, 1.0, nbytes=10_000_000_000, format="")
    add(f"dram {fmt}", OURS, MB / 9.1e9, m=1)
    add(f"dram {fmt}", GGML, MB / 9.0e9, m=1, path=ggml_path)
    for m in (1, 8):
        add(f"hot {fmt}", OURS, 0.0004 * (1 if m == 1 else 1.9), m=m)
        add(f"hot {fmt}", GGML, 0.0006 * m, m=m, path=ggml_path)
        add(f"hot {fmt}", GGML, 0.0020 * m, m=m, path="plain")
    for m in (128, 512):
        add(f"many {fmt}", OURS, 0.0001 * m, m=m, path="amx")
        add(f"many {fmt}", BF16, 0.000095 * m, m=m, format="bf16")
        add(f"many {fmt}", GGML, 0.00031 * m, m=m, path=ggml_path)
    for path, theirs in (("plain", 0.1), ("importance", 0.07)):
        add(f"quantize {fmt}", OURS, 0.01, path=path)
        add(f"quantize {fmt}", GGML, theirs, path=path)
        results.identical[f"quantize {fmt} {path}"] = True
    for threads in (1, 2):
        add(f"threads {fmt} M=512", OURS, 0.05 / threads, m=512, threads=threads)
        add(f"threads {fmt} M=512", MEMORY, 0.02 / threads, threads=threads)
        for group in ("read from memory", "read hot, as much as a q4_0 matrix"):
            add(group, MEMORY, 0.1, threads=threads)
        add("peak", BF16, 0.05, m=512, threads=threads)
    results.facts = {"tiers": {f"many {fmt}": "amx"}, "host": ["made up"], "pace": {"afq4": "q4_0"}, "seconds": 1}
    return results


def named(results: Results, what: str, against: str) -> Target:
    (found,) = [t for t in judge(results, results.facts["pace"]) if t.what.startswith(what) and against in t.against]
    return found


@pytest.mark.parametrize(
    ("what", "against", "ratio"),
    [
        ("M=1, weights from memory", "read", 0.91),
        ("M=1, weights from memory", "ggml", 9.1 / 9.0),
        ("M=1, one matrix hot", "ggml", 1.5),
        ("M=8", "M=1", 1.9),
        ("M=512", "bf16", 0.95),
        ("M=128 and 512, both with amx", "ggml", 3.1),
        ("quantize K-quants, one core, plain", "ggml", 10.0),
        ("quantize K-quants, one core, importance", "ggml", 7.0),
        ("2 threads", "1 thread", 2.0),
    ],
)
def test_ratios(what: str, against: str, ratio: float) -> None:
    target = named(made_up(), what, against)
    assert list(target.ratios.values()) == pytest.approx([ratio] * len(target.ratios))
    assert target.met is True


def test_ggml_is_taken_on_its_best_path() -> None:
    results = made_up()
    found = results.find("hot q4k", GGML, m=1)
    assert found and found.path == "AMX"


def test_more_is_asked_where_ggml_is_slow() -> None:
    target = named(made_up("q3k"), "M=1, one matrix hot", "ggml")
    assert target.met is False
    assert target.target == ">= 1.30x; >= 2.00x for q3k"
    assert target.measured == "0 of 1; worst q3k: 1.50x"


def test_what_was_not_measured_is_neither_met_nor_missed() -> None:
    target = named(made_up(), "M=128 and 512, both with avx2", "ggml")
    assert target.met is None
    assert target.measured == "not measured"


def test_other_bytes_than_ggml_miss_the_target() -> None:
    results = made_up()
    results.identical["quantize q4k plain"] = False
    target = named(results, "quantize K-quants, one core, plain", "ggml")
    assert target.met is False
    assert "other bytes" in target.measured


def test_threads_are_not_judged_on_a_busy_machine() -> None:
    results = made_up()
    results.cases = [case for case in results.cases if not (case.group.startswith("threads") and case.who == MEMORY)]
    for threads, seconds in ((1, 0.02), (2, 0.015)):
        results.add(Case("threads q4k M=512", MEMORY, threads=threads, nbytes=MB), seconds, seconds)
    target = named(results, "2 threads", "1 thread")
    assert target.met is None
    assert target.measured == "not measured; 1 left out: other work took a core"


def test_a_family_is_measured_by_the_format_it_ran_beside() -> None:
    results = made_up()
    for fmt, seconds in (("afq4", 0.0005), ("q4_0", 0.0004)):
        results.add(Case("hot afq4", OURS, fmt, 1, nbytes=MB, weights=WEIGHTS), seconds, seconds)
    target = named(results, "M=1, hot: AFQ", "q4_0")
    assert target.ratios == pytest.approx({"afq4": 0.8})
    assert target.met is False
    assert "M=1, hot: AFQ, HQQ, FP8" in tables.misses([target])


def test_worst_of_a_bound_from_above() -> None:
    target = Target("t", "a", 2.0, at_most=True, ratios={"x": 1.5, "y": 3.0})
    assert (target.worst, target.met) == ("y", False)


def test_report_has_every_part_and_survives_json(tmp_path: Path) -> None:
    results = made_up()
    again = Results.from_json(json.loads(json.dumps(results.to_json())))
    text = report.markdown(again)
    assert text == report.markdown(results)
    assert text.count("\n## ") == 8
    assert "| q4k | 9.4 | 10.0 | 9.1 | 91 | 9.0 |" in text
    report.write(again, tmp_path / "cpu-date.json")
    assert {path.suffix for path in tmp_path.iterdir()} >= {".json", ".md"}


def test_report_without_ggml_or_other_formats() -> None:
    results = made_up()
    results.cases = [case for case in results.cases if case.who != GGML]
    results.skipped = ["ggml: not installed: pip install llama-cpp-python"]
    text = report.markdown(results)
    assert "not installed: pip install llama-cpp-python" in text
    assert named(results, "M=1, one matrix hot", "ggml").met is None


class _Steps:
    """A contender that says how often it ran."""

    def __init__(self, log: list[str], name: str, seconds: float) -> None:
        self.log, self.name, self.seconds = log, name, seconds

    def run(self, calls: int) -> Spent:
        self.log.append(f"{self.name}{calls}")
        return Spent(self.seconds, 2 * self.seconds)


def test_rounds_take_turns() -> None:
    log: list[str] = []
    samples = interleave({"a": _Steps(log, "a", 0.05), "b": _Steps(log, "b", 5)}, rounds=2, seconds=1)
    tried = ["a1", "a1", "b1", "b1"]  # to see how long one takes
    assert log == tried + ["a1", "a10", "b1"] * 2  # a short call warms up first
    assert samples["a"] == Samples([0.05, 0.05], [0.1, 0.1])
    assert samples["a"].median(threads=1) == 0.05
    assert samples["a"].median(threads=2) == 0.1


@pytest.mark.parametrize(("limit", "rounds"), [(1000.0, 9), (50.0, 5), (1.0, 3)])
def test_long_calls_get_fewer_rounds(limit: float, rounds: int) -> None:
    samples = interleave({"a": _Steps([], "a", 5)}, rounds=9, seconds=1, limit=limit)
    assert len(samples["a"].wall) == rounds


def test_copies_exceed_the_cache() -> None:
    assert workloads.copies_for(MB, "hot") == 1
    assert workloads.copies_for(MB, "dram") * MB > workloads.DRAM_BYTES


def test_peers_say_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISQTORCH_GGML_LIB", str(tmp_path))
    with pytest.raises(Unavailable, match="no libggml-base in"):
        ggml.open()
    for name in MODULES:
        assert module(name).INSTALL


def test_a_peer_that_cannot_start_is_an_answer(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="no libggml-base in"):
        PeerProcess("ggml", {"ISQTORCH_GGML_LIB": str(tmp_path)})


def test_the_table_of_feedback(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_feedback.main(["--formats", "q8_0", "afq4", "--shape", "8", "64"]) == 0
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert header.startswith("| format |")
    assert [row.split(" | ")[0] for row in rows] == ["| q8_0", "| afq4"]
    assert all(float(cell) > 0 for row in rows for cell in row.strip("| ").split(" | ")[1:3])
