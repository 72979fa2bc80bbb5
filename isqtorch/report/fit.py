"""What would fit: the size of a model in every format, its key-value cache, and the memory that this machine has."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

from isqtorch.formats import Spec, formats
from isqtorch.policy.options import Options
from isqtorch.policy.request import Request

from .plan import planned, read_checkpoint
from .report import QuantReport

_CGROUP = Path("/sys/fs/cgroup")
_NAMES: Mapping[str, Sequence[str]] = {  # config.json spells these differently from family to family
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "heads": ("num_attention_heads", "n_head", "num_heads"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
}


@dataclass(frozen=True)
class Memory:
    """Memory that weights can live in, in bytes."""

    name: str  # "RAM", "cuda:0", "mps"
    total: int
    free: int


@dataclass(frozen=True)
class Overview:
    """A model in every format.

    Attributes:
        reports: format -> what `quantize_` would report.
        bytes_now: the model as its checkpoint has it.
        context: tokens that the key-value cache is counted for.
        cache_bytes: its size for one sequence, in the model's own type; None: the configuration does not tell.
        memories: what this machine has.
        notes: what to know about these numbers.
    """

    reports: dict[str, QuantReport]
    bytes_now: int
    context: int
    cache_bytes: int | None
    memories: list[Memory]
    notes: list[str]

    def fits(self, weights: int) -> dict[str, bool]:
        """Whether weights of this size and the cache fit into each memory, as it is free now."""
        need = weights + (self.cache_bytes or 0)
        return {memory.name: need <= memory.free for memory in self.memories}

    def to_dict(self) -> dict[str, Any]:
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
        context: tokens of the key-value cache; less where the model's context is shorter.
        options: more arguments of `plan` (topology, organization, include, exclude, fallback, activations).

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
    now = next(iter(reports.values())).bytes_before
    return Overview(reports, now, context, None if per_token is None else context * per_token, memories(), notes)


def cache_bytes_per_token(config: Mapping[str, Any]) -> int | None:
    """Bytes of keys and values for one token, if all layers keep all of them; None where config.json does not tell."""
    text = _text_config(config)
    if "kv_lora_rank" in text:
        return None  # latent attention caches other things
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
    """RAM, as far as this process may use it, and the memory of GPUs."""
    found = [_host()]
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        found.append(Memory(f"cuda:{i}", total, free))
    if torch.backends.mps.is_available():
        size = torch.mps.recommended_max_memory()
        found.append(Memory("mps", size, size - torch.mps.driver_allocated_memory()))
    return found


def _host() -> Memory:
    """RAM: Linux tells what is available, a container's limit included; elsewhere all of it counts as free."""
    facts = _numbers(Path("/proc/meminfo"), scale=1024)
    total = facts.get("MemTotal") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = facts.get("MemAvailable", total)
    limit = _limit(_CGROUP / "memory.max")
    if limit is not None and limit < total:
        used = _numbers(_CGROUP / "memory.stat").get("anon", 0)  # the rest is page cache, which makes room
        total, free = limit, min(free, limit - used)
    return Memory("RAM", total, free)


def _limit(path: Path) -> int | None:
    """The number in a control file; None for "max", or where there is none."""
    try:
        text = path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _numbers(path: Path, scale: int = 1) -> dict[str, int]:
    """The `name value` lines of one of the kernel's files, {} if there is none."""
    try:
        rows = [line.split() for line in path.read_text(encoding="ascii", errors="replace").splitlines()]
    except OSError:
        return {}
    return {row[0].rstrip(":"): scale * int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config
