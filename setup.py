"""Builds the C++ extension; everything else about the package is in pyproject.toml.

One library, `isqtorch/_C.abi3.so`, registered with torch through its stable ABI and free of Python symbols: one binary serves
every torch >= 2.10 and every CPython >= 3.10. Instruction sets (AVX2, AVX-512, ...) are compiled by target regions inside the
sources and chosen at run time, so no flag here depends on the machine that builds.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler, include_paths

ROOT = Path(__file__).resolve().parent


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
    *(flag for path in include_paths() for flag in ("-isystem", path)),  # no warnings about torch's own headers
]


SANITIZE = os.environ.get("ISQTORCH_SANITIZE") == "1"  # `make sanitize`; the library needs their runtimes preloaded
SANITIZE_ARGS = [
    "-O1",
    "-g1",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
]


class Build(BuildExtension):
    """Keeps objects between calls: an editable install would compile everything again, in a temporary folder."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if SANITIZE and self.inplace:
            raise SystemExit(
                "isqtorch: a library with sanitizers does not belong into the package; see `make sanitize`."
            )
        self.build_temp = str(ROOT / "build" / ("sanitize/temp" if SANITIZE else "temp"))


class BuildPackage(build_py):
    """Puts the Metal shaders, which torch compiles on the user's machine, into the package."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # isqtorch.metal.shaders finds csrc/metal itself
            for name in files("metal/**/*.metal", "metal/**/*.h"):
                target = Path(self.build_lib, "isqtorch", "metal", "source", Path(name).relative_to("csrc/metal"))
                self.mkpath(str(target.parent))
                self.copy_file(name, str(target))


if "clang" not in subprocess.run([get_cxx_compiler(), "--version"], capture_output=True, text=True).stdout:
    # GCC would unroll loops over 16 lanes and 256 weights completely: three times the compile time, no gain.
    COMPILE_ARGS += ["--param", "max-completely-peel-times=8"]

if SANITIZE:
    COMPILE_ARGS += SANITIZE_ARGS

if sys.platform == "win32":
    raise SystemExit("isqtorch: Windows is not supported yet; use WSL.")

setup(
    ext_modules=[
        CppExtension(
            "isqtorch._C",
            files("*.cpp"),
            depends=[*files("*.h", "*.inl"), "setup.py"],
            define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],  # 2.10
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args=COMPILE_ARGS,
            extra_link_args=SANITIZE_ARGS[-2:] if SANITIZE else [],
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": Build, "build_py": BuildPackage},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
