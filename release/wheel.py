"""Build a wheel of this machine, and try it as its user would.

    python -m release.wheel                              build, repair, install, run; the wheel is in dist/
    python -m release.wheel --torch torch==2.10.0        try it with that torch
    python -m release.wheel --only check dist/*.whl      try a wheel that exists
    python -m release.wheel --only build --arch aarch64  compile for Linux on another processor

The wheel has the CPU kernels of all levels of this architecture. It has the CUDA kernels, too, if there is an nvcc; with
ISQTORCH_CUDA=0 it has none, and with ISQTORCH_CUDA=1 it is an error if they cannot be built. torch's own libraries stay
outside: the user's torch brings them.

For another processor, a cross compiler is needed (Debian: g++-aarch64-linux-gnu), and nothing of its torch: the headers are the
same, and libraries that are empty but for their names stand in for torch's when ours is linked.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RAW = ROOT / "build" / "wheel"
TAGS = re.compile(r"isqtorch-[\w.+]+-cp310-abi3-([\w.]+)\.whl")
OUTSIDE = ("libtorch*", "libc10*")
"""Libraries that torch brings. A second copy of them would be a second torch."""
LINKED = ("libc10.so", "libtorch.so", "libtorch_cpu.so")
"""Those that the link command names."""
LOADED = ("libc10.so", "libtorch_cpu.so")
"""Those that a library of ours has to ask for by name."""
ELF_MACHINES = {62: "x86_64", 183: "aarch64"}  # e_machine, ELF-64 Object File Format


def build(target: Path, arch: str = "") -> Path:
    """Build a wheel of the sources, and put it into a folder under the name that says where it runs.

    Args:
        target: the folder.
        arch: the processor, as Linux names it ("aarch64"); "": that of this machine.

    Raises:
        SystemExit: a step failed; its output is above.
    """
    sys.path.insert(0, str(ROOT))
    from csrc.cuda import build as cuda

    shutil.rmtree(RAW, ignore_errors=True)
    for stale in [*ROOT.glob("build/lib*"), *ROOT.glob("build/bdist*")]:  # setuptools would pack what was there once
        shutil.rmtree(stale)
    environment = dict(os.environ)
    if arch and arch != platform.machine():
        environment |= cross(arch)
    if not environment.get("ISQTORCH_CUDA"):
        try:
            print(f"with CUDA kernels, compiled by {cuda.find_toolkit().nvcc}", flush=True)
            environment["ISQTORCH_CUDA"] = "1"
        except cuda.NotBuilt as reason:
            print(f"WITHOUT CUDA KERNELS: {reason}", flush=True)
            environment["ISQTORCH_CUDA"] = "0"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--wheel-dir",
        str(RAW),
        str(ROOT),
    ]
    call(pip, environment)
    (raw,) = RAW.glob("*.whl")
    return repaired(raw, target)


def cross(arch: str) -> dict[str, str]:
    """The variables with which setup.py compiles for Linux on another processor.

    Raises:
        SystemExit: this machine is no Linux, there is no cross compiler, or it fails.
    """
    compiler = f"{arch}-linux-gnu-g++"
    if not sys.platform.startswith("linux") or shutil.which(compiler) is None:
        package = f"g++-{arch.replace('_', '-')}-linux-gnu"
        raise SystemExit(f"isqtorch: {compiler} is needed for a wheel for {arch}. On Debian: apt install {package}")
    stand_ins = ROOT / "build" / f"stand-ins-{arch}"
    stand_ins.mkdir(parents=True, exist_ok=True)
    for name in LINKED:
        call([compiler, "-shared", "-x", "c++", os.devnull, f"-Wl,-soname,{name}", "-o", str(stand_ins / name)])
    return {
        "CC": compiler.replace("g++", "gcc"),
        "CXX": compiler,
        "LDSHARED": f"{compiler} -shared",
        "LDCXXSHARED": f"{compiler} -shared",
        # Stand-ins define nothing, so a linker that keeps only what is needed would drop them.
        "LDFLAGS": f"-L{stand_ins} -Wl,--no-as-needed",
        "_PYTHON_HOST_PLATFORM": f"linux-{arch}",  # what Python takes for the platform, and the wheel's tag
        "ISQTORCH_CUDA": "0",
    }


def repaired(raw: Path, target: Path) -> Path:
    """A wheel whose name says which C library it needs. On Linux auditwheel finds that out; elsewhere it is said already."""
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob("isqtorch-*.whl"):
        old.unlink()
    if not sys.platform.startswith("linux"):
        return Path(shutil.copy(raw, target))
    excluded = [word for name in OUTSIDE for word in ("--exclude", name)]
    command = [sys.executable, "-m", "auditwheel", "repair", *excluded, "--wheel-dir", str(target), str(raw)]
    call(command, {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"})
    (wheel,) = target.glob("isqtorch-*.whl")
    return wheel


def look(wheel: Path) -> list[str]:
    """What is wrong with a wheel, as its files show it; [] if nothing is."""
    tags = TAGS.fullmatch(wheel.name)
    if tags is None:
        return [f"{wheel.name} is not for CPython 3.10 and every later one (cp310-abi3)"]
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
        contents_of = {name: archive.read(name) for name in names if name.endswith(".so")}
    machines = {name: elf_machine(content[:20]) for name, content in contents_of.items()}
    found = []
    if tags[1].startswith("linux"):
        found.append(f"{wheel.name} has no manylinux tag: it was not repaired")
    libraries = [name for name in names if re.search(r"\.(so|dylib|dll|pyd)(\.|$)", name)]
    own = [name for name in libraries if re.fullmatch(r"isqtorch/_(C|CUDA)\.(abi3\.so|pyd)", name)]
    if tags[1].startswith(("manylinux", "linux")) and "isqtorch/_C.abi3.so" not in own:
        found.append("isqtorch/_C.abi3.so is missing: no CPU kernels")
    found += [f"{name} belongs to torch or to the system" for name in set(libraries) - set(own)]
    found += [
        f"{name} does not ask for {library}: it loads only by chance, or not at all"
        for name, content in contents_of.items()
        for library in LOADED
        if name in own and machines[name] in ELF_MACHINES.values() and library.encode() + b"\0" not in content
    ]
    found += [
        f"{name} is for {made_for}, which the wheel's tag {tags[1]} does not say"
        for name, made_for in machines.items()
        if name in own and "linux" in tags[1] and not tags[1].endswith(f"_{made_for}")
    ]
    needed = [
        "isqtorch/py.typed",
        "isqtorch/csrc/ops.cpp",
        "isqtorch/formats/gguf_grids.bin",
        "isqtorch/app/server/page.html",
    ]
    found += [f"{name} is missing" for name in needed if name not in names]
    if not any(re.fullmatch(r"isqtorch/csrc/metal/.*\.metal", name) for name in names):
        found.append("the Metal sources are missing")
    outside = [name for name in names if not re.match(r"isqtorch(-[^/]+\.dist-info)?/", name)]
    found += [f"{name} would be installed beside the package" for name in outside]
    sources = [
        name for name in names if name.endswith((".cu", ".cpp", ".h", ".o", ".pyc")) and "/csrc/metal/" not in name
    ]
    found += [f"{name} belongs to the build" for name in sources if name != "isqtorch/csrc/ops.cpp"]
    if "License-Expression: Apache-2.0" not in metadata:
        found.append("the metadata name no licence")
    return found


def elf_machine(header: bytes) -> str:
    """The processor that a library of Linux is for, from its first 20 bytes."""
    if len(header) < 20 or not header.startswith(b"\x7fELF"):
        return "no Linux"
    number = int.from_bytes(header[18:20], "little")
    return ELF_MACHINES.get(number, f"processor {number}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", nargs="?", type=Path, help="with --only check: the wheel")
    parser.add_argument("--only", choices=["build", "check"], help="one of the two halves")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", metavar="DIR", help="where the wheel goes (dist)")
    parser.add_argument("--arch", default="", help="with --only build: another processor, as aarch64")
    parser.add_argument("--torch", default="torch==2.13.0", metavar="SPEC", help="to try it with (%(default)s)")
    parser.add_argument("--python", default=sys.executable, help="to try it with (%(default)s)")
    args = parser.parse_args(argv)
    if (args.only == "check") != (args.wheel is not None):
        parser.error("a wheel is given with --only check, and only there")
    if args.arch and args.only != "build":
        parser.error("a wheel for another processor cannot be tried here: add --only build")
    wheel = args.wheel if args.only == "check" else build(args.output, args.arch)
    faults = look(wheel)
    for fault in faults:
        print(f"FAIL: {fault}", file=sys.stderr)
    if faults:
        return 1
    print(f"{wheel}: {wheel.stat().st_size / 1e6:.1f} MB, {contents(wheel)}")
    if args.only != "build":
        from .trial import trial

        trial(wheel, args.torch, args.python)
        print(f"{wheel.name} works with {args.torch}")
    return 0


def contents(wheel: Path) -> str:
    """The compiled libraries of a wheel, with their sizes unpacked."""
    with zipfile.ZipFile(wheel) as archive:
        libraries = [info for info in archive.infolist() if info.filename.endswith((".so", ".dylib", ".pyd"))]
    return ", ".join(f"{Path(i.filename).name} {i.file_size / 1e6:.1f} MB" for i in libraries) or "no compiled library"


def call(command: Iterable[str], environment: dict[str, str] | None = None, folder: Path | None = None) -> None:
    """Run a command, whose output is shown; SystemExit with its name if it fails."""
    words = list(command)
    done = subprocess.run(words, env=environment, cwd=folder, check=False)
    if done.returncode:
        raise SystemExit(f"isqtorch: failed with status {done.returncode}: {' '.join(words)}")


if __name__ == "__main__":
    sys.exit(main())
