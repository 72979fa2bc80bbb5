"""One library's process: loads a model, says what that took, generates. Requests come from `bench_models.py`, through `peers/process.py`.

python -m benchmarks.models.worker isqtorch
"""

from __future__ import annotations

import functools
import gc
import hashlib
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from isqtorch import get_format, ops
from isqtorch.modules import PackedModule, QuantLinear
from isqtorch.modules.parameter import plain_bytes

from ..ours import Here
from ..peers.worker import serve
from ..timing import interleave
from . import engines
from .checkpoints import matrix
from .memory import Peak, resident
from .prompts import tokens

_CHUNK = 8 << 20
_WARM = 9  # tokens before anything is timed
_LAYER = (
    256,
    256,
)  # (N, K) of the layer whose overhead is measured: so small that a product takes little longer than a call


class Worker:
    """Each method answers one kind of request."""

    def __init__(self, who: str) -> None:
        self._engine = engines.open(who)

    def hello(self) -> dict[str, Any]:
        resident()  # its own first use allocates
        return {"version": self._engine.version}

    def prepare(self, folder: str, fmt: str) -> dict[str, Any]:
        return {"source": str(self._engine.prepare(Path(folder), fmt))}

    def load(self, source: str, fmt: str) -> dict[str, Any]:
        """Wall seconds and memory; what was loaded before is gone first."""
        gc.collect()
        with Peak() as memory:
            began = time.perf_counter()
            self._engine.load(Path(source), fmt)
            seconds = time.perf_counter() - began
        return {"seconds": seconds, "size": self._engine.size, "peak": memory.peak, "kept": memory.kept}

    def read(self, folder: str) -> dict[str, Any]:
        """Seconds to read the files of a checkpoint, which are in the page cache, into a buffer."""
        buffer, began = bytearray(_CHUNK), time.perf_counter()
        for path in sorted(Path(folder).glob("*.safetensors")):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        return {"seconds": time.perf_counter() - began}

    def quantize(self) -> dict[str, Any]:
        """Seconds to quantize matrices like those of the loaded model, which are in memory, one after the other with all cores."""
        seconds = 0.0
        for (fmt, shape), count in self._packed().items():
            *rest, row_bytes = shape
            format = get_format(fmt)
            weight = matrix((*rest, format.in_features(row_bytes)))
            began = time.perf_counter()
            ops.quantize(weight, fmt)
            seconds += count * (time.perf_counter() - began)
        return {"seconds": seconds}

    def _packed(self) -> Counter[tuple[str, tuple[int, ...]]]:
        """How many matrices there are of each format and shape of packed bytes; a tied one counts once."""
        found: dict[int, tuple[str, tuple[int, ...]]] = {}
        for module in self._engine.model.modules():  # type: ignore[attr-defined]  # asked of our own engine only
            if isinstance(module, PackedModule):
                for name, fmt in module.packed.items():
                    weight = getattr(module, name)
                    found[weight.data_ptr()] = (fmt, tuple(weight.shape))
        return Counter(found.values())

    def save(self, folder: str) -> dict[str, Any]:
        # Stacks of experts stay stacks: that is the layout that can be mapped.
        self._engine.model.save_pretrained(folder, save_original_format=False)  # type: ignore[attr-defined]
        return {}

    def digest(self) -> dict[str, Any]:
        """The hash of all weights."""
        sha = hashlib.sha256()
        for name, tensor in sorted(self._engine.model.state_dict().items()):  # type: ignore[attr-defined]
            sha.update(name.encode())
            sha.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
        return {"sha256": sha.hexdigest()}

    def logits(self, vocabulary: int, to: str) -> dict[str, Any]:
        """Writes the logits after a few tokens to a file of numpy's, if there are any; they say whether all compute the same."""
        logits = self._engine.logits(tokens(vocabulary, _WARM))
        if logits is not None:
            np.save(to, logits)
        return {"known": logits is not None}

    def token_bytes(self, prompt: int) -> dict[str, Any]:
        """Bytes that a token after a prompt reads."""
        return {"bytes": self._engine.token_bytes(prompt)}  # type: ignore[attr-defined]  # asked of our own engine only

    def generate(self, prompt: int, new: int) -> dict[str, Any]:
        first, rest = self._engine.generate(prompt, new)
        return {"first": first, "rest": rest}

    def overhead(self, fmt: str, rounds: int) -> dict[str, Any]:
        """Microseconds of a layer over the operator that it calls, and of nn.Linear over F.linear, on one thread."""
        weight, x = matrix(_LAYER), matrix((1, _LAYER[1]), 1)
        packed = ops.quantize(weight, fmt)
        layer = QuantLinear.from_packed(packed, fmt, dtype=torch.bfloat16)
        plain = nn.Linear(_LAYER[1], _LAYER[0], bias=False, dtype=torch.bfloat16)
        operator = torch.ops.isqtorch.linear_frozen.default._op  # what the layer calls
        cases = {
            "layer": functools.partial(layer, x),
            "operator": functools.partial(operator, x, plain_bytes(layer.weight), fmt, None),
            "nn.Linear": functools.partial(plain, x),
            "F.linear": functools.partial(nn.functional.linear, x, plain.weight),
        }
        with torch.inference_mode():
            contenders = {name: Here(call) for name, call in cases.items()}
            samples = interleave(contenders, rounds=rounds, seconds=0.002)

        def over(one: str, other: str) -> float:
            rounds = zip(samples[one].cpu, samples[other].cpu, strict=True)  # the two turns of a round are neighbours
            return 1e6 * statistics.median(a - b for a, b in rounds)

        return {"microseconds": over("layer", "operator"), "nn.Linear": over("nn.Linear", "F.linear")}


if __name__ == "__main__":
    sys.exit(serve(lambda: Worker(sys.argv[1])))
