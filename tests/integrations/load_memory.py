"""Load a model in a fresh process and print what it took, as JSON: `python load_memory.py FOLDER [FORMAT] [SAVE_TO]`.

Memory is in bytes above the process after its imports: `peak` of everything resident, `peak_anonymous` of what is not a mapped
file. `size` is that of the loaded weights.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `benchmarks`

from benchmarks.models.memory import Peak


def measure(folder: str, fmt: str, save_to: str) -> dict[str, Any]:
    import transformers.models.llama.modeling_llama  # noqa: F401  (its import is not part of loading)
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    import isqtorch

    logging.disable_progress_bar()
    options = {"quantization_config": isqtorch.IsqConfig(fmt)} if fmt else {}
    with Peak() as memory:
        began = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
        seconds = time.perf_counter() - began
    if save_to:
        model.save_pretrained(save_to)
    size = sum(parameter.nbytes for parameter in model.parameters())
    peak = memory.peak
    return {"size": size, "seconds": seconds, "peak": peak["total"], "peak_anonymous": peak["anonymous"]}


if __name__ == "__main__":
    print(json.dumps(measure(*(sys.argv[1:] + ["", ""])[:3])))
