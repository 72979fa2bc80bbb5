"""What fits into memory: the size of a model in every format, its key-value cache, and the memory of this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

from isqtorch.files.system import memory
from isqtorch.formats import Spec, formats
from isqtorch.policy.options import Options
from isqtorch.policy.request import Request

from .plan import planned, read_checkpoint
from .report import QuantReport

_CGROUP = Path("/sys/fs/cgroup")
_NAMES: Mapping[str, Sequence[str]] = {  # names in config.json, which differ between model families
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "heads": ("num_attention_heads", "n_head", "num_heads"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
}


@dataclass(frozen=True)
class Memory:
    """One memory that can hold weights; sizes in bytes."""

    name: str  # "RAM", "cuda:0", "mps"
    total: int
    free: int


@dataclass(frozen=True)
class Overview:
    """A model in every format.

    Attributes:
        reports: format -> predicted report of `quantize_`.
        bytes_now: size of the model in its checkpoint.
        context: length of the key-value cache, in tokens.
        cache_bytes: size of the cache for one sequence, in the dtype of the model; None: the configuration does not
            tell.
        memories: the memories of this machine.
        notes: remarks about these numbers.
        largest: size of the largest weight in its checkpoint: while a model is packed, one weight is there in float.
        is_packed: whether the checkpoint holds packed weights already.
    """

    reports: dict[str, QuantReport]
    bytes_now: int
    context: int
    cache_bytes: int | None
    memories: list[Memory]
    notes: list[str]
    largest: int
    is_packed: bool

    def fits(self, weights: int) -> dict[str, bool]:
        """{name of a memory: whether `weights` bytes and the cache fit into its free part}."""
        need = weights + (self.cache_bytes or 0)
        return {memory.name: need <= memory.free for memory in self.memories}

    def to_dict(self) -> dict[str, Any]:
        """The overview in plain types, for JSON."""
        return {
            "bytes_now": self.bytes_now,
            "fits_now": self.fits(self.bytes_now),
            "context": self.context,
            "cache_bytes": self.cache_bytes,
            "memories": [asdict(memory) for memory in self.memories],
            "formats": {
                name: {
                    "bytes": report.bytes_after,
                    "bits_per_weight": round(report.bits_per_weight, 4),
                    "promoted": len(report.promoted),
                    "fallbacks": len(report.fallbacks),
                    "left": len(report.left),
                    "fits": self.fits(report.bytes_after),
                }
                for name, report in self.reports.items()
            },
            "notes": self.notes,
        }


def overview(
    source: str | os.PathLike[str], specs: Sequence[Spec] | None = None, *, context: int = 4096, **options: Any
) -> Overview:
    """Predict the size of a checkpoint in several formats; its headers are read once.

    Args:
        source: a folder, a file or a model id, as for `plan`.
        specs: formats or numbers of bits; None: every format.
        context: length of the key-value cache in tokens, limited to the context of the model.
        options: further arguments of `plan` (topology, organization, include, exclude, fallback, activations).

    Raises:
        ValueError, OSError: as `plan`.
    """
    if context < 1:
        raise ValueError(f"overview: context must be 1 or more tokens, got {context}")
    inventory, notes, config = read_checkpoint(source)
    reports = {}
    for spec in formats() if specs is None else specs:
        reports[str(spec)] = planned(inventory, Request(spec, Options(**options), "plan"))
    text = _text_config(config)
    longest = text.get("max_position_embeddings")
    if isinstance(longest, int) and longest > 0:
        context = min(context, longest)
    per_token = cache_bytes_per_token(config)
    if per_token is None:
        notes = [*notes, "the configuration does not tell the size of the key-value cache; it is not counted"]
    first = next(iter(reports.values()))
    return Overview(
        reports,
        first.bytes_before,
        context,
        None if per_token is None else context * per_token,
        memories(),
        notes,
        largest=max((layer.bytes_before for layer in first.layers), default=0),
        is_packed=any(layer.packed_as for layer in inventory.layers),
    )


def cache_bytes_per_token(config: Mapping[str, Any]) -> int | None:
    """Bytes of keys and values of one token, if every layer caches all tokens; None if config.json does not tell."""
    text = _text_config(config)
    if "kv_lora_rank" in text:
        return None  # multi-head latent attention caches compressed vectors instead
    layers, heads, hidden = (next((text[n] for n in names if n in text), None) for names in _NAMES.values())
    if not (_count(layers) and _count(heads) and _count(hidden)):
        return None
    cached, size = text.get("num_key_value_heads") or heads, text.get("head_dim") or hidden // heads
    if not (_count(cached) and _count(size)):
        return None
    dtype = str(text.get("dtype") or text.get("torch_dtype") or config.get("dtype") or config.get("torch_dtype"))
    return 2 * layers * cached * size * (4 if dtype == "float32" else 2)


def _count(value: Any) -> TypeGuard[int]:
    return type(value) is int and value > 0


def memories() -> list[Memory]:
    """The RAM that this process may use, and the memory of GPUs."""
    found = [_host()]
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        found.append(Memory(f"cuda:{i}", total, free))
    if torch.backends.mps.is_available():
        size = torch.mps.recommended_max_memory()
        found.append(Memory("mps", size, size - torch.mps.driver_allocated_memory()))
    return found


def _host() -> Memory:
    """RAM, within the limit of a Linux container. On a Mac all of it counts as free."""
    facts = _numbers(Path("/proc/meminfo"), scale=1024)
    if "MemTotal" in facts:
        total, free = facts["MemTotal"], facts.get("MemAvailable", facts["MemTotal"])
    else:
        total, known = memory()
        free = total if known is None else known
    limit = _limit(_CGROUP / "memory.max")
    if limit is not None and limit < total:
        used = _numbers(_CGROUP / "memory.stat").get("anon", 0)  # the rest is page cache, which the kernel can evict
        total, free = limit, min(free, limit - used)
    return Memory("RAM", total, free)


def _limit(path: Path) -> int | None:
    """The number in a cgroup file; None for "max" or if the file does not exist."""
    try:
        text = path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _numbers(path: Path, scale: int = 1) -> dict[str, int]:
    """The `name value` lines of one of the kernel's files; {} if the file does not exist."""
    try:
        rows = [line.split() for line in path.read_text(encoding="ascii", errors="replace").splitlines()]
    except OSError:
        return {}
    return {row[0].rstrip(":"): scale * int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config
