"""Questions to mlx-lm, for the Python of the engines: `python ask_mlx.py QUESTIONS.json`.

    {"folder": a folder of a model, "ids": [[...], ...], "prompts": [...], "steps": 16, "decode": [paths of modules],
     "settings": {path: {"group_size", "bits", "mode"}}, "convert": {"group_size", "bits", "to": folder}, "answers": FILE.npz}

The answers are the logits of all ids ("logits0", ...), the tokens that greedy decoding adds to the prompts ("new0", ...),
and decoded weights under the paths of their modules. With "convert", the folder holds float weights of Hugging Face, and
mlx-lm quantizes them and writes a folder of its own.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model, load_tokenizer, quantize_model, save_config, save_model


def main(path):
    with open(path, encoding="utf-8") as file:
        asked = json.load(file)
    mx.set_default_device(mx.cpu)
    folder, answers = Path(asked["folder"]), {}
    model, config = load_model(folder)
    if asked.get("convert"):
        wanted = asked["convert"]
        model, config = quantize_model(model, config, wanted["group_size"], wanted["bits"])
        save_model(Path(wanted["to"]), model)
        save_config(config, Path(wanted["to"]) / "config.json")
    for number, ids in enumerate(asked.get("ids", ())):
        answers[f"logits{number}"] = np.array(model(mx.array([ids])).astype(mx.float32))[0]
    if asked.get("prompts"):
        tokenizer = load_tokenizer(folder)
        for number, prompt in enumerate(asked["prompts"]):
            ids, new, cache = tokenizer.encode(prompt), [], make_prompt_cache(model)
            for _ in range(asked["steps"]):
                new.append(int(mx.argmax(model(mx.array([new[-1:] or ids]), cache=cache)[0, -1])))
            answers[f"new{number}"] = np.array(new)
    stored = {}
    for file in folder.glob("model*.safetensors"):
        stored.update(mx.load(str(file)))
    for module in asked.get("decode", ()):
        parts = (stored.get(f"{module}.{leaf}") for leaf in ("weight", "scales", "biases"))
        answers[module] = np.array(mx.dequantize(*parts, **asked["settings"][module]).astype(mx.float32))
    np.savez(asked["answers"], **answers)


if __name__ == "__main__":
    main(sys.argv[1])
