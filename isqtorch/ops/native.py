"""Loads the compiled extension, which defines the operators `torch.ops.isqtorch.*` and their CPU kernels.

The library holds no Python symbols, so it is loaded as a plain shared library and not imported.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


def _load() -> Path:
    folder = Path(__file__).resolve().parent.parent
    found = sorted([*folder.glob("_C*.so"), *folder.glob("_C*.pyd")])
    if not found:
        raise ImportError(
            f"isqtorch is not compiled: there is no _C library in {folder}. Build it with `make build` in a checkout, or "
            "install the package with `pip install --no-build-isolation .`"
        )
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        raise ImportError(
            f"isqtorch: {found[0].name} does not load with torch {torch.__version__}; it needs torch >= 2.10. "
            f"Rebuild it with `make build`. ({error})"
        ) from error
    return found[0]


LIBRARY = _load()

NATIVE_DEVICES = ("cpu",)
"""Device types with compiled kernels. On others the plain PyTorch reference runs."""


@dataclass(frozen=True)
class LinearKernel:
    """The kernel of `linear` for a range of rows of x."""

    first: int
    last: int | None  # None: any number from `first` on
    kernel: str
    level: str  # the instruction-set level whose kernel it is; the selected one may share it
    why: str

    @property
    def rows(self) -> str:
        """The range as text: "1-8", "9+"."""
        return f"{self.first}+" if self.last is None else f"{self.first}-{self.last}"


@dataclass(frozen=True)
class CpuInfo:
    """What the CPU kernels were compiled for and which of them run."""

    isa_compiled: tuple[str, ...]  # instruction-set levels in the library, best last
    isa_supported: tuple[str, ...]  # those this machine can run
    isa_with_formats: tuple[str, ...]  # of these, those with decoders and quantizers of their own; others share them
    isa_selected: str
    isa_of_formats: str  # the level whose decoders and quantizers run
    reason: str  # why isa_selected
    threads: int
    formats: dict[str, dict[str, int]]  # name -> {"block": weights, "block_bytes": bytes}, as the C++ side has them
    linear: dict[str, tuple[LinearKernel, ...]]  # name of a format -> its kernels at this level, by rows of x


def cpu_info() -> CpuInfo:
    """Describe the CPU kernels. The level is the best supported one, unless ISQTORCH_CPU_ISA names another."""
    raw: dict[str, Any] = json.loads(torch.ops.isqtorch.cpu_info())
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()}
    fields["linear"] = {
        name: tuple(LinearKernel(**kernel) for kernel in kernels) for name, kernels in raw["linear"].items()
    }
    return CpuInfo(**fields)


def set_cpu_isa(name: str) -> None:
    """Select an instruction-set level for the whole process; "" goes back to the default choice.

    Raises:
        ValueError: there is no such level, or this machine cannot run it.
    """
    torch.ops.isqtorch.set_cpu_isa(name)
