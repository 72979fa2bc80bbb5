"""One of two processes that run a model together; `test_parallel.py` starts both and reads what they write.

    python -m torch.distributed.run --nproc-per-node 2 parallel_worker.py FOLDER

FOLDER is what `write_checkpoints` of that test made. Every scenario writes its result under its name to
FOLDER/results-RANK.json.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.utils import logging
from two_processes import leave

import isqtorch
from isqtorch.integrations.transformers import shards

FOLDER = Path(sys.argv[1])
FORMAT = "q8_0"  # blocks of 32, which also the narrow layers of a tiny model can be cut at
IDS = torch.arange(24)[None] * 37 % 500


def load(name: str, distributed: dict[str, Any] | None = None, config: isqtorch.IsqConfig | None = None) -> Any:
    parallel = {} if distributed is None else {"distributed_config": DistributedConfig(**distributed)}
    packing = {} if config is None else {"quantization_config": config}
    return AutoModelForCausalLM.from_pretrained(FOLDER / name, **parallel, **packing).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


def distance(model: Any, alone: Any) -> float:
    """Relative difference of the logits to those of the same model in one process."""
    expected = logits(alone)
    return float((logits(model) - expected).norm() / expected.norm())


def tokens(model: Any) -> list[int]:
    return model.generate(IDS[:, :6], max_new_tokens=6, do_sample=False)[0].tolist()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def same_bytes(model: Any, alone: Any) -> bool:
    """Whether the shares of all processes together are the weights that one process packs."""
    expected = alone.state_dict()
    return all(torch.equal(whole(value), expected[name]) for name, value in model.state_dict().items())


def tensor_parallel() -> dict[str, Any]:
    alone = load("llama", config=isqtorch.IsqConfig(FORMAT))
    model = load("llama", {"tp_size": 2}, isqtorch.IsqConfig(FORMAT))
    weight = model.model.layers[0].mlp.down_proj.weight
    result = {
        "distance": distance(model, alone),
        "tokens": [tokens(model), tokens(alone)],
        "same bytes": same_bytes(model, alone),
        "share": weight.to_local().shape[1] / weight.shape[1],
    }
    model.save_pretrained(FOLDER / "llama-saved-by-two")
    dist.barrier()
    result["saved"] = torch.equal(logits(load("llama-saved-by-two")), logits(alone))
    return result


def tensor_parallel_packed() -> dict[str, Any]:
    alone = load("llama-packed")
    model = load("llama-packed", {"tp_size": 2})
    return {"distance": distance(model, alone), "same bytes": same_bytes(model, alone)}


def tensor_parallel_importance() -> dict[str, Any]:
    config = isqtorch.IsqConfig(
        "q4k", include="down_proj", imatrix=torch.load(FOLDER / "importance.pt", weights_only=True)
    )
    return {"same bytes": same_bytes(load("llama", {"tp_size": 2}, config), load("llama", config=config))}


def cut_blocks() -> dict[str, Any]:
    """Blocks of 256 in layers of 256 columns: for weights that are packed on the way, and for packed ones."""
    messages = []
    for name, config in (("llama", isqtorch.IsqConfig("q4k")), ("llama-q4k", None)):
        try:
            load(name, {"tp_size": 2}, config)
        except ValueError as error:
            messages.append(str(error))
    return {"messages": messages}


def fully_sharded_by_an_old_torch() -> dict[str, Any]:
    """For weights that are packed on the way, and for packed ones."""
    messages = []
    with mock.patch.object(shards, "FSDP_SINCE", "99.0"):
        for name, config in (("llama", isqtorch.IsqConfig(FORMAT)), ("llama-packed", None)):
            try:
                load(name, {"fsdp_size": 2}, config)
            except ValueError as error:
                messages.append(str(error))
    return {"messages": messages}


def fully_sharded() -> dict[str, Any]:
    alone = load("llama", config=isqtorch.IsqConfig(FORMAT))
    model = load("llama", {"fsdp_size": 2}, isqtorch.IsqConfig(FORMAT))
    mixed = load("llama", {"fsdp_size": 2, "fsdp_mixed_precision": True}, isqtorch.IsqConfig("q4k"))
    weight = model.model.layers[0].mlp.down_proj.weight
    return {
        "distance": distance(model, alone),
        "share": weight.to_local().shape[0] / weight.shape[0],
        "mixed": distance(mixed, load("llama", config=isqtorch.IsqConfig("q4k"))),
    }


def fully_sharded_training() -> dict[str, Any]:
    """An adapter's gradients when layers are spread, and when they are not."""
    from peft import LoraConfig, get_peft_model
    from torch.distributed.fsdp import fully_shard

    gradients = []
    for spread in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(load("llama-packed"), LoraConfig(target_modules=["q_proj", "down_proj"], r=4))
        if spread:
            for layer in model.base_model.model.model.layers:
                fully_shard(layer)
            fully_shard(model)
        model(input_ids=IDS, labels=IDS).loss.backward()
        named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and "lora_B" in name}
        gradients.append(torch.cat([whole(named[name]).flatten().float() for name in sorted(named)]))
    return {"distance": float((gradients[1] - gradients[0]).norm() / gradients[0].norm())}


def experts(distributed: dict[str, Any]) -> dict[str, Any]:
    alone = load("moe", config=isqtorch.IsqConfig(FORMAT))
    model = load("moe", distributed, isqtorch.IsqConfig(FORMAT))
    packed = load("moe-packed", distributed)
    weight = model.model.layers[0].mlp.experts.down_proj
    return {
        "distance": distance(model, alone),
        "tokens": [tokens(model), tokens(alone)],
        "same bytes": same_bytes(model, alone),
        "packed": distance(packed, load("moe-packed")),
        "share": weight.to_local().numel() / weight.numel(),
    }


SCENARIOS: dict[str, Callable[[], dict[str, Any]]] = {
    "tensor parallel": tensor_parallel,
    "tensor parallel, packed": tensor_parallel_packed,
    "tensor parallel, importance": tensor_parallel_importance,
    "cut blocks": cut_blocks,
    "fully sharded, old torch": fully_sharded_by_an_old_torch,
    "experts, expert parallel": lambda: experts({"tp_size": 2, "ep_size": 2}),
}
if torch.__version__ >= shards.FSDP_SINCE:  # which is also when DTensors can put merged gates together again
    SCENARIOS |= {
        "fully sharded": fully_sharded,
        "fully sharded, training": fully_sharded_training,
        "experts, tensor parallel": lambda: experts({"tp_size": 2}),
    }


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {}
    for name, scenario in SCENARIOS.items():
        results[name] = scenario()
        print(name, results[name], flush=True)
        dist.barrier()
    (FOLDER / f"results-{os.environ['RANK']}.json").write_text(json.dumps(results))
    leave()


if __name__ == "__main__":
    main()
