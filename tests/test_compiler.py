"""What C++ lacks is spelled out in one header, which Clang accepts for Windows, too."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from emulator.metal.compiler_command import compiler_command

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
HEADER = CSRC / "compiler.h"
BEYOND = re.compile(
    r"__attribute__|__builtin_|__restrict|__extension__|__int128|__declspec|_Pragma|\btypeof\b|\b(?:__)?asm(?:__)?\b"
    r"|^\s*#\s*pragma\s+(?!once\b|pack\b|GCC diagnostic\b)",  # these two every compiler knows, or ignores without harm
    re.MULTILINE,
)
"""Device code for NVIDIA GPUs has cuda/gpu.h instead, and nvcc; Metal shaders are another language."""


def sources() -> list[Path]:
    found = [path for folder in ("cpu", "searches") for path in (CSRC / folder).rglob("*") if path.is_file()]
    return sorted([*found, *CSRC.glob("*.h"), *CSRC.glob("*.cpp"), *(CSRC / "cuda").glob("ops*")])


def beyond(text: str) -> list[str]:
    """What a source has that only some compilers know; not in comments."""
    return BEYOND.findall(re.sub(r"//.*", "", text))


def test_one_header_has_what_only_some_compilers_know() -> None:
    faults = {str(path.relative_to(ROOT)): beyond(path.read_text(encoding="utf-8")) for path in sources()}
    header = faults.pop(str(HEADER.relative_to(ROOT)))
    assert len(header) > 15 and len(faults) > 50  # the check sees them
    assert {name: found for name, found in faults.items() if found} == {}, "give it a name in csrc/compiler.h"


def test_every_name_of_the_header_is_used() -> None:
    names = set(re.findall(r"#define (ISQ_\w+)", HEADER.read_text(encoding="utf-8")))
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources() if path != HEADER)
    own = re.sub(r"#define ISQ_\w+", "", HEADER.read_text(encoding="utf-8"))
    assert not {name for name in names if not re.search(rf"\b{name}\b", text + own)}


USE = """
#include "compiler.h"
ISQ_WEAK int elsewhere();
typedef float Four ISQ_VECTOR(16);
typedef int Ints ISQ_VECTOR(16);
ISQ_TARGET_REGION(FEATURES)
ISQ_ALWAYS_INLINE Four swapped(Four v) { return ISQ_SHUFFLE(v, v, 1, 0, 7, 6); }
ISQ_NOINLINE float use(const float* p, int n) {
  Four sums = {};
  ISQ_PREFETCH(p);
  ISQ_PREFETCH(p + 64, 0, 2);
  for (int i = 0; i < n; ++i) {
    ISQ_UNROLL
    for (int l = 0; l < 4; ++l) sums[l] += p[4 * i + l];
    ISQ_UNROLL_BY(4)
    for (int l = 0; l < 4; ++l) sums[l] = ISQ_SQRT(sums[l]);
  }
  const Ints whole = ISQ_CONVERT(swapped(sums), Ints);
  if (ISQ_LIKELY(whole[0] > 0)) return ISQ_INFINITY;
  return n ? (float)ISQ_TRAILING_ZEROS(n) : ISQ_NAN;
}
ISQ_END_TARGET_REGION
int processor(float* at, int n) {
  struct Kept { float at[4]; } kept = {{at[0], at[1], at[2], at[3]}};
  ISQ_WRITE_ALL();
  ISQ_IN_MEMORY(&kept);
#if defined(__x86_64__)
  ISQ_THROUGH_MEMORY(kept.at);
  ISQ_CPU_FIND();
  if (ISQ_CPU_HAS("avx2")) return 1;
#else
  unsigned long bits;
  ISQ_GET_FPCR(bits);
  ISQ_SET_FPCR(bits);
  ISQ_WAIT();
#endif
  return (int)(use(kept.at, n) + use(at, n));
}
"""


@pytest.mark.parametrize(
    "target",
    ["x86_64-pc-windows-msvc", "x86_64-linux-gnu", "aarch64-linux-gnu", "arm64-apple-macos11", "here"],
)
def test_compilers_accept_the_header(target: str, tmp_path: Path) -> None:
    """It includes nothing, so that Clang can check it for systems whose headers are not here."""
    compiler = [shutil.which("c++") or "c++"] if target == "here" else compiler_command()
    if compiler is None or shutil.which(compiler[0]) is None:
        pytest.skip("no clang++ >= 19, or not Linux")
    source = tmp_path / "use.cpp"
    of_x86 = "x86_64" in target or (target == "here" and platform.machine() in ("x86_64", "AMD64"))
    of_arm = 'ISQ_GCC_OR_CLANG("arch=armv8.2-a+dotprod", "dotprod")'
    source.write_text(USE.replace("FEATURES", '"sse4.2"' if of_x86 else of_arm))
    flags = ["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}"]
    flags += [] if target == "here" else [f"--target={target}"]
    done = subprocess.run([*compiler, *flags, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
