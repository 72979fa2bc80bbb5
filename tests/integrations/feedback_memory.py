"""Load a model with feedback in a fresh process: `python feedback_memory.py FOLDER TEXT`. Prints what it took, as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `benchmarks`

from benchmarks.models.memory import Peak


class Words:
    """A tokenizer of one token per character."""

    def encode(self, text: str) -> list[int]:
        return [1 + ord(letter) % 60 for letter in text]


def measure(folder: str, text: str) -> dict[str, int]:
    import transformers.models.llama.modeling_llama  # noqa: F401  (its import is not part of loading)
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    import isqtorch

    logging.disable_progress_bar()
    config = isqtorch.IsqConfig("q4_0", rule="feedback", calibration_file=text, tokenizer=Words())
    with Peak() as memory:
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    size = sum(parameter.nbytes for parameter in model.parameters())
    fed = sum(layer.feedback is not None for layer in model.isq_report.layers)
    return {"size": size, "peak_anonymous": memory.peak["anonymous"], "peak": memory.peak["total"], "fed": fed}


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
