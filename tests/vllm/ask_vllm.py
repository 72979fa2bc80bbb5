"""Questions to vLLM, for the Python of its environment: `python ask_vllm.py QUESTIONS.json`.

    {"cases": [{"model": FOLDER, "settings": {...} for vllm.LLM, "prompts": [ids, ...], "new": 24, "adapter": FOLDER}, ...],
     "answers": FILE.json}

An answer has the tokens that greedy decoding adds to each prompt, without an adapter the logarithms of the probabilities of
each prompt's tokens after the first, what isqtorch logged, and, if the model runs in this process, what its layers are, and the
most bytes that float weights of packed layers took at once. A case that may fail ("fails": true) then has the text of its
"error" instead.
"""

import contextlib
import gc
import json
import logging
import os
import sys

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest


def watch():
    """Note the largest number of bytes that float weights of our layers take at once, while they are packed."""
    from isqtorch.integrations.vllm import experts, linear

    alive, peak = [], [0]

    def wrapped(method):
        create, process = method.create_weights, method.process_weights_after_loading

        def create_weights(self, layer, *args, **kwargs):
            create(self, layer, *args, **kwargs)
            alive.append(layer)

        def process_weights_after_loading(self, layer):
            weights = {id(each): each for one in alive for each in one.parameters() if each.dim() > 1}.values()
            floats = sum(w.nbytes for w in weights if not w.is_meta and w.dtype.is_floating_point)
            peak[0] = max(peak[0], floats)
            process(self, layer)

        method.create_weights, method.process_weights_after_loading = create_weights, process_weights_after_loading

    wrapped(linear.IsqLinearMethod)
    wrapped(experts.IsqExpertsMethod)
    return alive, peak


def describe(model):
    """What the layers are: {name: [method, {parameter: [type, bytes]}]}."""
    found = {}
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if method is not None:
            own = {each: [str(p.dtype), p.nbytes] for each, p in module.named_parameters(recurse=False)}
            found[name] = [type(method).__name__, own]
    return found


def ask(case, alive, peak):
    alive.clear()
    peak[0] = 0
    settings = {"enforce_eager": True, "max_model_len": 512, "max_num_seqs": 8, **case["settings"]}
    heard = []

    def hear(record):  # a filter: vLLM removes handlers when its first model sets up the log
        heard.append(record.getMessage())
        return True

    logging.getLogger("vllm.isqtorch").addFilter(hear)
    llm = None
    try:
        with contextlib.redirect_stdout(sys.stderr):
            llm = LLM(model=case["model"], **settings)
        adapter = None if case.get("adapter") is None else LoRARequest("adapter", 1, case["adapter"])
        wanted = None if adapter else 1  # of prompts; vLLM for CPUs fails if they are wanted of an adapter
        params = SamplingParams(temperature=0, max_tokens=case["new"], prompt_logprobs=wanted, ignore_eos=True)
        prompts = [{"prompt_token_ids": ids} for ids in case["prompts"]]
        outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=adapter)
        return {
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "logprobs": [
                [
                    step[token].logprob
                    for step, token in zip(output.prompt_logprobs, output.prompt_token_ids, strict=True)
                    if step
                ]
                for output in outputs
                if wanted
            ],
            "layers": llm.apply_model(describe)[0] if settings.get("tensor_parallel_size", 1) == 1 else None,
            "peak": peak[0],
            "log": "\n".join(heard),
        }
    except Exception as error:
        if case.get("fails"):
            return {"error": f"{type(error).__name__}: {error}", "log": "\n".join(heard)}
        raise
    finally:
        logging.getLogger("vllm.isqtorch").removeFilter(hear)
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def main(path):
    with open(path, encoding="utf-8") as file:
        asked = json.load(file)
    alive, peak = watch()
    answers = [ask(case, alive, peak) for case in asked["cases"]]
    with open(asked["answers"], "w", encoding="utf-8") as file:
        json.dump(answers, file)


if __name__ == "__main__":
    main(sys.argv[1])
