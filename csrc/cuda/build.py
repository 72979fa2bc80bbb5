"""Compiles csrc/cuda into `isqtorch/_CUDA.abi3.so`, the library with the CUDA kernels and their operators.

The kernels (*.cu) see nothing of torch and are compiled by nvcc alone, for all GPUs at once; C++ files join them to torch through
its stable ABI. No GPU is needed, and with ISQTORCH_CUDA=1 not even a torch that knows CUDA: then the library is linked
against a stand-in that has the one function which only such a torch has, and works with one.

    python -m csrc.cuda.build            what would be compiled, by what, for which GPUs

Variables: ISQTORCH_CUDA=1 (build it in any case) or 0 (do not); ISQTORCH_CUDA_ARCHS or TORCH_CUDA_ARCH_LIST ("80;90a" or "8.0 9.0a+PTX");
CUDA_HOME; CXX; MAX_JOBS.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
NAME = "_CUDA.abi3.so"

ARCHS = ("80", "86", "89", "90", "100", "120")
"""A100; A10, RTX 30; L4, RTX 40; H100, H200; B200, B300; RTX 50. For others name them: ISQTORCH_CUDA_ARCHS."""

GENERATION = 100
"""The one compute capability that the kernels' text asks for (tests/test_cuda_build.py): GPUs on the same side of it have
the same code until machine code is made of it, so the compiler's longer half runs once for them."""

OLDEST = (12, 0)
"""nvcc, for its C++17 and the instructions of compute capability 9.0."""

LEAST_ARCH = 80  # the matrix and copy instructions that the kernels use

NVCC_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fmad=false",  # quantized bytes and decoded weights are defined without fused multiply-add
    "-Xptxas=-v",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-diag-suppress=186,177",  # comparisons and functions that one of the many instances has no use for
    f"-I{CSRC}",
]
CXX_FLAGS = "-std=c++17 -O2 -g0 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra".split()
TORCH_VERSION = "0x020a000000000000"  # 2.10, the oldest that the library loads in

# What a torch without CUDA lacks. Nothing ever calls it: in place of this stand-in the real libtorch_cuda.so is loaded.
_STAND_IN = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }\n'


class NotBuilt(Exception):
    """Why there will be no CUDA library, and what to do about it."""


@dataclass(frozen=True)
class Toolkit:
    """nvcc, found.

    Attributes:
        nvcc: the program.
        version: (major, minor).
        archs: numbers of compute capabilities that it compiles for, without suffix.
    """

    nvcc: Path
    version: tuple[int, int]
    archs: tuple[int, ...]

    @property
    def libraries(self) -> list[Path]:
        """Folders that may have the CUDA runtime; the wheels' nvcc does not know its own."""
        home = self.nvcc.resolve().parent.parent
        return [folder for folder in (home / "lib64", home / "lib") if folder.is_dir()]


def _candidates(environment: Mapping[str, str]) -> list[Path]:
    found = [Path(environment[name]) / "bin/nvcc" for name in ("CUDA_HOME", "CUDA_PATH") if environment.get(name)]
    on_path = shutil.which("nvcc", path=environment.get("PATH"))
    found += [Path(on_path)] if on_path else []
    found.append(Path("/usr/local/cuda/bin/nvcc"))
    spec = importlib.util.find_spec("nvidia")  # wheels: nvidia-cuda-nvcc, ...
    for folder in (spec.submodule_search_locations or []) if spec else []:
        found += sorted(Path(folder).glob("*/bin/nvcc"), reverse=True)
    return found


def find_toolkit(environment: Mapping[str, str] = os.environ) -> Toolkit:
    """The first nvcc of CUDA_HOME, the path, /usr/local/cuda and the installed nvidia-cuda-nvcc wheel.

    Raises:
        NotBuilt: there is none, it does not run, or it is too old.
    """
    nvcc = next((path for path in _candidates(environment) if path.is_file()), None)
    if nvcc is None:
        raise NotBuilt(
            "no nvcc in CUDA_HOME, on the path, in /usr/local/cuda or in the nvidia-cuda-nvcc wheel. Install the CUDA toolkit, or: "
            "pip install nvidia-cuda-nvcc nvidia-cuda-crt nvidia-cuda-runtime nvidia-nvvm nvidia-cuda-cccl"
        )
    try:
        said = [
            subprocess.run([str(nvcc), option], capture_output=True, text=True, check=True).stdout
            for option in ("--version", "--list-gpu-arch")
        ]
    except (OSError, subprocess.CalledProcessError) as error:
        raise NotBuilt(f"{nvcc} does not run: {error}") from error
    release = re.search(r"release (\d+)\.(\d+)", said[0])
    if release is None:
        raise NotBuilt(f"{nvcc} does not say its release: {said[0].strip()!r}")
    version = (int(release[1]), int(release[2]))
    if version < OLDEST:
        raise NotBuilt(
            f"{nvcc} is release {version[0]}.{version[1]}; {OLDEST[0]}.{OLDEST[1]} is needed. Point CUDA_HOME at a newer toolkit."
        )
    return Toolkit(nvcc, version, tuple(int(number) for number in re.findall(r"compute_(\d+)", said[1])))


@dataclass(frozen=True)
class Arch:
    """A kind of GPU: "90", "100f"; with `ptx`, newer ones can compile for themselves at run time."""

    name: str
    ptx: bool = False

    @property
    def number(self) -> int:
        return int(self.name.rstrip("af"))

    @property
    def group(self) -> str:
        """What it shares code with: its generation, or, with a suffix, none but itself."""
        if self.name[-1] in "af":
            return self.name
        return "old" if self.number < GENERATION else "new"


def flags(archs: Iterable[Arch]) -> list[str]:
    """nvcc's options for GPUs. Those of a group are compiled once, for the oldest of them."""
    groups: dict[str, list[Arch]] = {}
    for arch in sorted(archs, key=lambda arch: arch.number):
        groups.setdefault(arch.group, []).append(arch)
    options = []
    for group in groups.values():
        oldest = f"compute_{group[0].name}"
        codes = [f"sm_{arch.name}" for arch in group] + [oldest] * any(arch.ptx for arch in group)
        options.append(f"-gencode=arch={oldest},code=[{','.join(codes)}]")
    return options


def parse_archs(text: str) -> list[Arch]:
    """GPUs as ISQTORCH_CUDA_ARCHS ("80;90a") or TORCH_CUDA_ARCH_LIST ("8.0 9.0a+PTX") has them.

    Raises:
        NotBuilt: something else.
    """
    archs = []
    for word in re.split(r"[;,\s]+", text.strip()):
        match = re.fullmatch(r"(?:sm_)?(\d+)(?:\.(\d))?([af]?)(\+PTX)?", word)
        if match is None:
            raise NotBuilt(f"{word!r} is no GPU architecture; write 80, 90a or 9.0a, several with ; between them.")
        arch = Arch(match[1] + (match[2] or "") + match[3], match[4] is not None)
        if arch.number < LEAST_ARCH:
            raise NotBuilt(f"compute capability {word} is too old: the kernels need 8.0 or newer.")
        archs.append(arch)
    return archs


def chosen_archs(toolkit: Toolkit, environment: Mapping[str, str] = os.environ) -> tuple[list[Arch], list[str]]:
    """The GPUs to compile for, and those of the default that this toolkit does not know.

    Raises:
        NotBuilt: a named one is unknown to the toolkit.
    """
    named = environment.get("ISQTORCH_CUDA_ARCHS") or environment.get("TORCH_CUDA_ARCH_LIST")
    if named:
        archs = parse_archs(named)
        unknown = [arch.name for arch in archs if arch.number not in toolkit.archs]
        if unknown:
            raise NotBuilt(f"{toolkit.nvcc} does not compile for {', '.join(unknown)}; it knows {toolkit.archs}.")
        return archs, []
    known = [Arch(name) for name in ARCHS if Arch(name).number in toolkit.archs]
    known[-1] = Arch(known[-1].name, ptx=True)
    return known, [name for name in ARCHS if Arch(name).number not in toolkit.archs]


@dataclass(frozen=True)
class Torch:
    """The torch to build for."""

    includes: tuple[str, ...]
    libraries: tuple[str, ...]
    cuda: str | None  # "13.0"; None: it knows no CUDA

    @classmethod
    def installed(cls) -> Torch:
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths

        return cls(tuple(include_paths()), tuple(library_paths()), torch.version.cuda)


def wanted(torch: Torch, environment: Mapping[str, str] = os.environ) -> Toolkit | None:
    """The toolkit to build with; None if nothing is to be built: ISQTORCH_CUDA=0, or a torch without CUDA and no ISQTORCH_CUDA=1.

    Raises:
        NotBuilt: there should be a library, but there is no way to build it.
    """
    choice = environment.get("ISQTORCH_CUDA", "")
    if choice not in ("", "0", "1"):
        raise NotBuilt(f"ISQTORCH_CUDA is {choice!r}; it must be 0 or 1.")
    if choice == "0" or (not choice and torch.cuda is None):
        return None
    toolkit = find_toolkit(environment)
    if torch.cuda and int(torch.cuda.split(".")[0]) != toolkit.version[0]:
        # The library has the toolkit's runtime inside, which wants a driver of its generation.
        raise NotBuilt(
            f"{toolkit.nvcc} is release {toolkit.version[0]}.{toolkit.version[1]}, but this torch is for CUDA {torch.cuda}. "
            "Point CUDA_HOME at a toolkit of the same generation."
        )
    return toolkit


FAMILIES = ("ggml32", "kquants", "codebooks", "stream", "fp8")
"""Of formats, as csrc/cuda/formats/list.cuh has them: each is an object of its own, for they take minutes to compile."""


@dataclass(frozen=True)
class Unit:
    """A source with kernels, as it is compiled to one object.

    Attributes:
        source: its file.
        family: the formats it is compiled for; None for a file that is compiled once.
    """

    source: Path
    family: str | None = None

    @property
    def name(self) -> str:
        """Of the object: "linear_kquants"."""
        return f"{self.source.stem}_{self.family}" if self.family else self.source.stem

    @property
    def defines(self) -> list[str]:
        return [f"-DISQ_FAMILY=ISQ_{self.family.upper()}"] if self.family else []


def units() -> list[Unit]:
    """The kernels: every file of instances/ once for each family, and the other files."""
    folder = CSRC / "cuda"
    instances = [Unit(path, family) for path in sorted((folder / "instances").glob("*.cu")) for family in FAMILIES]
    return [*instances, *(Unit(path) for path in sorted(folder.glob("*.cu")))]


def operators() -> list[Path]:
    """What knows torch."""
    return sorted((CSRC / "cuda").glob("*.cpp"))


def build(target: Path, folder: Path, toolkit: Toolkit, archs: list[Arch], torch: Torch, *, keep: bool = False) -> None:
    """Compile what changed and link it.

    Args:
        target: the library.
        folder: for objects, and for what ptxas says of each file (`<file>.log`).
        toolkit: see `find_toolkit`.
        archs: see `chosen_archs`.
        torch: see `Torch.installed`.
        keep: leave cubins in `folder/kept/<file>/`, for tools that look at the machine code.

    Raises:
        NotBuilt: the compiler or linker refuses; its words.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(_ninja(target, folder, toolkit, archs, torch, keep), encoding="utf-8")
    if not torch.cuda:
        stand_in = folder / "libtorch_cuda.cpp"
        if not stand_in.exists() or stand_in.read_text(encoding="utf-8") != _STAND_IN:
            stand_in.write_text(_STAND_IN, encoding="utf-8")
    jobs = os.environ.get("MAX_JOBS")
    command = [_ninja_program(), "-C", str(folder), *(["-j", jobs] if jobs else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NotBuilt(f"compiling the CUDA kernels failed.\n{done.stdout}{done.stderr}")


def _ninja_program() -> str:
    found = shutil.which("ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if found is None:
        raise NotBuilt("ninja is missing: pip install ninja")
    return found


def _ninja(target: Path, folder: Path, toolkit: Toolkit, archs: list[Arch], torch: Torch, keep: bool) -> str:
    """The build file. Every command's output goes to a log and is shown if it fails."""
    cxx = os.environ.get("CXX", "c++")
    nvcc = [str(toolkit.nvcc), *NVCC_FLAGS, *flags(archs)]
    nvcc += [f"-ccbin={shlex.split(cxx)[0]}"] if "CXX" in os.environ else []
    nvcc += ["-Xfatbin=-compress-all"]
    nvcc += [f"--threads={len(archs)}"] if len(archs) > 1 else []  # the largest files take minutes for each
    defines = [f"-DTORCH_TARGET_VERSION={TORCH_VERSION}", f'-DISQTORCH_CUDA_ARCHS="{" ".join(a.name for a in archs)}"']
    includes = [f"-I{CSRC}", *(flag for path in torch.includes for flag in ("-isystem", path))]
    logged = "> $name.log 2>&1 || (cat $name.log; false)"
    kept = (
        f"rm -rf kept/$name && mkdir -p kept/$name && {shlex.join(nvcc)} --keep --keep-dir=kept/$name" if keep else ""
    )
    link = [str(toolkit.nvcc), "-shared", "-cudart=static", "-Xlinker=-z,defs,--as-needed"]
    link += [f"-L{path}" for path in [*toolkit.libraries, *torch.libraries]]
    objects = []
    lines = [
        "rule nvcc",
        f"  command = {kept or shlex.join(nvcc)} $defines -MD -MF $out.d -c $in -o $out {logged}",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule cxx",
        f"  command = {cxx} {shlex.join([*CXX_FLAGS, *defines, *includes])} -MMD -MF $out.d -c $in -o $out {logged}",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule stand_in",
        f"  command = {cxx} -shared -fPIC -Wl,-soname,libtorch_cuda.so $in -o $out {logged}",
        "rule link",
        f"  command = {shlex.join(link)} $objects -L. -ltorch_cpu -lc10 -ltorch_cuda -o linked.so {logged} && mv linked.so $out",
    ]
    for unit in [*units(), *map(Unit, operators())]:
        objects.append(f"{unit.name}.o")
        rule = "nvcc" if unit.source.suffix == ".cu" else "cxx"
        lines += [f"build {objects[-1]}: {rule} {unit.source}", f"  name = {unit.name}"]
        lines += [f"  defines = {' '.join(unit.defines)}"]
    stand_in = "" if torch.cuda else "libtorch_cuda.so"
    if stand_in:
        lines += [f"build {stand_in}: stand_in libtorch_cuda.cpp", "  name = stand_in"]
    lines += [
        f"build {target}: link {' '.join(objects)} | {stand_in}",
        "  name = link",
        f"  objects = {' '.join(objects)}",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    try:
        toolkit = find_toolkit()
        archs, unknown = chosen_archs(toolkit)
    except NotBuilt as reason:
        print(f"isqtorch: {reason}")
        return 1
    print(f"nvcc {toolkit.version[0]}.{toolkit.version[1]}: {toolkit.nvcc}")
    print(f"GPUs: {' '.join(arch.name for arch in archs)}{f'; unknown to it: {unknown}' if unknown else ''}")
    print("objects: " + " ".join(unit.name for unit in units()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
