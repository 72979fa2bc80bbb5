"""Wheels, workflows and tags: what `make wheel` looks at, and what the workflow files promise."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import pytest
import yaml

from release import version, wheel

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
GOOD = "isqtorch-0.1.0-cp310-abi3-manylinux_2_28_x86_64.whl"
FILES = (
    "isqtorch/__init__.py",
    "isqtorch/_C.abi3.so",
    "isqtorch/py.typed",
    "isqtorch/csrc/ops.cpp",
    "isqtorch/csrc/metal/formats/fp8.h",
    "isqtorch/csrc/metal/kernels/linear.metal",
    "isqtorch/formats/gguf_grids.bin",
    "isqtorch/app/server/page.html",
    "isqtorch-0.1.0.dist-info/METADATA",
)

pytestmark = pytest.mark.skipif(not WORKFLOWS, reason="the source distribution has no workflows")


def elf(machine: int) -> bytes:
    """The beginning of a library of Linux: 64 bits, little-endian, shared, for this kind of processor; and what it needs."""
    header = b"\x7fELF\x02\x01\x01" + bytes(9) + (3).to_bytes(2, "little") + machine.to_bytes(2, "little")
    return header + b"\0libc10.so\0libtorch_cpu.so\0"


X86, ARM = 62, 183


def made(
    folder: Path, name: str = GOOD, *, more: tuple[str, ...] = (), without: str = "", library: bytes = elf(X86)
) -> Path:
    with zipfile.ZipFile(folder / name, "w") as archive:
        for file in (*FILES, *more):
            content = b"License-Expression: Apache-2.0\n" if file.endswith("METADATA") else b""
            if file != without:
                archive.writestr(file, library if file.endswith(".so") else content)
    return folder / name


def test_a_whole_wheel_has_no_faults(tmp_path: Path) -> None:
    assert wheel.look(made(tmp_path)) == []
    assert wheel.look(made(tmp_path, more=("isqtorch/_CUDA.abi3.so",))) == []
    name = "isqtorch-0.1.0-cp310-abi3-macosx_11_0_arm64.whl"
    assert wheel.look(made(tmp_path, name, without="isqtorch/_C.abi3.so")) == []  # a Mac may do without
    assert wheel.look(made(tmp_path, name, library=b"\xcf\xfa\xed\xfe")) == []


@pytest.mark.parametrize("missing", [file for file in FILES[1:] if not file.endswith((".h", "METADATA"))])
def test_a_missing_file_is_a_fault(missing: str, tmp_path: Path) -> None:
    assert len(wheel.look(made(tmp_path, without=missing))) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("isqtorch.libs/libtorch-1234.so", "belongs to torch or to the system"),
        ("isqtorch.libs/libgomp-24e2ab19.so.1.0.0", "belongs to torch or to the system"),
        ("tests/conftest.py", "would be installed beside the package"),
        ("csrc/cuda/build.py", "would be installed beside the package"),
        ("isqtorch/csrc/cuda/table.cu", "belongs to the build"),
        ("isqtorch/__pycache__/x.cpython-312.pyc", "belongs to the build"),
    ],
)
def test_what_does_not_belong_into_a_wheel(more: str, message: str, tmp_path: Path) -> None:
    assert message in " ".join(wheel.look(made(tmp_path, more=(more,))))


@pytest.mark.parametrize(
    "name",
    [
        "isqtorch-0.1.0-cp312-cp312-manylinux_2_28_x86_64.whl",
        "isqtorch-0.1.0-py3-none-any.whl",
        "isqtorch-0.1.0-cp310-abi3-linux_x86_64.whl",
    ],
)
def test_names_that_would_not_be_found(name: str, tmp_path: Path) -> None:
    assert wheel.look(made(tmp_path, name))


@pytest.mark.parametrize(
    ("tag", "library", "fault"),
    [
        ("manylinux_2_28_aarch64", elf(ARM), ""),
        ("manylinux_2_28_aarch64", elf(X86), "isqtorch/_C.abi3.so is for x86_64"),
        ("manylinux_2_28_x86_64", elf(ARM), "isqtorch/_C.abi3.so is for aarch64"),
        ("manylinux_2_28_x86_64", elf(243), "is for processor 243"),
        ("manylinux_2_28_x86_64", elf(X86).replace(b"libtorch_cpu.so", b""), "does not ask for libtorch_cpu.so"),
        ("manylinux_2_28_x86_64", b"MZ", "is for no Linux"),
        ("manylinux_2_28_x86_64", b"", "is for no Linux"),
    ],
)
def test_the_tag_names_the_processor_of_the_library(tag: str, library: bytes, fault: str, tmp_path: Path) -> None:
    found = wheel.look(made(tmp_path, f"isqtorch-0.1.0-cp310-abi3-{tag}.whl", library=library))
    assert len(found) == bool(fault) and fault in "".join(found)


def test_a_wheel_for_another_processor_needs_its_compiler(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match=r"riscv64-linux-gnu-g\+\+ is needed .* apt install g\+\+-riscv64-linux-gnu"):
        wheel.cross("riscv64")
    with pytest.raises(SystemExit):
        wheel.main(["--arch", "aarch64"])
    assert "cannot be tried here: add --only build" in capsys.readouterr().err


def test_a_failed_command_ends_it() -> None:
    with pytest.raises(SystemExit, match="failed with status 1: false"):
        wheel.call(["false"])


def test_a_tag_names_the_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "isqtorch").mkdir()
    (tmp_path / "isqtorch/_version.py").write_text('__version__ = "1.2.3"\n')
    monkeypatch.setattr(version, "ROOT", tmp_path)
    for heading, tag, faults in (
        ("## 1.2.3 (2027-01-01)", "v1.2.3", 0),
        ("## 1.2.30", "v1.2.3", 1),
        ("## Unreleased (1.2.3)", "v1.2.3", 1),
        ("## 1.2.3", "1.2.3", 1),
        ("## 1.2.3", "v1.2.4", 1),
    ):
        (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n{heading}\n")
        assert len(version.faults(tag)) == faults, (heading, tag)
        assert version.main([tag]) == min(faults, 1)
    assert version.main([]) == 2


# ---- workflows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_promise_little_and_pin_all(path: Path) -> None:
    """Actions by full hash, with the version in words; no token that can write, but where a line says what for."""
    text = path.read_text(encoding="utf-8")
    for line in re.findall(r"uses: (.*)", text):
        assert line.startswith("./") or re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line
    found = yaml.safe_load(text)
    assert found["permissions"] == {"contents": "read"}
    for name, job in found["jobs"].items():
        for scope, right in job.get("permissions", {}).items():
            assert right == "read" or re.search(rf"{scope}: {right} # \w+", text), f"{name}: {scope} without a reason"
        for step in job.get("steps", []):
            if "actions/checkout" in step.get("uses", ""):
                assert step["with"]["persist-credentials"] is False


def test_workflows_call_what_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    called = set()
    for path in WORKFLOWS:
        text = path.read_text(encoding="utf-8")
        called |= set(re.findall(r"run: (?:.*&& )?make ([a-z0-9-]+)", text))
        for matrix in re.findall(r"run: \[(.*)\]", text):
            called |= {entry.split()[0] for entry in matrix.split(", ")}
        for module in re.findall(r"python -m (release\.\w+|benchmarks\.\w+)", text):
            assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
        for used in re.findall(r"uses: \./(\S+)", text):
            assert (ROOT / used).is_file()
    assert {"lint", "build", "test", "sweep", "fuzz"} <= called
    for target in called:
        assert re.search(rf"^{target}:", makefile, re.M), target
