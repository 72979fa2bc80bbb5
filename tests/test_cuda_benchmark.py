"""The benchmark of the CUDA kernels without a GPU: what is measured, left out, judged and written, with a made-up clock."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from helpers import check_scaled_mm
from torch import Tensor

from benchmarks import bench_ops
from benchmarks.cuda import contenders, gpu_check, report, targets
from benchmarks.cuda.contenders import Bf16, Ours, Product, Unavailable
from benchmarks.cuda.session import OURS, Case, Results, Session

SHAPE = (64, 256)


class MadeUp:
    """A clock that runs every call once, so that it works, and says what it likes."""

    def __init__(self, seconds: float = 1e-3) -> None:
        self._seconds = seconds
        self.copies: list[int] = []

    def seconds(self, calls: Sequence[Callable[[], object]]) -> float:
        self.copies.append(len(calls))
        for call in calls:
            call()
        return self._seconds


def session(*, cache: int = 0, deadline: float = 1e12, clock: MadeUp | None = None) -> Session:
    return Session("cpu", clock or MadeUp(), MadeUp(0.5), cache=cache, deadline=deadline)


# ---- measuring --------------------------------------------------------------------------------------------------------


def test_every_contender_format_and_number_of_rows_is_measured() -> None:
    run = session()
    run.products([Bf16(), Ours(["q4k", "fp8"])], SHAPE, [1, 8])
    run.quantize(["afq4", "q4k"], SHAPE)
    assert [(case.who, case.format, case.m) for case in run.results.cases] == [
        ("bf16", "bf16", 1),
        ("bf16", "bf16", 8),
        *((OURS, format, m) for format in ("q4k", "fp8") for m in (1, 8)),
        *((OURS, format, 0) for format in ("afq4", "afq4+search", "q4k")),
    ]
    product, quantized = run.results.cases[2], run.results.cases[-1]
    assert product.nbytes == 64 * 144 and product.seconds == 1e-3
    assert product.rate == 64 * 144 / 1e-3 and product.tflops == pytest.approx(2 * 64 * 256 / 1e-3 / 1e12)
    assert quantized.seconds == 0.5 and quantized.nbytes == 64 * 144 + 64 * 256 * 2  # read and written


def test_copies_exceed_the_cache() -> None:
    clock = MadeUp()
    run = session(cache=100_000, clock=clock)
    run.products([Ours(["q4k"])], SHAPE, [1])
    (copies,) = clock.copies
    assert copies * 64 * 144 > 4 * 100_000 and session().copies(1) == 2


def test_our_products_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    right = contenders.ops.linear
    monkeypatch.setattr(contenders.ops, "linear", lambda *arguments: 1.1 * right(*arguments))
    run = session()
    run.products([Ours(["q4k"])], SHAPE, [8])
    assert not run.results.cases
    (fault,) = run.results.faults
    assert fault.startswith("isqtorch q4k 64x256 M=8: linear of q4k, 8 rows, is off by 0.1")


def test_a_product_with_another_weight_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    right = contenders.ops.quantize
    monkeypatch.setattr(contenders.ops, "quantize", lambda weight, format: right(-weight, format))
    run = session()
    run.products([Ours(["q8_0"])], SHAPE, [1])
    assert run.results.faults == ["isqtorch q8_0 64x256 M=1: its product is off by 2"] and not run.results.cases


def test_our_quantizers_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    right = contenders.ops.dequantize
    monkeypatch.setattr(contenders.ops, "dequantize", lambda *arguments: -right(*arguments))
    run = session()
    run.quantize(["q4k"], SHAPE)
    assert run.results.faults == ["quantize q4k: decoded weights differ"] and not run.results.cases


class Another:
    """A library that takes no part in one of two numbers of rows."""

    name = "another"
    formats = ("int4",)

    def __init__(self, factor: float = 1.0) -> None:
        self._factor = factor

    def product(self, format: str, weight: Tensor, x: Tensor, copies: Callable[[int], int]) -> Product:
        if len(x) == 8:
            raise Unavailable("not eight rows")
        return Product([lambda: self._factor * (x @ weight.t())], 1000, at_once=4, captured=False)


def test_what_a_library_does_not_do_is_reported() -> None:
    run = session()
    run.products([Another()], SHAPE, [1, 8])
    assert [(case.m, case.seconds) for case in run.results.cases] == [(1, 0.5 / 4)]  # its own clock, four at once
    assert run.results.skipped == ["another int4 64x256 M=8: not eight rows"]
    run.products([Another(-1.0)], SHAPE, [1])
    assert run.results.skipped[1] == "another int4 64x256 M=1: its product is off by 2"


def test_nothing_begins_after_the_deadline() -> None:
    run = session(deadline=time.monotonic())
    run.products([Bf16()], SHAPE, [1])
    run.quantize(["q4k"], SHAPE)
    assert not run.results.cases
    assert run.results.skipped == ["bf16 bf16 64x256 M=1: no time left", "quantize q4k: no time left"]


def test_missing_libraries_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> object:
        raise ImportError(name)

    monkeypatch.setattr(contenders.importlib, "import_module", absent)
    skipped: list[str] = []
    assert [peer.name for peer in contenders.peers(skipped)] == ["bf16", "tinygemm", "_scaled_mm"]
    assert skipped == [
        "bitsandbytes: not installed",
        "mlx: not installed",
        "gemlite: not installed",
        "humming: not installed",
    ]


def rounding(x: Tensor, packed: Tensor, format: str) -> Tensor:
    """What linear_w8a8 is where there are FP8 products."""
    both = [contenders.ops.dequantize(t, format, torch.float32) for t in (contenders.ops.quantize(x, format), packed)]
    return (both[0] @ both[1].t()).to(x.dtype)


def test_fp8_activations_are_measured_where_they_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unavailable, match="there are no CUDA kernels"):
        contenders.OursRounded(8)
    monkeypatch.setattr(contenders, "no_fp8_products", lambda device: None)
    ours = contenders.OursRounded(8)
    run = session()
    run.products([ours], SHAPE, [9])  # nothing rounds here
    (fault,) = run.results.faults
    assert "linear of fp8, 9 rows, is off by 0.02" in fault and not run.results.cases
    monkeypatch.setattr(contenders, "linear_w8a8", rounding)
    run = session()
    run.products([ours], SHAPE, [8, 9])
    assert [(case.who, case.m, case.nbytes) for case in run.results.cases] == [("isqtorch W8A8", 9, 64 * 264)]
    assert run.results.skipped == ["isqtorch W8A8 fp8 64x256 M=8: the same as isqtorch's fp8"]


def test_the_fp8_peer_with_scales_for_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    def product(x: Tensor, w: Tensor, *, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype) -> Tensor:
        check_scaled_mm(x, w, scale_a, scale_b, out_dtype)
        both = (x.float() * scale_a.repeat_interleave(128, 1)) @ (w.float() * scale_b.repeat_interleave(128, 0))
        return both.to(out_dtype)

    monkeypatch.setattr(contenders.torch, "_scaled_mm", product)
    weight, x = torch.randn(64, 256).bfloat16(), torch.randn(16, 256).bfloat16()
    made = contenders.ScaledMM().product("fp8g128", weight, x, lambda nbytes: 2)
    want = x.float() @ weight.float().t()
    assert made.nbytes == 64 * 256 + 64 * 2 * 4 and len(made.calls) == 2
    for call in made.calls:
        assert float((call().float() - want).norm() / want.norm()) < 0.05


def test_the_bandwidth_counts_both_ways() -> None:
    run = session()
    run.bandwidth(1 << 16)
    assert run.results.facts == {"read": (1 << 16) / 1e-3, "copy": 2 * (1 << 16) / 1e-3}


# ---- judging ----------------------------------------------------------------------------------------------------------


def made_up() -> Results:
    """bf16 at 2 TB/s; we 1.5 times the peer with as many bits, at 90 % of the roof; M = 8 a little slower than M = 1."""
    n = k = 8192
    bf16, ours = 2 * n * k / 2e12, n * k * 4.5 / 8 / 2.7e12
    cases = []
    for m in targets.ROWS:
        cases.append(Case("bf16", "bf16", n, k, m, bf16 * max(1, m / 128), 2 * n * k))
        cases.append(Case("tinygemm", "int4g64", n, k, m, ours * 1.5 * max(1, m / 16), n * k * 9 // 16))
        cases.append(Case("_scaled_mm", "fp8", n, k, m, 1e-9, n * k))  # other bits: not compared with
        if m >= 512:
            fp8 = bf16 * m / 128 / 1.2
            cases.append(Case(OURS, "fp8", n, k, m, fp8, n * k * 33 // 32))
            cases.append(Case(targets.ROUNDED, "fp8", n, k, m, fp8 * {512: 1.25, 2048: 0.75}[m], n * k * 33 // 32))
        cases.append(Case(OURS, "q4k", n, k, m, ours * {8: 1.05}.get(m, max(1, m / 64)), n * k * 9 // 16))
    cases.append(Case(OURS, "q2k", n, k, 1, bf16 / 4, n * k * 21 // 64))
    cases += [Case(OURS, "q4k", 4096, 14336, 0, 8e-3, 1), Case(OURS, "q8_0", 4096, 14336, 0, 1e-3, int(1.2e9))]
    facts = {"gpu": "NVIDIA H100 80GB HBM3", "roof": 3e12, "read": 3.1e12, "copy": 2.9e12, "seconds": 100}
    facts |= {"host": ["a host"], "versions": {"torch": "2.11"}, "generate": {"bf16": 100.0, "q4k": 250.0}}
    return Results(facts, cases, ["mlx: not installed"])


@pytest.mark.parametrize(
    ("what", "values", "met"),
    [
        ("M = 1 to 8, 4 to 8 bits: packed", {"q4k 8192x8192 M=1": 90.0, "q4k 8192x8192 M=8": 90 / 1.05}, True),
        ("M = 1 to 8, 4 to 8 bits", {"q4k 8192x8192 M=1": 1.5, "q4k 8192x8192 M=8": 1.5 / 1.05}, False),
        ("M = 8, 4 to 8 bits", {"q4k 8192x8192 M=8": 1.05}, True),
        ("M = 1, 2 and 3 bits", {"q2k 8192x8192 M=1": 4.0}, True),
        ("M = 16 to 64", {"q4k 8192x8192 M=16": 4.8}, True),
        ("M = 512", {"q4k 8192x8192 M=512": 2.4}, True),
        ("M = 2048", {"q4k 8192x8192 M=2048": 2.4}, True),
        ("fp8 with activations in FP8, M = 512", {"fp8 8192x8192 M=512": 0.8, "fp8 8192x8192 M=2048": 4 / 3}, False),
        ("fp8 with activations in FP8, M = 2048", {"fp8 8192x8192 M=2048": 1.6}, True),
        ("quantize 4096 x 14336 to q4k", {"q4k": 8.0}, True),
        ("quantize 4096 x 14336 to q8_0", {"q8_0": 40.0}, False),
        ("8B-shaped model", {"q4k": 2.5}, True),
    ],
)
def test_targets(what: str, values: dict[str, float], met: bool) -> None:
    exact = [target for target in targets.judge(made_up()) if target.what == what]
    target = (exact or [target for target in targets.judge(made_up()) if target.what.startswith(what)])[0]
    assert {name: target.values[name] for name in values} == pytest.approx(values)
    assert target.met is met


def test_nothing_measured_is_neither_met_nor_missed() -> None:
    found = targets.judge(Results({}, [], []))
    assert {target.met for target in found} == {None} and {target.measured for target in found} == {"not measured"}


# ---- the report -------------------------------------------------------------------------------------------------------


def test_the_report_has_everything_and_is_made_again_from_its_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    paths = report.write(made_up(), tmp_path / "gpu.json")
    assert [path.suffix for path in paths] == [".json", ".md", ".png"] and paths[2].stat().st_size > 1000
    text = paths[1].read_text(encoding="utf-8")
    assert text.startswith("# NVIDIA H100 80GB HBM3\n")
    for part in ("reads 3.10 TB/s", "8192 x 8192, microseconds", "tinygemm", "- mlx: not installed", "- q4k: 250.0"):
        assert part in text, part
    for path in paths[1:]:
        path.unlink()
    assert bench_ops.main(["--device", "cuda", "--from", str(paths[0])]) == 0
    assert paths[1].read_text(encoding="utf-8") == text
    assert "| M = 512 | bf16 cuBLAS | >= 1.00x |" in capsys.readouterr().out


def test_what_was_measured_before_a_fault_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = Results.from_json(made_up().to_json() | {"faults": ["generate: out of memory"]})
    (tmp_path / "gpu.json").write_text(json.dumps(results.to_json()), encoding="utf-8")
    assert report.main(["--from", str(tmp_path / "gpu.json")]) == 1
    assert "FAULT: generate: out of memory" in capsys.readouterr().err
    assert "## Faults\n\n- generate: out of memory\n\n## Machine" in (tmp_path / "gpu.md").read_text()


def test_results_survive_json() -> None:
    results = made_up()
    assert Results.from_json(json.loads(json.dumps(results.to_json()))).cases == results.cases


def test_the_name_of_the_file() -> None:
    assert report.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert report.main([]) == 1
    assert "torch sees no CUDA GPU here" in capsys.readouterr().err


def test_an_unknown_format_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        report.main(["--formats", "q7z"])
    assert "unknown format 'q7z'" in capsys.readouterr().err


# ---- gpu-check --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failing", "installed", "ran", "status"),
    [
        ("", True, ["tests", "compute-sanitizer", "benchmark"], 0),
        ("", False, ["tests", "benchmark"], 0),
        ("tests", True, ["tests", "compute-sanitizer"], 1),
        ("compute-sanitizer", True, ["tests", "compute-sanitizer"], 1),
        ("benchmark", False, ["tests", "benchmark"], 1),
    ],
)
def test_gpu_check_runs_its_steps(
    failing: str, installed: bool, ran: list[str], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []

    def run(command: Sequence[str]) -> int:
        line = " ".join(command)
        name = "compute-sanitizer" if "memcheck" in line else "tests" if "pytest" in line else "benchmark"
        if name == "benchmark":
            assert "--seconds=100" in line or "--seconds=99" in line
        seen.append(name)
        return int(name == failing)

    find = (lambda name: f"/bin/{name}") if installed else (lambda name: None)
    assert gpu_check.run_all(False, run, find, limit=100) == status
    assert seen == ran
    said = capsys.readouterr().out
    assert ("compute-sanitizer is not installed: not run" in said) != installed
    assert ("benchmark: not run, because" in said) == (bool(failing) and failing != "benchmark")


def test_gpu_check_without_a_gpu_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 1
    assert "sees no CUDA GPU here" in capsys.readouterr().err
