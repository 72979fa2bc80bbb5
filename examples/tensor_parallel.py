"""One model on several devices or processes, each packing its share of every layer:

torchrun --nproc-per-node 2 examples/tensor_parallel.py MODEL q8_0 "Once upon a time"
"""

from __future__ import annotations

import os
import sys

import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

import isqtorch


def main(name: str, isq: str, prompt: str) -> None:
    processes = int(os.environ["WORLD_SIZE"])
    model = AutoModelForCausalLM.from_pretrained(
        name,
        quantization_config=isqtorch.IsqConfig(int(isq) if isq.isdigit() else isq),
        distributed_config=DistributedConfig(tp_size=processes),
    )
    tokenizer = AutoTokenizer.from_pretrained(name)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=30, do_sample=False)
    if dist.get_rank() == 0:
        print(tokenizer.decode(tokens[0], skip_special_tokens=True))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
