"""Load the compiled libraries.

`_C` defines the operators `torch.ops.isqtorch.*` and their CPU kernels. `_CUDA` holds the CUDA kernels; it is loaded
only if torch supports CUDA. Metal kernels are source text, which torch compiles (`ops/metal`).

The libraries hold no Python symbols, so they are loaded as plain shared libraries and not imported.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import uncompiled

PACKAGE = Path(__file__).resolve().parent.parent

_WITHOUT = {
    "darwin": "MPS is not affected. To compile them: xcode-select --install, then reinstall isqtorch.",
    "win32": "There are none for Windows yet; in WSL, isqtorch has them.",
}
"""Systems on which the package may be used without compiled kernels, and what to do about it."""


def _load() -> Path | None:
    """Load the compiled extension and return its path.

    On a Mac or on Windows without a compiled extension, define the operators without it, warn, and return None.

    Raises:
        ImportError: there is no extension, and this is another system; or it does not load with this torch.
    """
    found = sorted([*PACKAGE.glob("_C*.so"), *PACKAGE.glob("_C*.pyd")])
    if not found and sys.platform in _WITHOUT:
        warnings.warn(
            "isqtorch is installed without compiled CPU kernels: plain PyTorch computes on the CPU, correct and slow. "
            + _WITHOUT[sys.platform],
            stacklevel=2,
        )
        uncompiled.define()
        return None
    hidden = [] if found else _compiled_copies(sys.path)
    if hidden:
        raise ImportError(
            f"isqtorch: the sources in {PACKAGE} are not compiled, and they hide the installed package in {hidden[0]}: Python looks "
            "into the current directory first. Start Python outside of the checkout, or compile the checkout with `make build`."
        )
    if not found:
        raise ImportError(
            f"isqtorch is not compiled: there is no _C library in {PACKAGE}. Build it with `make build` in a checkout, or "
            "install the package with `pip install .`"
        )
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        raise ImportError(
            f"isqtorch: {found[0].name} does not load with torch {torch.__version__}; it needs torch >= 2.10. "
            f"Rebuild it with `make build`. ({error})"
        ) from error
    return found[0]


def _compiled_copies(places: Sequence[str]) -> list[Path]:
    """Other folders on Python's path with a compiled isqtorch."""
    folders = [Path(place, PACKAGE.name).resolve() for place in places if place]
    return [folder for folder in folders if folder != PACKAGE and next(folder.glob("_C*"), None)]


def _load_cuda(cuda: str | None, folder: Path) -> tuple[Path | None, str]:
    """Load the library with the CUDA kernels. Return its path and "", or None and the reason why it is not loaded.

    Args:
        cuda: the CUDA version of torch; None if torch has no CUDA.
        folder: the folder of the library.
    """
    path = folder / "_CUDA.abi3.so"
    if cuda is None:
        return None, "this torch knows no CUDA"
    if os.environ.get("ISQTORCH_CUDA") == "0":
        return None, "ISQTORCH_CUDA is 0"
    if not path.exists():
        return None, f"they are not compiled; rebuild isqtorch where nvcc {cuda.split('.')[0]} is installed"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        why = f"{path.name} does not load with torch {torch.__version__}: {error}"
        warnings.warn(f"isqtorch: plain PyTorch computes on CUDA, because {why}", stacklevel=2)
        return None, why
    return path, ""


LIBRARY = _load()
CUDA_LIBRARY, NO_CUDA = _load_cuda(torch.version.cuda, PACKAGE)
"""Path of the library with the CUDA kernels, or None; then NO_CUDA is the reason."""

_FP8_PRODUCTS = (12, 9)  # from this CUDA version on, FP8 products of cuBLAS take one scale per 128 columns
_FP8_CAPABILITY = 9  # only compute capability 9.0 (Hopper) has these products
if CUDA_LIBRARY is not None and torch.version.cuda is not None:
    _fp8_products = tuple(map(int, torch.version.cuda.split(".")[:2])) >= _FP8_PRODUCTS
    torch.ops.isqtorch.allow_fp8_products(_fp8_products)

NATIVE_DEVICES = (*["cpu"] * bool(LIBRARY), *["cuda"] * bool(CUDA_LIBRARY), "mps")
"""Device types with native kernels. On others the plain PyTorch reference runs."""


def missing_kernels(device: str) -> str:
    """Say why a device type is not in NATIVE_DEVICES. The text can begin a sentence."""
    why = {"cuda": f" ({NO_CUDA})", "cpu": " (the extension is not compiled)"}.get(device, " yet")
    return f"there are no native kernels for {device}{why}"


def no_fp8_products(device: torch.device | str) -> str | None:
    """Return the reason why a device cannot multiply fp8 weights with FP8 activations, or None if it can."""
    device = torch.device(device)
    if device.type != "cuda":
        return f"there is no FP8 product on {device.type}"
    if CUDA_LIBRARY is None:
        return f"there are no CUDA kernels ({NO_CUDA})"
    version = torch.version.cuda or "0"
    if tuple(map(int, version.split(".")[:2])) < _FP8_PRODUCTS:
        return f"torch is for CUDA {version}; its FP8 product has scales for 128 weights from CUDA 12.9 on"
    major, minor = torch.cuda.get_device_capability(device)
    if major != _FP8_CAPABILITY:
        return f"the GPU has compute capability {major}.{minor}; 9.0 alone has products with scales for 128 weights"
    return None


@dataclass(frozen=True)
class LinearKernel:
    """The kernel of `linear` for a range of rows of x."""

    first: int
    last: int | None  # None: any number from `first` on
    kernel: str
    level: str  # the instruction-set level that the kernel was written for; higher levels may use it, too
    why: str
    decodes: bool = False  # decodes weights into memory, for torch's product

    @property
    def rows(self) -> str:
        """The range as text: "1-8", "9+"."""
        return f"{self.first}+" if self.last is None else f"{self.first}-{self.last}"


@dataclass(frozen=True)
class CpuInfo:
    """The instruction-set levels of the CPU kernels: compiled, supported and selected ones."""

    isa_compiled: tuple[str, ...]  # instruction-set levels in the library, best last
    isa_supported: tuple[str, ...]  # those that this machine can run
    isa_with_formats: tuple[str, ...]  # those with their own decoders and quantizers; other levels use a lower one's
    isa_selected: str
    isa_of_formats: str  # the level whose decoders and quantizers run
    reason: str  # why isa_selected was selected
    threads: int
    formats: dict[str, dict[str, int]]  # name -> {"block": weights, "block_bytes": bytes}, from the C++ code
    linear: dict[str, tuple[LinearKernel, ...]]  # name of a format -> its kernels at this level, by rows of x


def cpu_info() -> CpuInfo:
    """Describe the CPU kernels. The best supported level is selected, unless ISQTORCH_CPU_ISA names another one."""
    if LIBRARY is None:
        return CpuInfo((), (), (), "none", "none", "the extension is not compiled", torch.get_num_threads(), {}, {})
    raw: dict[str, Any] = json.loads(torch.ops.isqtorch.cpu_info())
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()}
    fields["linear"] = {
        name: tuple(LinearKernel(**kernel) for kernel in kernels) for name, kernels in raw["linear"].items()
    }
    return CpuInfo(**fields)


@dataclass(frozen=True)
class CudaInfo:
    """The toolkit, GPUs and formats that the CUDA kernels were compiled for."""

    toolkit: str  # nvcc's version
    archs: tuple[str, ...]  # GPUs: "80", "90a", ...
    formats: dict[str, dict[str, int]]  # name -> "block", "block_bytes"; rows of x: "few_rows", "max_rows", "w8a8_rows"

    def linear(self, format: str, *, fp8_products: bool = False) -> tuple[LinearKernel, ...]:
        """Return the kernels of `linear` for a format, by rows of x; with `fp8_products`, those of `linear_w8a8`."""
        few, most = (self.formats[format][name] for name in ("few_rows", "w8a8_rows" if fp8_products else "max_rows"))
        if fp8_products:
            many = ("FP8 codes, then torch's _scaled_mm (CUDA)", "", "x is rounded to FP8, 128 columns under one scale")
        else:
            many = ("decoded, then torch's product (CUDA)", "", "slices of weights are decoded into the cache")
        return (
            LinearKernel(1, few, "rows (CUDA)", "", "each weight is read once; warps share the columns of a row"),
            LinearKernel(
                few + 1, most, "tiles (CUDA)", "", "weights are unpacked in shared memory for all rows of x at once"
            ),
            LinearKernel(most + 1, None, *many, decodes=not fp8_products),
        )


def cuda_info() -> CudaInfo | None:
    """Describe the CUDA kernels. Return None if there are none (`isqtorch doctor` prints the reason)."""
    if CUDA_LIBRARY is None:
        return None
    raw: dict[str, Any] = json.loads(torch.ops.isqtorch.cuda_info())
    return CudaInfo(raw["toolkit"], tuple(raw["archs"].split()), raw["formats"])


def set_cpu_isa(name: str) -> None:
    """Select an instruction-set level for the whole process; "" restores the default choice.

    Raises:
        ValueError: there is no such level, or this machine cannot run it.
    """
    if LIBRARY is None:
        raise ValueError(f"set_cpu_isa: there is no level {name!r}: the extension is not compiled")
    torch.ops.isqtorch.set_cpu_isa(name)
