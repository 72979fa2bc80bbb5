"""Run by torchrun with two processes: load FOLDER/float with half of the experts each, save FOLDER/two and the logits."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from two_processes import leave


def main(folder: Path) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    from isqtorch import IsqConfig
    from isqtorch.modules import QuantExperts

    dist.init_process_group("gloo")
    model = AutoModelForCausalLM.from_pretrained(
        folder / "float",
        dtype=torch.bfloat16,
        distributed_config=DistributedConfig(ep_size=2, tp_size=2),
        quantization_config=IsqConfig("q8_0", organization="moqe"),
    )
    stacks = [module.down_proj for module in model.modules() if isinstance(module, QuantExperts)]
    assert stacks and all(2 * stack.to_local().shape[0] == stack.shape[0] for stack in stacks), (
        "experts are not shared out"
    )
    with torch.no_grad():
        logits = model(torch.arange(12)[None]).logits
    logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
    model.save_pretrained(folder / "two")
    if dist.get_rank() == 0:
        torch.save(logits, folder / "logits.pt")
    dist.barrier()
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
