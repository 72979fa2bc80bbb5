"""Load a model in a fresh process and print what it took, as JSON: `python load_memory.py FOLDER [FORMAT] [SAVE_TO]`.

Memory is in bytes above the process after its imports: `peak` of everything resident, `peak_anonymous` of what is not a mapped
file, both sampled every few milliseconds. `size` is that of the loaded weights.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
import time
from typing import Any

FIELDS = {"VmRSS": "peak", "RssAnon": "peak_anonymous"}


def resident() -> dict[str, int]:
    with open("/proc/self/status", encoding="utf-8") as file:
        lines = dict(line.split(":", 1) for line in file)
    return {FIELDS[name]: int(lines[name].split()[0]) * 1024 for name in FIELDS}


class Sampler(threading.Thread):
    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.running = resident(), True

    def run(self) -> None:
        while self.running:
            for name, value in resident().items():
                self.peak[name] = max(self.peak[name], value)
            time.sleep(0.003)


def measure(folder: str, fmt: str, save_to: str) -> dict[str, Any]:
    import transformers.models.llama.modeling_llama  # noqa: F401  (its import is not part of loading)
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    import isqtorch

    logging.disable_progress_bar()
    options = {"quantization_config": isqtorch.IsqConfig(fmt)} if fmt else {}
    gc.collect()
    before, sampler = resident(), Sampler()
    sampler.start()
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    seconds = time.perf_counter() - began
    sampler.running = False
    sampler.join()
    if save_to:
        model.save_pretrained(save_to)
    size = sum(parameter.nbytes for parameter in model.parameters())
    peaks = {name: sampler.peak[name] - before[name] for name in before}
    after = {f"after_{name}": value - before[name] for name, value in resident().items()}
    return {"size": size, "seconds": seconds, **peaks, **after}


if __name__ == "__main__":
    print(json.dumps(measure(*(sys.argv[1:] + ["", ""])[:3])))
