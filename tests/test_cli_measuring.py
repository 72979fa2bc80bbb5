"""The commands that measure: bench, demo, imatrix."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from test_cli import MODEL, ROOT, TEXT, run, run_json

from isqtorch.cli import bench, build_parser, demo
from isqtorch.formats import formats, get_format

# ---- bench -----------------------------------------------------------------------------------------------------------


def test_bench(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # every measurement is a process of its own
    few = ("--prompt-len", "16", "--gen-len", "4", "--repeat", "2")
    assert run("bench", "-m", MODEL, "--isq", "q2k", *few, "--json") == 0
    base, q2k = json.loads(capfd.readouterr().out)["rows"]
    assert (base["format"], q2k["format"]) == ("bf16", "q2k")
    assert base["bytes"] > 4 * q2k["bytes"] > 0
    for row in (base, q2k):
        assert row["load_seconds"] > 0 and row["peak_bytes"] > row["bytes"]
        for name in ("prefill", "decode"):
            low, high = row[f"{name}_range"]
            assert 0 < low <= row[name] <= high

    monkeypatch.setattr(bench, "_in_a_process", lambda args, fmt: q2k if fmt else base)
    assert run("bench", "-m", MODEL, "--isq", "q2k") == 0
    rows = capfd.readouterr().out.partition("\n\n")[2].splitlines()
    assert [row.split()[0] for row in rows if not row.startswith("-")] == ["format", "bf16", "q2k"]


def test_bench_reports_a_failed_process(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    assert run("bench", "-m", MODEL, "--isq", "4", "--json") == 1
    out, err = capfd.readouterr()
    assert json.loads(out)["rows"] == []
    assert "the model as it is: failed with status 1" in err and "4: failed with status 1" in err


# ---- demo ------------------------------------------------------------------------------------------------------------


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(demo, "_DECODE_REPEATS", 1)
    plot = tmp_path / "quality.png"
    found = run_json(capsys, "demo", "--formats", "8", "q2k", "--tokens", "700", "--plot", str(plot))
    base, q8_0, q2k = found["rows"]
    assert [base["format"], q8_0["format"], q2k["format"]] == ["bf16", "q8_0", "q2k"]
    assert base["kl"] == 0 and base["top1_agreement"] == 100 and base["bits_per_weight"] == 16
    assert base["size_mb"] > q8_0["size_mb"] > q2k["size_mb"]
    assert 0 < q8_0["kl"] < q2k["kl"] < 0.3
    assert all(row["tokens_per_second"] > 0 and len(row["text"]) > 10 for row in found["rows"])
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_labels_of_the_demos_plot_do_not_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for formats with nearly the same size and divergence. Families have markers of their own, for prints without colours."""
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    names = ["q8_0", "q4k", "iq4_xs", "q4_0", "afq4", "hqq4", "mxfp4", "q5_1", "fp8"]
    rows = [
        demo.Row(name, 4.4 + 0.02 * i, 4.8, 30.0, 0.01 * (1 + 0.05 * i), 92.0, 100.0, "")
        for i, name in enumerate(names)
    ]
    demo.draw_demo([demo.Row("bf16", 14.7, 16.0, 30.0, 0.0, 100.0, 100.0, ""), *rows], tmp_path / "x.png")
    (axes,) = pyplot.gcf().axes
    texts = [text for text in axes.texts if text.get_text()]
    boxes = [text.get_window_extent() for text in texts]
    assert [text.get_text() for text in texts] == names
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    shapes = {points.get_paths()[0].vertices.tobytes() for points in axes.collections}
    assert len(shapes) == len({get_format(name).solver for name in names})
    pyplot.switch_backend("Agg")  # closes all


def test_demo_text_and_markdown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(demo, "_DECODE_REPEATS", 1)
    few = ["demo", "--formats", "4", "--tokens", "100"]
    assert run(*few) == 0
    text = capsys.readouterr().out
    assert "q4k" in text and "CPU kernels:" in text and "100 held-out tokens" in text
    assert run(*few, "--markdown") == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("| format | size MB | bits/weight |")


def test_demo_formats_resolve() -> None:
    """The default list names a member of every family once, and no format twice."""
    args = build_parser().parse_args(["demo"])
    names = demo._check(args)
    assert len(names) == len(set(names)) == 1 + len(demo.FORMATS)
    assert {get_format(name).solver for name in names[1:]} == {get_format(name).solver for name in formats()}


# ---- imatrix ---------------------------------------------------------------------------------------------------------

CALIBRATION = str(ROOT / "examples/demo_model/calibration.txt")


def test_imatrix_collects_saves_and_is_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo.gguf"
    facts = run_json(capsys, "imatrix", MODEL, CALIBRATION, "-o", str(out), "--max-tokens", "1024", "--chunk", "256")
    assert facts["tokens"] == 1024 and facts["chunk_count"] == 4 and facts["experts_without_data"] == 0
    assert facts["entries"] == 57  # 7 in each of 8 blocks, and the head
    common = ["perplexity", MODEL, "--text", TEXT, "--tokens", "512", "--isq", "q2k"]
    scores = [run_json(capsys, *common, *more)["perplexity"] for more in ([], ["--imatrix", str(out)])]
    assert scores[0] != scores[1]


def test_imatrix_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, message in (
        (("imatrix", MODEL, CALIBRATION, "-o", str(tmp_path / "x.txt")), "must end in .gguf"),
        (("imatrix", MODEL, CALIBRATION, "-o", str(tmp_path / "no/x.gguf")), "no folder"),
        (("imatrix", MODEL, str(tmp_path / "no.txt"), "-o", str(tmp_path / "x.gguf")), "no.txt"),
        (("perplexity", MODEL, "--text", TEXT, "--calibration-file", TEXT), "need --isq"),
        (("perplexity", MODEL, "--text", TEXT, "--rule", "search"), "need --isq"),
        (("perplexity", MODEL, "--text", TEXT, "--isq", "q4k", "--rule", "search"), "has no rule 'search'"),
    ):
        assert run(*argv) == 1
        assert message in capsys.readouterr().err
    assert run("perplexity", MODEL, "--text", TEXT, "--isq", "4", "--imatrix", "a", "--calibration-file", "b") == 2
