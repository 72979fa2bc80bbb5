"""One of two processes that load quantized checkpoints together; `test_stored_parallel.py` starts both.

    python -m torch.distributed.run --nproc-per-node 2 stored_worker.py FOLDER

Prints for each load whether the shares of both processes together are the weights that one process has.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.utils import logging
from two_processes import leave

import isqtorch

FOLDER = Path(sys.argv[1])


def load(name: str, fmt: str, distributed: dict[str, Any] | None = None) -> Any:
    parallel = {} if distributed is None else {"distributed_config": DistributedConfig(**distributed)}
    return AutoModelForCausalLM.from_pretrained(
        FOLDER / name / "quantized", quantization_config=isqtorch.IsqConfig(fmt), **parallel
    )


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)
dist.init_process_group("gloo")
CASES = [(name, fmt, {"tp_size": 2}) for name in ("fp8", "int4", "experts") for fmt in ("keep", "q8_0")]
CASES += [("mxfp4", fmt, {"tp_size": 2, "ep_size": 2}) for fmt in ("keep", "q8_0")]
for name, fmt, distributed in CASES:
    alone = load(name, fmt).state_dict()
    model = load(name, fmt, distributed)
    spread = sum(hasattr(value, "full_tensor") for value in model.state_dict().values())
    equal = all(torch.equal(whole(value), alone[key]) for key, value in model.state_dict().items())
    kept = sum("blocks of the checkpoint" in layer.reason for layer in model.isq_report.layers)
    if dist.get_rank() == 0:
        print(f"{name} {fmt} {'equal' if equal else 'different'} {'spread' if spread else 'whole'} {kept}")
leave()
