"""The logic of the quality table: rows as data, tables of made-up measurements, one small model end to end."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

from benchmarks import bench_quality
from benchmarks.quality import plot, tables
from benchmarks.quality.measure import Quality, Results
from benchmarks.quality.rows import Row, default
from isqtorch.formats import formats, get_format
from isqtorch.quantizers import has_rule, uses_importance

DEMO = Path(__file__).resolve().parent.parent / "examples/demo_model"


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ("q4k", Row("q4k")),
        ("q4k+imatrix", Row("q4k", imatrix=True)),
        ("afq3+search+imatrix", Row("afq3", True, "search")),
        ("auto+target_bpw=4.5+imatrix", Row("auto", True, None, {"target_bpw": 4.5})),
        ("q8_0+fallback=skip", Row("q8_0", options={"fallback": "skip"})),
    ],
)
def test_rows_are_spelled(text: str, row: Row) -> None:
    assert Row.parse(text) == row and row.name == text


@pytest.mark.parametrize("text", ["", "+imatrix", "q4k+", "afq4+mlx+search"])
def test_rows_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="row"):
        Row.parse(text)


def test_the_default_has_every_format_in_every_way() -> None:
    names = [row.name for row in default()]
    assert len(set(names)) == len(names)
    for name in formats():
        fmt = get_format(name)
        if name in ("q8_1", "q8k"):
            assert name not in names
            continue
        assert name in names
        assert (f"{name}+imatrix" in names) == fmt.takes_importance
        assert (f"{name}+search" in names) == has_rule(fmt, "search")
        assert (f"{name}+search+imatrix" in names) == (has_rule(fmt, "search") and uses_importance(fmt, "search"))


def made_up() -> Results:
    rows = [
        Quality("float32", "", 32_000_000, 32.0, 20.0),
        Quality("afq4", "", 5_000_000, 5.0, 20.5, 0.01, 0.1, 95.0),
        Quality("afq4", "search+imatrix", 5_000_000, 5.0, 20.4, 0.0075, 0.08, 96.0),
        Quality("auto", "target_bpw=4.5", 4_500_000, 4.5, 20.6, 0.012, 0.1, 94.0),
    ]
    facts = {name: name for name in ("model", "text", "context", "calibrated", "commit", "torch", "date", "command")}
    return Results(rows, {"q9": "unknown format"}, {**facts, "scored": 100, "perplexity_stderr": 0.5})


def test_the_table_and_the_page(tmp_path: Path) -> None:
    results = Results.from_json(json.loads(json.dumps(made_up().to_json())))
    assert results == made_up()
    table = tables.quality_table(results)
    assert "| afq4 | search, imatrix | 5.00 | 5.00 | 20.400 | 0.00750 | -25 % | 0.0800 | 96.00 |" in table
    assert "| auto | target_bpw=4.5 | 4.50 | 4.50 | 20.600 | 0.0120 |  | 0.100 | 94.00 |" in table
    paths = bench_quality.write(results, tmp_path / "quality.json")
    assert all(path.stat().st_size for path in paths) and "not measured: q9: unknown format" in paths[1].read_text()

    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text("before\n<!-- quality:begin -->\nold\n<!-- quality:end -->\nafter\n")
    bench_quality.write_page(results, paths[2], page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text and table in text
    assert "](../quality.png)" in text
    page.write_text("no markers")
    with pytest.raises(ValueError, match="quality:begin"):
        bench_quality.write_page(results, paths[2], page)


def test_families_of_the_plot() -> None:
    assert plot.family("Q4_K") == plot.family("q6k") != plot.family("q4_0")
    assert plot.family("afq4g32") == "afq" and plot.family("auto") == "mixed"


def test_a_run_on_the_demo_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Few tokens: the numbers must agree with the functions of the library, and a row that is refused is told."""
    rows = ["--rows", "afq2", "afq2+search", "q8_0+imatrix", "q9", "--tokens", "600", "--output", str(tmp_path)]
    calibration = tmp_path / "few.txt"
    calibration.write_text((DEMO / "calibration.txt").read_text(encoding="utf-8")[:2000], encoding="utf-8")
    assert bench_quality.main([*rows, "--calibration", str(calibration)]) == 0
    (stored,) = tmp_path.glob("quality-demo-model-*.json")
    results = Results.from_json(json.loads(stored.read_text()))
    base, plain, searched, eight = results.rows
    assert base.kl == 0 and base.bits_per_weight == 32 and results.facts["scored"] == 600 - 3
    assert searched.kl < plain.kl and searched.size == plain.size and eight.kl < 0.001
    assert plain.stored == {"afq2": 56, "afq6": 1}
    assert "unknown format" in results.skipped["q9"] and "q9" in capsys.readouterr().out
    assert str(tmp_path) not in stored.read_text()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import isqtorch

    model = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    ids = tokenizer((DEMO / "heldout.txt").read_text(encoding="utf-8")[:9600], verbose=False)["input_ids"][:600]
    reference = isqtorch.reference_logits(model, ids, context=256)
    isqtorch.quantize_(model, "afq2", progress=False)
    assert isqtorch.kl_divergence(model, reference, ids, context=256).mean == pytest.approx(plain.kl, rel=1e-4)
    assert isqtorch.perplexity(model, ids, context=256) == pytest.approx(plain.perplexity, rel=1e-4)


def test_arguments_that_are_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--model", str(tmp_path)], ["--dtype", "int8"]):
        with pytest.raises(SystemExit):
            bench_quality.main(arguments)
    assert bench_quality.main(["--text", str(tmp_path / "none.txt")]) == 1
    assert "none.txt" in capsys.readouterr().err
    files = {"model": str(tmp_path / "m"), "text": tmp_path / "t.txt", "calibration": tmp_path / "c.txt"}
    command = bench_quality.command(SimpleNamespace(**files, rows=["q4k"], tokens=10, context=5, dtype="auto"))
    assert command.endswith("--model m --text t.txt --calibration c.txt --rows q4k") and str(tmp_path) not in command
