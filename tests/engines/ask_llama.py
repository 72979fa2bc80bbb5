"""Questions to llama.cpp, for the Python of the engines: `python ask_llama.py QUESTIONS.json`, which names the answers' files.

    {"file": a GGUF file, "texts": [...], "ids": [[...], ...], "answers": FILE.json, "logits": FILE.npy}

The answers are the tokens of the texts, without and with special tokens, the chat template, and the numbers of special
tokens. The logits are those of all positions of all ids, one after another.
"""

import json
import sys

import numpy as np
from llama_cpp import Llama

F32 = 0


def main(path: str) -> None:
    with open(path, encoding="utf-8") as file:
        asked = json.load(file)
    model = Llama(
        asked["file"],
        n_ctx=1024,
        n_batch=1024,
        n_ubatch=1024,
        n_threads=1,
        n_threads_batch=1,
        n_gpu_layers=0,
        logits_all=True,
        vocab_only=not asked["ids"],
        type_k=F32,  # else keys and values are rounded to f16
        type_v=F32,
        flash_attn=False,
        verbose=bool(asked.get("verbose")),
    )
    answers = {
        "tokens": [model.tokenize(text.encode(), add_bos=False, special=True) for text in asked["texts"]],
        "with_special": [model.tokenize(text.encode(), add_bos=True, special=True) for text in asked["texts"]],
        "metadata": model.metadata,
        "bos": model.token_bos(),
        "eos": model.token_eos(),
        "vocabulary": model.n_vocab(),
    }
    logits = []
    for ids in asked["ids"]:
        model.reset()
        model.eval(ids)
        logits.append(np.array(model.scores[: len(ids)], dtype=np.float32))
    with open(asked["answers"], "w", encoding="utf-8") as file:
        json.dump(answers, file)
    if logits:
        np.save(asked["logits"], np.concatenate(logits))


if __name__ == "__main__":
    main(sys.argv[1])
