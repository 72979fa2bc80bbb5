"""Builds the C++ extension; everything else about the package is in pyproject.toml.

One library, `isqtorch/_C.abi3.so`, registered with torch through its stable ABI and free of Python symbols: one binary serves
every torch >= 2.10 and every CPython >= 3.10. Instruction sets (AVX2, AVX-512, ...) are compiled by target regions inside the
sources and chosen at run time, so no flag here depends on the machine that builds.

A second library, `isqtorch/_CUDA.abi3.so`, has the CUDA kernels. It is built where torch knows CUDA and there is an nvcc, GPU or
not: csrc/cuda/build.py.

Metal kernels are text that torch compiles when they are used; the package takes their sources along. So a Mac needs no compiler:
without one, plain PyTorch computes on its CPU. So it does on Windows, where nothing is compiled yet.

torch is imported when something is compiled, so the metadata and the source distribution need none. An isolated build finds the
torch that is installed: release/backend.py.
"""

import os
import re
import shutil
import subprocess
import sys
from email.parser import HeaderParser
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # a build in isolation starts elsewhere

from csrc.cuda import build as cuda  # noqa: E402
from release import backend  # noqa: E402


def files(*patterns: str) -> list[str]:
    """Paths below csrc/, relative to this file, in a fixed order."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").rglob(pattern))


COMPILE_ARGS = [
    "-O3",
    "-std=c++17",
    "-g0",  # after the interpreter's own -g
    "-ffp-contract=off",  # quantized bytes are defined without fused multiply-add
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",  # vector arguments never cross the library's border
]


SANITIZE = os.environ.get("ISQTORCH_SANITIZE") == "1"  # `make sanitize`; the library needs their runtimes preloaded
SANITIZE_ARGS = [
    "-O1",
    "-g1",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
]


MAC = sys.platform == "darwin"


class BuildPackage(build_py):
    """Takes along what is read at run time: the Metal sources, and the operators' schemas."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "isqtorch" / "csrc"
            shutil.copytree(ROOT / "csrc" / "metal", target / "metal", dirs_exist_ok=True)
            shutil.copy(ROOT / "csrc" / "ops.cpp", target)


class Build(build_ext):
    """Compiles with torch's own command, and keeps objects between calls: an editable install would compile all again."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if SANITIZE and self.inplace:
            raise SystemExit(
                "isqtorch: a library with sanitizers does not belong into the package; see `make sanitize`."
            )
        other = os.environ.get("_PYTHON_HOST_PLATFORM")  # set for a cross compiler, whose objects are others
        self.build_temp = str(ROOT / "build" / ("sanitize/temp" if SANITIZE else f"temp-{other}" if other else "temp"))

    def run(self) -> None:
        if not backend.COMPILES:  # the sources use what only GCC and Clang have
            self.extensions = []
            print(
                "isqtorch: no compiled kernels on Windows yet; plain PyTorch computes. WSL has them.", file=sys.stderr
            )
            return
        backend.show_torch()
        # Where the interpreter was called by its path, its environment is not on the path, and torch would find no ninja
        # there: then it compiles one file after the other.
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
        try:
            self.compile()
        except Exception as error:
            if not MAC:
                raise
            self.extensions = []
            print(f"isqtorch: no CPU kernels; plain PyTorch computes on the CPU. {error}", file=sys.stderr)
        if not SANITIZE:
            build_cuda((ROOT if self.inplace else Path(self.build_lib)) / "isqtorch" / cuda.NAME)

    def compile(self) -> None:
        """Compile the CPU library with the compiler and the flags of torch."""
        from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler, include_paths

        compiler = shutil.which(get_cxx_compiler())
        if compiler is None:
            message = f"the C++ compiler {get_cxx_compiler()} is not there. Install one, or name it in CXX."
            raise RuntimeError(message) if MAC else SystemExit(f"isqtorch: {message}")
        arguments = [
            *COMPILE_ARGS,
            *(flag for path in include_paths() for flag in ("-isystem", path)),
        ]  # no warnings about torch
        if "clang" not in subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout:
            # GCC would unroll loops over 16 lanes and 256 weights completely: three times the compile time, no gain.
            arguments += ["--param", "max-completely-peel-times=8"]
        declared = self.extensions[0]
        extension = CppExtension(
            declared.name,
            declared.sources,
            depends=declared.depends,
            define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],  # 2.10
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args=arguments + (SANITIZE_ARGS if SANITIZE else []),
            extra_link_args=SANITIZE_ARGS[-2:] if SANITIZE else [],
            py_limited_api=True,
        )
        for name in ("_full_name", "_file_name", "_needs_stub", "_links_to_dynamic"):  # what setuptools adds to one
            if hasattr(declared, name):
                setattr(extension, name, getattr(declared, name))
        command = BuildExtension(self.distribution)
        command.initialize_options()
        options = {name: value for name, value in vars(self).items() if name in vars(command)}
        vars(command).update({**options, "inplace": self.inplace, "finalized": 1})
        command.extensions = [extension]
        command.run()


def build_cuda(target: Path) -> None:
    """The CUDA library, if there is to be one. That it cannot be built ends the build only if it was asked for."""
    torch = cuda.Torch.installed()
    try:
        toolkit = cuda.wanted(torch)
        if toolkit is None:
            if os.environ.get("ISQTORCH_CUDA") == "0":
                target.unlink(missing_ok=True)
            return
        archs, unknown = cuda.chosen_archs(toolkit)
        print(f"isqtorch: compiling the CUDA kernels for {' '.join(arch.name for arch in archs)}", flush=True)
        if unknown:
            print(
                f"isqtorch: not for {' '.join(unknown)}: nvcc {'.'.join(map(str, toolkit.version))} is older than these"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        cuda.build(target.resolve(), ROOT / "build" / "cuda" / "package", toolkit, archs, torch)
    except cuda.NotBuilt as reason:
        if os.environ.get("ISQTORCH_CUDA") == "1":
            raise SystemExit(f"isqtorch: {reason}") from reason
        print(f"isqtorch: no CUDA kernels; plain PyTorch computes there. {reason}", file=sys.stderr)


# ---- what a package index shows ----------------------------------------------------------------------------------------


def source_url() -> str | None:
    """The web page of the repository: named in the environment, in the source distribution, or by the clone; else None."""
    given = os.environ.get("ISQTORCH_SOURCE_URL")
    metadata = ROOT / "PKG-INFO"
    if not given and metadata.is_file():
        listed = HeaderParser().parsestr(metadata.read_text(encoding="utf-8")).get_all("Project-URL", [])
        given = next((line.partition(", ")[2] for line in listed if line.startswith("Source, ")), None)
    if not given and (ROOT / ".git").exists():
        git = ["git", "-C", str(ROOT), "config", "remote.origin.url"]
        given = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else None
    page = re.sub(r"^git@([^:]+):", r"https://\1/", given or "").removesuffix(".git")
    return page if re.fullmatch(r"https://[\w.-]+/[\w./-]+", page) else None


def readme(url: str | None) -> str:
    """README.md with links that work outside of the repository. Without its web page, the links become plain text."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#|mailto:)([^)]+)\)")
    if url is None:
        return links.sub(lambda link: "" if link[1] else link[2], text)
    return links.sub(lambda link: f"{link[1]}[{link[2]}]({url}/{'raw' if link[1] else 'blob'}/main/{link[3]})", text)


SOURCE = source_url()
PAGES = {
    "Source": "",
    "Documentation": "/blob/main/docs/guide.md",
    "Changelog": "/blob/main/CHANGELOG.md",
    "Issues": "/issues",
}

setup(
    long_description=readme(SOURCE),
    long_description_content_type="text/markdown",
    project_urls={} if SOURCE is None else {name: f"{SOURCE}{page}" for name, page in PAGES.items()},
    ext_modules=[
        Extension(
            "isqtorch._C",
            [path for path in files("*.cpp") if not path.startswith("csrc/cuda/")],
            depends=[
                *files("*.h", "*.inl", "*.cu", "*.cuh", "*.metal"),
                *files("cuda/*.cpp"),
                "csrc/cuda/build.py",
                "setup.py",
            ],
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": Build, "build_py": BuildPackage},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
