"""Compile every CUDA kernel with nvcc, without a GPU, and look at what came out.

    python -m benchmarks.cuda.check                   for an H100
    python -m benchmarks.cuda.check --archs all       for all GPUs that the package is built for
    python -m benchmarks.cuda.check --update          note the numbers of instructions as the expected ones

Fails if the library does not link, if a kernel spills registers to memory, or if the inner loop of a product needs more
instructions per weight than expected.json says, which a GPU without registers or issue slots to spare would feel: at 3 TB/s an
H100 has 5.6 instructions for each weight of 4.5 bits. All kernels are listed in build/cuda/check/kernels.txt.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csrc.cuda import build as cuda
from isqtorch.text import text_table

from .sass import Code, Usage, demangle, disassemble, read_log

FOLDER = cuda.ROOT / "build" / "cuda" / "check"
EXPECTED = Path(__file__).with_name("expected.json")
COUNTED = "90"
"""Where instructions are counted: an H100, the GPU with the fewest for each byte of its memory's bandwidth."""

TOLERANCE = 0.05

# What one trip through the inner loop of a product does: weights per thread, from the kernel's template arguments.
PRODUCTS: dict[str, Callable[[list[str]], float]] = {
    "rows_kernel": lambda arguments: int(arguments[-1]) * 16 * 256 / 32,  # tiles of 16 rows, a chunk of each
    "tile_kernel": lambda arguments: 32 * 256 / 32,  # 32 rows, for all tokens
}


@dataclass(frozen=True)
class Loop:
    """The inner loop of a product."""

    kernel: str  # "rows_kernel<Q4_0, f16, 2>"
    per_weight: float
    opcodes: str  # the most frequent ones


def find_nvdisasm(toolkit: cuda.Toolkit) -> str:
    """Beside nvcc, on the path, or in the nvidia-cuda-nvdisasm wheel.

    Raises:
        NotBuilt: nowhere.
    """
    spec = importlib.util.find_spec("nvidia")
    wheels = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    found = [
        toolkit.nvcc.resolve().with_name("nvdisasm"),
        *(p for f in wheels for p in sorted(f.glob("*/bin/nvdisasm"))),
    ]
    for path in found:
        if path.is_file():
            return str(path)
    on_path = shutil.which("nvdisasm")
    if on_path is None:
        raise cuda.NotBuilt("no nvdisasm to count instructions with: pip install nvidia-cuda-nvdisasm")
    return on_path


def loops(codes: Iterable[Code]) -> list[Loop]:
    """Products among the kernels, by name."""
    codes = list(codes)
    names = demangle(code.kernel for code in codes)
    found = []
    for code in codes:
        match = re.fullmatch(r"(\w+)<(.*)>", names[code.kernel])
        if match is None or match[1] not in PRODUCTS:
            continue
        if not code.loop:
            raise ValueError(f"{names[code.kernel]} has no loop with matrix instructions")
        weights = PRODUCTS[match[1]]([argument.strip() for argument in match[2].split(",")])
        most = ", ".join(f"{count} {opcode}" for opcode, count in code.loop.most_common(6))
        found.append(Loop(names[code.kernel], code.loop.total() / weights, most))
    return sorted(found, key=lambda loop: loop.kernel)


def judge(
    found: Iterable[Loop], expected: dict[str, float], tolerance: float = TOLERANCE
) -> tuple[list[str], list[str]]:
    """What is worse than expected, and what else is not as expected."""
    worse, notes = [], []
    missing = dict(expected)
    for loop in found:
        want = missing.pop(loop.kernel, None)
        if want is None:
            worse.append(f"{loop.kernel} is not in {EXPECTED.name}; --update notes it")
        elif loop.per_weight > want * (1 + tolerance):
            worse.append(
                f"{loop.kernel}: {loop.per_weight:.2f} instructions per weight, {want:.2f} expected ({loop.opcodes})"
            )
        elif loop.per_weight < want * (1 - tolerance):
            notes.append(
                f"{loop.kernel}: {loop.per_weight:.2f} instructions per weight, better than {want:.2f}; --update notes it"
            )
    worse += [f"{kernel} is in {EXPECTED.name} but does not exist" for kernel in missing]
    return worse, notes


def summary(usages: Iterable[Usage], names: dict[str, str]) -> str:
    """A line for each kernel and GPU: how many instances, registers, stack and spills of the largest."""
    groups: dict[tuple[str, str], list[Usage]] = {}
    for usage in usages:
        groups.setdefault((names[usage.kernel].partition("<")[0], usage.arch), []).append(usage)
    rows = []
    for (kernel, arch), group in sorted(groups.items()):
        most = max(group, key=lambda usage: usage.registers)
        registers = f"{min(usage.registers for usage in group)}-{most.registers}"
        counts = [max(usage.stack for usage in group), sum(usage.spilled for usage in group)]
        rows.append([kernel, arch, str(len(group)), registers, names[most.kernel], *map(str, counts)])
    return text_table(("kernel", "GPU", "instances", "registers", "most in", "stack", "spilled"), rows)


def run(archs: list[cuda.Arch], *, update: bool) -> list[str]:
    """Build and look; returns what is wrong."""
    toolkit, began = cuda.find_toolkit(), time.monotonic()
    nvdisasm = find_nvdisasm(toolkit)  # before minutes of compiling
    folder = FOLDER / "-".join(arch.name for arch in archs)
    cuda.build((folder / cuda.NAME).resolve(), folder, toolkit, archs, cuda.Torch.installed(), keep=True)
    release = ".".join(map(str, toolkit.version))
    size = (folder / cuda.NAME).stat().st_size / 1e6
    print(f"nvcc {release}: {len(cuda.units())} objects, {size:.1f} MB, {time.monotonic() - began:.0f} s\n")
    return look(folder, archs, release, nvdisasm, update=update)


def look(folder: Path, archs: list[cuda.Arch], release: str, nvdisasm: str, *, update: bool) -> list[str]:
    """What is wrong with the kernels in a build folder; prints what there is to see."""
    usages = [usage for unit in cuda.units() for usage in read_log((folder / f"{unit.name}.log").read_text())]
    names = demangle(usage.kernel for usage in usages)
    print(summary(usages, names))
    wrong = [f"{names[u.kernel]} spills {u.spilled} bytes on {u.arch}" for u in usages if u.spilled]
    lines = [["kernel", "GPU", "registers", "stack", "spilled"]]
    lines += sorted([names[u.kernel], u.arch, str(u.registers), str(u.stack), str(u.spilled)] for u in usages)

    if any(arch.name == COUNTED for arch in archs):
        cubins = [
            next((folder / "kept" / unit.name).glob(f"*{COUNTED}*.cubin"), None)
            or folder / "kept" / unit.name / f"{unit.source.stem}.cubin"
            for unit in cuda.units()
        ]
        found = loops(code for cubin in cubins for code in disassemble(nvdisasm, cubin))
        rows = [[loop.kernel, f"{loop.per_weight:.2f}", loop.opcodes] for loop in found]
        print("\n" + text_table(("inner loop", "instructions per weight", "most of them"), rows))
        recorded: dict[str, Any] = json.loads(EXPECTED.read_text(encoding="utf-8"))
        if update:
            values = {loop.kernel: round(loop.per_weight, 2) for loop in found}
            EXPECTED.write_text(json.dumps({"nvcc": release, "per_weight": values}, indent=1) + "\n")
        elif recorded["nvcc"] != release:
            print(f"\nnot compared: {EXPECTED.name} is for nvcc {recorded['nvcc']}")
        else:
            worse, notes = judge(found, recorded["per_weight"])
            wrong += worse
            print("\n" + "\n".join(notes or ["as expected" if not worse else "not as expected"]))
        lines += [[], *rows]
    (FOLDER / "kernels.txt").write_text("\n".join("\t".join(line) for line in lines) + "\n")
    return wrong


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", default=COUNTED, help='"90", "80;90", or "all"; default %(default)s')
    parser.add_argument("--update", action="store_true")
    args = parser.parse_args(arguments)
    try:
        if args.archs == "all":
            archs, unknown = cuda.chosen_archs(cuda.find_toolkit(), {})
            if unknown:
                raise cuda.NotBuilt(f"this nvcc is too old for {' '.join(unknown)}")
        else:
            archs = cuda.parse_archs(args.archs)
        wrong = run(archs, update=args.update)
    except (cuda.NotBuilt, ValueError) as reason:
        print(f"cuda-check: {reason}", file=sys.stderr)
        return 1
    for line in wrong:
        print(f"cuda-check: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
