"""Building the CUDA library: what is looked for, what is said where it is missing, and what is read from the result."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ALL_FORMATS

from benchmarks.cuda import check, sass
from csrc.cuda import build
from isqtorch.cli import doctor, main
from isqtorch.formats import QuantFormat
from isqtorch.ops import native

ROOT = Path(__file__).resolve().parent.parent
CPU, CUDA_13, CUDA_12 = (build.Torch((), (), version) for version in (None, "13.0", "12.8"))


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without any toolkit but what the test puts into the folder."""
    real = build._candidates

    def candidates(environment: dict[str, str]) -> list[Path]:
        return [path for path in real(environment) if tmp_path in path.parents]

    monkeypatch.setattr(build, "_candidates", candidates)
    return tmp_path


def nvcc(home: Path, release: str = "13.0", archs: str = "75 80 86 89 90 100 120") -> dict[str, str]:
    """A program that answers like nvcc, and the environment in which it is found."""
    path = home / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    listed = "\\n".join(f"compute_{arch}" for arch in archs.split())
    path.write_text(
        "#!/bin/sh\n"
        f'case "$1" in --version) echo "Cuda compilation tools, release {release}, V{release}.88";; *) printf "{listed}\\n";; esac\n'
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return {"CUDA_HOME": str(home)}


# ---- whether and with what --------------------------------------------------------------------------------------------


def test_nothing_is_built_for_a_torch_without_cuda(alone: Path) -> None:
    assert build.wanted(CPU, nvcc(alone)) is None


def test_nothing_is_built_if_told_so(alone: Path) -> None:
    assert build.wanted(CUDA_13, {**nvcc(alone), "ISQTORCH_CUDA": "0"}) is None


def test_it_is_built_for_a_torch_with_cuda_or_if_told_so(alone: Path) -> None:
    environment = nvcc(alone)
    for torch_, told in ((CUDA_13, {}), (CPU, {"ISQTORCH_CUDA": "1"})):
        toolkit = build.wanted(torch_, {**environment, **told})
        assert toolkit is not None and toolkit.version == (13, 0) and toolkit.nvcc == alone / "bin" / "nvcc"


def test_a_missing_toolkit_is_said_with_the_way_out(alone: Path) -> None:
    with pytest.raises(build.NotBuilt, match="no nvcc in CUDA_HOME.*pip install nvidia-cuda-nvcc"):
        build.wanted(CUDA_13, {})


def test_an_old_toolkit_is_refused(alone: Path) -> None:
    with pytest.raises(build.NotBuilt, match=r"is release 11\.8; 12\.0 is needed"):
        build.wanted(CUDA_13, nvcc(alone, "11.8"))


def test_a_toolkit_of_another_generation_than_torch_is_refused(alone: Path) -> None:
    with pytest.raises(build.NotBuilt, match=r"release 13\.0, but this torch is for CUDA 12\.8"):
        build.wanted(CUDA_12, nvcc(alone))


def test_a_broken_toolkit_is_refused(alone: Path) -> None:
    environment = nvcc(alone)
    (alone / "bin" / "nvcc").write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(build.NotBuilt, match="nvcc does not run"):
        build.wanted(CUDA_13, environment)


def test_a_wrong_variable_is_refused(alone: Path) -> None:
    with pytest.raises(build.NotBuilt, match="ISQTORCH_CUDA is 'yes'; it must be 0 or 1"):
        build.wanted(CUDA_13, {"ISQTORCH_CUDA": "yes"})


def test_setup_goes_on_without_cuda_unless_told_to_build_it(tmp_path: Path) -> None:
    script = (
        "import setuptools; setuptools.setup = lambda **_: None\n"
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import setup\n"
        "def missing(*_): raise setup.cuda.NotBuilt('no nvcc here')\n"
        "setup.cuda.wanted = missing\n"
        f"setup.build_cuda(setup.Path({str(tmp_path)!r}) / '_CUDA.abi3.so')\n"
    )
    for told, status in (("", 0), ("1", 1)):
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "ISQTORCH_CUDA": told},
            capture_output=True,
            text=True,
        )
        assert done.returncode == status and "isqtorch: " in done.stderr and "no nvcc here" in done.stderr


# ---- for which GPUs ---------------------------------------------------------------------------------------------------


def archs(environment: dict[str, str], toolkit: build.Toolkit) -> list[str]:
    return [arch.name + "+PTX" * arch.ptx for arch in build.chosen_archs(toolkit, environment)[0]]


NEW = build.Toolkit(Path("nvcc"), (13, 0), (75, 80, 86, 89, 90, 100, 120))


@pytest.mark.parametrize(
    ("environment", "names"),
    [
        ({}, ["80", "86", "89", "90", "100", "120+PTX"]),
        ({"ISQTORCH_CUDA_ARCHS": "90a"}, ["90a"]),
        ({"ISQTORCH_CUDA_ARCHS": "80;sm_90a"}, ["80", "90a"]),
        ({"TORCH_CUDA_ARCH_LIST": "8.0 9.0a 12.0+PTX"}, ["80", "90a", "120+PTX"]),
        ({"ISQTORCH_CUDA_ARCHS": "86", "TORCH_CUDA_ARCH_LIST": "8.0"}, ["86"]),
    ],
)
def test_gpus_to_compile_for(environment: dict[str, str], names: list[str]) -> None:
    assert archs(environment, NEW) == names


def test_an_older_toolkit_leaves_out_newer_gpus_and_says_so() -> None:
    found, unknown = build.chosen_archs(build.Toolkit(Path("nvcc"), (12, 4), (80, 86, 89, 90)), {})
    assert [arch.name for arch in found] == ["80", "86", "89", "90"] and unknown == ["100", "120"]
    assert build.flags(found) == ["-gencode=arch=compute_80,code=[sm_80,sm_86,sm_89,sm_90,compute_80]"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hopper", "'hopper' is no GPU architecture"),
        ("70", "compute capability 70 is too old: the kernels need 8.0"),
        ("7.5", "compute capability 7.5 is too old"),
        ("130", "does not compile for 130"),
    ],
)
def test_wrong_gpus_are_refused(text: str, message: str) -> None:
    with pytest.raises(build.NotBuilt, match=message):
        build.chosen_archs(NEW, {"ISQTORCH_CUDA_ARCHS": text})


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("12.0+PTX", ["compute_120,code=[sm_120,compute_120]"]),
        ("89;86", ["compute_86,code=[sm_86,sm_89]"]),
        (";".join(build.ARCHS), ["compute_80,code=[sm_80,sm_86,sm_89,sm_90]", "compute_100,code=[sm_100,sm_120]"]),
        ("8.0 9.0+PTX", ["compute_80,code=[sm_80,sm_90,compute_80]"]),
        # Code for these suffixes runs on one GPU or one family.
        ("80;90a;100f", ["compute_80,code=[sm_80]", "compute_90a,code=[sm_90a]", "compute_100f,code=[sm_100f]"]),
    ],
)
def test_gpus_of_a_generation_are_compiled_together(text: str, groups: list[str]) -> None:
    assert build.flags(build.parse_archs(text)) == [f"-gencode=arch={group}" for group in groups]


def test_the_kernels_ask_for_no_other_generation() -> None:
    """A kernel that does something else on a GPU in the middle of a group would get the code of the oldest one there."""
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "csrc/cuda").rglob("*.cu*"))
    text += "".join(path.read_text(encoding="utf-8") for path in (ROOT / "csrc/searches").rglob("*.h"))
    text += (ROOT / "csrc/cuda/gpu.h").read_text(encoding="utf-8")
    asked = re.findall(r"__CUDA_ARCH(?!__ >= \d|__\) &&)|__CUDA_ARCH__ >= (\d+)", text)
    assert asked and set(asked) == {str(10 * build.GENERATION)}


# ---- loading ----------------------------------------------------------------------------------------------------------


def test_the_library_is_loaded_only_beside_a_torch_with_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native._load_cuda(None, tmp_path) == (None, "this torch knows no CUDA")
    path, why = native._load_cuda("13.0", tmp_path)
    assert path is None and "not compiled; rebuild isqtorch where nvcc 13" in why
    monkeypatch.setenv("ISQTORCH_CUDA", "0")
    assert native._load_cuda("13.0", tmp_path) == (None, "ISQTORCH_CUDA is 0")


def test_a_library_that_does_not_load_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ISQTORCH_CUDA", raising=False)
    (tmp_path / build.NAME).write_bytes(b"not a library")
    with pytest.warns(UserWarning, match="plain PyTorch computes on CUDA, because _CUDA.abi3.so does not load"):
        path, why = native._load_cuda("13.0", tmp_path)
    assert path is None and "does not load" in why


def test_without_the_library_cuda_has_the_reference() -> None:
    if torch.version.cuda is not None:
        pytest.skip("a torch with CUDA")
    assert native.cuda_info() is None and "cuda" not in native.NATIVE_DEVICES
    assert native.missing_kernels("cuda") == "there are no native kernels for cuda (this torch knows no CUDA)"


# ---- what nvcc made ---------------------------------------------------------------------------------------------------

LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1aPf' for 'sm_90a'
ptxas info    : Function properties for _Z1aPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 4096 bytes smem
ptxas info    : Compiling entry function '_Z1bPf' for 'sm_80'
ptxas info    : Function properties for _Z1bPf
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
"""

CODE = """\
\t.headerflags\t@"EF_CUDA_SM90"
.text._Z1aPf:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E R2, [R4.64] ;
        /*0020*/              @P0  BRA `(.L_x_1) ;
.L_x_0:
        /*0030*/                   LOP3.LUT R2, R2, 0xf000f, RZ, 0xc0, !PT ;
        /*0040*/             @!P1  LOP3.LUT R3, R2, 0xf000f, RZ, 0xc0, !PT ;
        /*0050*/                   HMMA.16816.F32.BF16 R8, R4, R2, R8 ;
        /*0060*/              @!UP0 BRA `(.L_x_0) ;
        /*0070*/                   EXIT ;
.L_x_2:
        /*0080*/                   BRA `(.L_x_1);
        /*0090*/                   BRA `(.L_x_2);
.text._Z1bPf:
        /*0000*/                   EXIT ;
"""


def test_the_compilers_log_is_read() -> None:
    assert sass.read_log(LOG) == [
        sass.Usage("_Z1aPf", "sm_90a", 40, 0, 0),
        sass.Usage("_Z1bPf", "sm_80", 255, 16, 20),
    ]
    with pytest.raises(ValueError, match="not as ptxas -v writes it"):
        sass.read_log(LOG[:100])


def test_the_inner_loop_is_found() -> None:
    """Not what the jump back from behind the end spans."""
    a, b = sass.read_code(CODE)
    assert (a.kernel, a.size, dict(a.loop)) == ("_Z1aPf", 10, {"LOP3": 2, "HMMA": 1, "BRA": 1})
    assert (b.kernel, b.size, dict(b.loop)) == ("_Z1bPf", 1, {})


def test_names_become_readable() -> None:
    mangled = "_ZN8isqtorch4cuda11rows_kernelINS0_4Q4_0ELNS_5DtypeE2ELi2EEEvNS0_4TaskE"
    assert sass.demangle([mangled]) == {mangled: "rows_kernel<Q4_0, bf16, 2>"}


def test_more_instructions_than_expected_are_a_fault() -> None:
    found = [check.Loop(name, value, "2 HMMA") for name, value in (("same", 2.05), ("worse", 2.2), ("better", 1.5))]
    worse, notes = check.judge(found, {"same": 2.0, "worse": 2.0, "better": 2.0, "gone": 1.0})
    assert worse == [
        "worse: 2.20 instructions per weight, 2.00 expected (2 HMMA)",
        "gone is in expected.json but does not exist",
    ]
    assert notes == ["better: 1.50 instructions per weight, better than 2.00; --update notes it"]
    assert check.judge(found[:1], {})[0] == ["same is not in expected.json; --update notes it"]


def test_every_product_has_an_expected_number_of_instructions() -> None:
    """Those of each struct of a format, in each type of activations. Some structs are other names for templates."""
    lists = "".join(
        (ROOT / "csrc" / name).read_text(encoding="utf-8") for name in ("blocks.h", "cuda/formats/list.cuh")
    )
    families = [re.findall(rf"#define ISQ_{family.upper()}\(X\)((?:.*\\\n)*.*)", lists) for family in build.FAMILIES]
    structs = [struct for [listed] in families for struct in re.findall(r'X\("[^"]*", ([\w<>]+)\)', listed)]
    recorded = json.loads(check.EXPECTED.read_text(encoding="utf-8"))["per_weight"]
    found: dict[tuple[str, str], set[str]] = {}
    for name in recorded:
        match = re.fullmatch(r"(\w+)<(.*), (f32|f16|bf16), \d+>", name)
        assert match, name
        found.setdefault((match[1], match[3]), set()).add(match[2])
    assert set(found) == {(kernel, x) for kernel in check.PRODUCTS for x in ("f32", "f16", "bf16")}
    assert {len(of) for of in found.values()} == {len(structs)}


def test_the_whole_of_csrc_is_in_a_source_distribution() -> None:
    """setup.py names every file that the build reads."""
    script = (
        "import setuptools, json; seen = {}; setuptools.setup = lambda **o: seen.update(o)\n"
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import setup\n"
        "[extension] = seen['ext_modules']; print(json.dumps([extension.sources, extension.depends]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    sources, depends = json.loads(done.stdout)
    there = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.suffix not in ("", ".pyc")}
    assert there <= {*sources, *depends}
    assert not any("cuda" in path for path in sources)


# ---- what users are told ----------------------------------------------------------------------------------------------

BUILT = native.CudaInfo(
    "13.0", ("80", "90a"), {"q4k": {"block": 256, "block_bytes": 144, "few_rows": 8, "max_rows": 128, "w8a8_rows": 128}}
)


def test_explain_names_the_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    explain = sys.modules["isqtorch.explain"]
    monkeypatch.setattr(explain, "NATIVE_DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(explain, "cuda_info", lambda: BUILT)
    uses = explain._kernels("linear", "q4k", "cuda", native.cpu_info())
    assert [use.rows for use in uses] == ["1-8", "9-128", "129+"] and all("(CUDA)" in use.kernel for use in uses)
    for op in ("embedding", "experts_linear"):
        (use,) = explain._kernels(op, "q4k", "cuda", native.cpu_info())
        assert use.rows == "any" and "(CUDA)" in use.kernel


def test_doctor_checks_and_shows_both_devices(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checked: list[tuple[str, str]] = []

    def check_format(fmt: QuantFormat, device: str = "cpu") -> dict[str, object]:
        checked.append((fmt.name, device))
        return {"ok": device == "cpu" or fmt.name != "q4k", "kernel": "native", "detail": "made up"}

    facts = {
        fmt.name: {"block": 1, "block_bytes": 1, "few_rows": 8, "max_rows": 128, "w8a8_rows": 128}
        for fmt in ALL_FORMATS
    }
    monkeypatch.setattr(doctor, "check_kernels", check_format)
    monkeypatch.setattr(doctor, "_gpu_runs", lambda: True)
    monkeypatch.setattr(doctor, "cuda_info", lambda: native.CudaInfo("13.0", ("80", "90a"), facts))
    assert main(["doctor"]) == 1  # q4k fails on the GPU
    text = capsys.readouterr().out
    assert {device for _, device in checked} == {"cpu", "cuda"}
    assert "toolkit 13.0, for sm_80, sm_90a" in text and "9-128: tiles (CUDA)" in text
    assert "FAIL: q4k" in text.partition("\ncuda\n")[2] and "FAIL: q4k" not in text.partition("\ncuda\n")[0]
    assert main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["cuda"]
    assert found["compiled"]["archs"] == ["80", "90a"] and found["formats"]["q4k"]["ok"] is False
