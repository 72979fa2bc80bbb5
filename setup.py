"""Builds the C++ extension; everything else about the package is in pyproject.toml.

One library, `isqtorch/_C.abi3.so`, registered with torch through its stable ABI and free of Python symbols: one binary serves
every torch >= 2.10 and every CPython >= 3.10. Instruction sets (AVX2, AVX-512, ...) are compiled by target regions inside the
sources and chosen at run time, so no flag here depends on the machine that builds.
"""

import sys
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

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
]

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
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
    options={
        "bdist_wheel": {"py_limited_api": "cp310"},
        "build_ext": {
            "build_temp": "build/temp"
        },  # kept between `pip install -e .` calls, so that they are incremental
    },
)
