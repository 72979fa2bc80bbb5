"""Ask vLLM about a folder. It runs in another process, with the Python of its environment, on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
ASK = Path(__file__).resolve().parent / "ask_vllm.py"
DEMO = ROOT / "examples/demo_model/model"
PYTHON = "ISQTORCH_VLLM"
"""Environment variable: the Python that has vLLM. `make test-vllm` sets it."""
NEW = 24  # tokens that are added to each prompt
TIE = 0.005  # of two logarithms of probabilities: kernels that add in another order decide between these two tokens
_LAST_BITS = (1e-6, -1e-6, 3e-6, -3e-6)  # changes of embeddings; linear layers round their inputs, so they grow


@dataclass
class Answer:
    """What a model answers; see `ask_vllm.py`.

    Attributes:
        tokens: those that greedy decoding adds to each prompt.
        logprobs: of the tokens of each prompt, after the first.
        gaps: how far the best token is from the second, for each of `tokens`; only of transformers.
        noise: how far a gap moves at most, for each prompt, if the last bits of the embeddings are others; as `gaps`.
        drift: how far the logarithms of the probabilities of the prompts' tokens move in the mean then; as `gaps`.
        layers: {path: [method, {parameter: [type, bytes]}]}; only of vLLM in one process.
        peak: bytes of the float weights of packed layers at once; only of vLLM.
        log: what isqtorch logged in vLLM.
        error: why vLLM failed, if it was allowed to.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    gaps: list[list[float]]
    layers: dict[str, Any]
    noise: list[float] = field(default_factory=list)
    drift: float = 0.0
    peak: int = 0
    log: str = ""
    error: str = ""

    def methods(self) -> set[str]:
        """The methods of the layers that isqtorch has packed."""
        return {method for method, _ in self.layers.values() if method.startswith("Isq")}


def environment(processes: int = 1) -> dict[str, str]:
    """Variables for vLLM: it finds the plug-in in this checkout, and no other plug-in. `processes`: 1 or 2, with a core each."""
    cores = sorted(os.sched_getaffinity(0))
    return {
        **os.environ,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        **({"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"} if processes == 2 else {}),
        "PYTHONPATH": str(ROOT),
        "VLLM_PLUGINS": "isqtorch",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def python() -> str:
    """The Python that has vLLM."""
    found = os.environ.get(PYTHON)
    assert found, f"{PYTHON} must be the path of a Python with vLLM: run `make test-vllm`"
    return found


def case(folder: Path, prompts: Sequence[Sequence[int]], **settings: Any) -> dict[str, Any]:
    """A question: a folder, prompts, and settings of `vllm.LLM`; "adapter" and "fails" are none of these."""
    own = {key: settings.pop(key) for key in ("adapter", "fails") if key in settings}
    given = {"dtype": "float32", **settings}
    return {"model": str(folder), "settings": given, "prompts": [list(each) for each in prompts], "new": NEW, **own}


def online(isq: Any, **options: Any) -> dict[str, Any]:
    """Settings that pack a model while it is loaded."""
    entry = {"quant_method": "isq", "isq": isq, **options}
    return {"quantization": "isq", "hf_overrides": {"quantization_config": entry}}


def ask_vllm(cases: Sequence[dict[str, Any]], processes: int = 1) -> list[Answer]:
    """The answers of one process, one case after another; an AssertionError with its last lines if it fails."""
    with tempfile.TemporaryDirectory() as scratch:
        answers, questions = Path(scratch, "answers.json"), Path(scratch, "questions.json")
        questions.write_text(json.dumps({"cases": list(cases), "answers": str(answers)}), encoding="utf-8")
        done = subprocess.run(
            [python(), str(ASK), str(questions)],
            capture_output=True,
            text=True,
            timeout=3300,  # less than that of a test; a machine may be busy
            check=False,
            env=environment(processes),
        )
        assert done.returncode == 0, f"vLLM failed:\n{done.stderr[-4000:]}"
        found = json.loads(answers.read_text(encoding="utf-8"))
    empty = {"tokens": [], "logprobs": [], "gaps": [], "layers": {}}
    return [Answer(**{**empty, **each, "layers": each.get("layers") or {}}) for each in found]


@torch.no_grad()
def transformers_answer(model: Any, prompts: Sequence[Sequence[int]]) -> Answer:
    """The same of transformers, with the packed layers of isqtorch."""
    answer = Answer([], [], [], {})
    drifts: list[list[float]] = [[] for _ in _LAST_BITS]
    for ids in prompts:
        out = model.generate(
            torch.tensor([list(ids)]), max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        steps = model(out).logits[0].float().log_softmax(-1)
        best = steps[len(ids) - 1 : -1].topk(2)
        gaps = best.values[:, 0] - best.values[:, 1]
        places, following = list(range(len(ids) - 1)), list(ids[1:])
        noise = 0.0
        for change, drift in zip(_LAST_BITS, drifts, strict=True):
            other = _with_other_bits(model, out, change)
            pair = other[len(ids) - 1 : -1].gather(1, best.indices)
            noise = max(noise, float((pair[:, 0] - pair[:, 1] - gaps).abs().max()))
            drift += (other - steps)[places, following].abs().tolist()
        answer.tokens.append(out[0, len(ids) :].tolist())
        answer.logprobs.append(steps[places, following].tolist())
        answer.gaps.append(gaps.tolist())
        answer.noise.append(noise)
    answer.drift = max(sum(drift) / len(drift) for drift in drifts)
    return answer


def _with_other_bits(model: Any, tokens: torch.Tensor, change: float) -> torch.Tensor:
    """The logarithms of probabilities after embeddings that differ by this part of their values."""
    hook = model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output * (1 + change))
    try:
        found: torch.Tensor = model(tokens).logits[0].float().log_softmax(-1)
    finally:
        hook.remove()
    return found


def difference(found: Answer, expected: Answer) -> float:
    """The mean difference of the logarithms of the probabilities of the prompts' tokens."""
    pairs = [
        abs(a - b)
        for one, other in zip(found.logprobs, expected.logprobs, strict=True)
        for a, b in zip(one, other, strict=True)
    ]
    return sum(pairs) / len(pairs)


def assert_same_tokens(found: Answer, expected: Answer) -> None:
    """The same tokens, until two are equally likely: what comes after another token is another text.

    Two tokens are equally likely if the model alone would choose between them by the last bits of its embeddings.
    """
    for own, other, gaps, noise in zip(found.tokens, expected.tokens, expected.gaps, expected.noise, strict=True):
        assert len(own) == len(other) == NEW
        split = next((i for i in range(NEW) if own[i] != other[i]), None)
        if split is None:
            continue
        told = f"token {split} by {gaps[split]:.4f}, where gaps move by {noise:.4f}: {own} instead of {other}"
        assert gaps[split] < noise + TIE, told
        print(f"equally likely: {told}")


def assert_close(found: Answer, expected: Answer) -> None:
    """The probabilities of the prompts' tokens differ no more than by the last bits of the model's numbers."""
    off = difference(found, expected)
    assert off < 2 * expected.drift + 0.001, f"{off:.5f} in the mean, where last bits make {expected.drift:.5f}"
