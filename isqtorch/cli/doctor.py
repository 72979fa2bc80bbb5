"""Check the installation: versions, compiled kernels, features of this machine, selected kernels and the reason.

Then compare quantize, dequantize, linear (with each of its kernels) and embedding of every format with the plain
PyTorch reference, on the CPU and, if there are kernels for it, on an NVIDIA GPU.

    isqtorch doctor
    isqtorch doctor --json
    ISQTORCH_CPU_ISA=baseline isqtorch doctor

Exit status 1 if a format disagrees with the reference.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from dataclasses import asdict
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from isqtorch._version import __version__
from isqtorch.formats import QuantFormat, formats, get_format
from isqtorch.ops import LinearKernel, cpu_info, cuda_info
from isqtorch.ops.native import CUDA_LIBRARY, LIBRARY, NATIVE_DEVICES, NO_CUDA, missing_kernels, no_fp8_products
from isqtorch.text import text_table

from ._common import add_json

HELP = "check the installation and every kernel"

_ROWS = 40  # rows of the test weight: enough for an RMS error, and more than kernels process at a time
_BYTES_ALLOWED = 0.001  # fraction of bytes that may differ: iterative solvers round ties differently by instruction set
_CPU_FLAGS = (
    "f16c fma avx2 avx_vnni avx512f avx512bw avx512dq avx512vl avx512_vnni avx512_bf16 gfni amx_bf16 amx_int8 "
    "asimd asimddp i8mm bf16 sve"
).split()  # features that kernels can use, by their names in Linux


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--variants", action="store_true", help="also check other group sizes and scale types")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    info = cpu_info()
    checks = {name: check_kernels(get_format(name)) for name in formats(variants=args.variants)}
    on_gpu = {name: check_kernels(get_format(name), "cuda") for name in checks} if _gpu_runs() else {}
    healthy = all(result["ok"] for result in [*checks.values(), *on_gpu.values()])
    if args.json:
        native = {"library": LIBRARY and str(LIBRARY), **asdict(info)}
        found = {"ok": healthy, "versions": versions(), "cpu": cpu(), "native": native, "formats": checks}
        found["opens"] = models_that_open()
        compiled = cuda_info()
        found["cuda"] = {
            "compiled": asdict(compiled) if compiled else None,
            "missing": NO_CUDA,
            "fp8_activations": fp8_activations(),
            "formats": on_gpu,
        }
        print(json.dumps(found, indent=2))
        return 0 if healthy else 1

    print("\n".join(machine_facts()))
    print("packages: " + ", ".join(f"{name} {version}" for name, version in versions().items()))
    print(f"CPU features: {' '.join(cpu()['features']) or 'unknown'}")
    print(f"models that open: {models_that_open()}")
    print(f"native library: {LIBRARY or 'none: plain PyTorch computes on the CPU'}")
    print(f"  compiled: {', '.join(info.isa_compiled)}; this machine runs: {', '.join(info.isa_supported)}")
    print(f"  selected: {info.isa_selected}, {info.reason}")
    print(f"CUDA kernels: {cuda_kernels()}")
    print(f'FP8 activations (activations="fp8"): {fp8_activations()}')
    print(f"other devices: {other_devices()}")
    _show(checks, "cpu")
    if on_gpu:
        _show(on_gpu, "cuda")
    return 0 if healthy else 1


def _show(checks: dict[str, dict[str, Any]], device: str) -> None:
    rows = [
        [name, "ok" if result["ok"] else "FAIL", result["detail"], _kernel_names(kernels_of_linear(name, device))]
        for name, result in checks.items()
    ]
    print(f"\n{device}")
    print(text_table(("format", "", "linear error / allowed", "kernel of linear, by rows of x"), rows))
    failed = [name for name, result in checks.items() if not result["ok"]]
    print(
        f"\n{len(checks) - len(failed)} of {len(checks)} formats ok"
        + (f"; FAIL: {', '.join(failed)}" if failed else "")
    )


def _kernel_names(kernels: tuple[LinearKernel, ...]) -> str:
    return "; ".join(f"{use.rows}: {use.kernel}" for use in kernels) or "reference"


def kernels_of_linear(format: str, device: str) -> tuple[LinearKernel, ...]:
    """The kernels of `linear`, by number of rows of x; empty if the reference runs."""
    if device == "cpu":
        return cpu_info().linear.get(format, ())
    info = cuda_info()
    return info.linear(format) if info and device == "cuda" else ()


def _gpu_runs() -> bool:
    return "cuda" in NATIVE_DEVICES and torch.cuda.is_available()


def cuda_kernels() -> str:
    """The compiled CUDA kernels, or the reason why there are none."""
    info = cuda_info()
    if info is None:
        return f"none, {NO_CUDA}"
    return f"{CUDA_LIBRARY}, toolkit {info.toolkit}, for {', '.join(f'sm_{arch}' for arch in info.archs)}"


def fp8_activations() -> str:
    """Whether `activations="fp8"` has an effect on each GPU, or the reason why not."""
    found = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    said = {device: no_fp8_products(device) for device in found}
    return "; ".join(f"{device}: {f'no, {why}' if why else 'yes, for many rows of x'}" for device, why in said.items())


def models_that_open() -> str:
    """What `load` and the commands can open, or what is missing for it."""
    missing = [name for name in ("transformers", "accelerate") if find_spec(name) is None]
    if missing:
        return f"none, {' and '.join(missing)} not installed: pip install 'isqtorch[hf]'"
    from isqtorch.integrations.checkpoints.gguf.architectures import ARCHITECTURES

    count = len({record.name for record in ARCHITECTURES})
    return f"folders and ids of transformers models, GGUF files ({count} architectures), MLX folders"


def machine_facts() -> list[str]:
    """The machine and the software that printed numbers depend on, one line each."""
    facts = cpu()
    info = cpu_info()
    return [
        f"{facts['name']}, {facts['cores']} logical cores, {platform.system()} {platform.machine()}",
        f"isqtorch {__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{torch.get_num_threads()} threads",
        f"CPU kernels: {info.isa_selected}, {info.reason}",
    ]


def versions() -> dict[str, str]:
    """Versions of the packages that isqtorch uses; missing optional packages are left out."""
    found = {"isqtorch": __version__, "python": platform.python_version()}
    for name in ("torch", "numpy", "safetensors", "huggingface_hub", "transformers", "accelerate", "matplotlib"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def cpu() -> dict[str, Any]:
    """Name, cores and instruction-set features of the CPU, as far as the system tells."""
    name, flags = platform.processor(), set()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []  # not Linux
    for line in lines:
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "model name":
            name = value
        elif key in ("flags", "Features"):
            flags.update(value.split())
    return {
        "name": name or platform.machine(),
        "cores": os.cpu_count(),
        "features": [flag for flag in _CPU_FLAGS if flag in flags],
    }


def other_devices() -> str:
    """The GPUs that torch finds, and whether native kernels run on them."""
    found = {torch.cuda.get_device_name(i): "cuda" for i in range(torch.cuda.device_count())}
    if torch.backends.mps.is_available():
        found["Metal"] = "mps"
    runs = dict.fromkeys(NATIVE_DEVICES, "native kernels")
    return (
        "; ".join(
            f"{name}: {runs.get(device) or f'plain PyTorch, {missing_kernels(device)}'}"
            for name, device in found.items()
        )
        or "none"
    )


def check_kernels(fmt: QuantFormat, device: str = "cpu") -> dict[str, Any]:
    """Compare four ops of a format with the reference on a small weight; `linear` with each kernel of the device.

    Returns:
        `ok`; `kernel`: "native" or "reference"; `detail`: faults, then the largest error of linear and its limit.
    """
    from isqtorch.ops import reference

    generator = torch.Generator().manual_seed(0)
    w = torch.randn(_ROWS, 4 * fmt.block, generator=generator)
    ids = torch.tensor([0, _ROWS - 1])
    expected = reference.quantize(w, fmt.name)
    weights = reference.dequantize(expected, fmt.name, torch.float32)
    kernels = kernels_of_linear(fmt.name, device)
    wrong, errors = [], []
    try:
        ops = torch.ops.isqtorch
        packed = expected.to(device)
        differing = float((ops.quantize(w.to(device), fmt.name).cpu() != expected).double().mean())
        if differing > _BYTES_ALLOWED:
            wrong.append(f"quantize gives other bytes ({100 * differing:.2g} %)")
        if not torch.equal(ops.dequantize(packed, fmt.name, torch.float32).cpu(), weights):
            wrong.append("dequantize gives other weights")
        if not torch.equal(ops.embedding(ids.to(device), packed, fmt.name, torch.float32).cpu(), weights[ids]):
            wrong.append("embedding gives other rows")
        for first, rows in [(use.first, use.rows) for use in kernels] or [(1, "any")]:
            x = torch.randn(first + 2, w.shape[1], generator=generator)
            errors.append(_linear_error(ops.linear(x.to(device), packed, fmt.name).cpu(), x, weights))
            if not errors[-1] <= fmt.linear_error:
                wrong.append(f"linear is too far off with {rows} rows of x")
    except Exception as error:  # a broken build may raise anything; that is a finding, not a crash of this command
        wrong.append(f"{type(error).__name__}: {' '.join(str(error).split())}")
    detail = [f"{max(errors):.1e} / {fmt.linear_error:.1e}"] if errors else []
    return {"ok": not wrong, "kernel": "native" if kernels else "reference", "detail": "; ".join([*wrong, *detail])}


def _linear_error(y: torch.Tensor, x: torch.Tensor, weights: torch.Tensor) -> float:
    """RMS error of y relative to the expected RMS of outputs, for weights and activations with random signs.

    The RMS of y itself would not do: some of these few outputs may be close to zero.
    """
    x, weights = x.double(), weights.double()
    typical = x.norm(dim=1, keepdim=True) * weights.norm(dim=1) / weights.shape[1] ** 0.5
    return float((y.double() - x @ weights.T).norm() / typical.norm())
