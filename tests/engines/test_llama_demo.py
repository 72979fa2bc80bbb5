"""The demo model in llama.cpp: the bytes are ours, the tokens are the tokenizer's, and the logits are close to ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from helpers import relative_error
from llama import ask
from torch import Tensor

import isqtorch
from isqtorch.modules import PackedModule

DEMO = Path(__file__).resolve().parent.parent.parent / "examples" / "demo_model"
TOKENS = 300


def load(dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=dtype).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO / "model")


@pytest.fixture(scope="module")
def text() -> str:
    return (DEMO / "heldout.txt").read_text(encoding="utf-8")[:6000]


@torch.no_grad()
def logits(model: Any, ids: list[int]) -> Tensor:
    return model(torch.tensor([ids])).logits[0].float()


def divergence(got: Tensor, want: Tensor) -> float:
    """Mean Kullback-Leibler divergence over the positions."""
    p, q = want.log_softmax(-1), got.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("isq", ["q8_0", "q4k", "q4k_m", "q2k", "iq4_nl", "iq4_xs", "mxfp4"])
def test_packed(isq: str, tokenizer: Any, text: str, tmp_path: Path) -> None:
    model = load()
    imatrix = None
    if isq == "q2k":
        calibration = (DEMO / "calibration.txt").read_text(encoding="utf-8")[:3000]
        imatrix = isqtorch.collect_imatrix(model, calibration, tokenizer, chunk=128, progress=False)
    isqtorch.quantize_(model, isq, imatrix=imatrix, progress=False)
    file = tmp_path / "model.gguf"
    isqtorch.export_gguf(model, file)
    same_bytes(model, file)
    ids = tokenizer(text)["input_ids"]
    answers = ask(file, [text], [ids[:TOKENS]])
    assert answers.tokens == [ids]
    assert divergence(answers.logits, logits(model, ids[:TOKENS])) < 0.002


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_not_packed(dtype: torch.dtype, tokenizer: Any, text: str, tmp_path: Path) -> None:
    """f32 differs by the order of sums. llama.cpp rounds activations to the type of the weights, which we do not."""
    ids = tokenizer(text)["input_ids"][:TOKENS]
    file = tmp_path / "model.gguf"
    isqtorch.export_gguf(load(dtype), file, tokenizer)
    error = relative_error(ask(file, ids=[ids]).logits, logits(load(), ids))
    assert error < {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype]


def test_what_the_file_says(tokenizer: Any, tmp_path: Path) -> None:
    model = load()
    isqtorch.quantize_(model, "q4k_m", progress=False)
    isqtorch.export_gguf(model, tmp_path / "model.gguf", tokenizer, name="My demo")
    answers = ask(tmp_path / "model.gguf", ["x"])
    assert answers.facts["bos"] == 0 and answers.facts["eos"] == 1 and answers.facts["vocabulary"] == 4096
    said = answers.facts["metadata"]
    assert said["general.name"] == "My demo"
    assert said["general.file_type"] == "15"
    assert said["tokenizer.ggml.pre"] == "gpt-2"


def same_bytes(model: Any, file: Path) -> None:
    """Every packed weight is in the file, byte for byte, by a reader that is not ours."""
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    seen = 0
    for path, module in model.named_modules():
        if not isinstance(module, PackedModule) or path == "lm_head":  # the head is tied
            continue
        name = names.get_name(path)
        rows = torch.from_numpy(stored[f"{name}.weight"].data.copy())
        count = heads.get(name.rpartition(".")[2])
        if count:  # the file alternates the halves of each head
            rows = rows.view(count, -1, 2, rows.shape[-1]).transpose(1, 2).reshape(rows.shape)
        assert stored[f"{name}.weight"].tensor_type.name.replace("_", "").lower() == module.format.replace("_", "")
        assert torch.equal(rows, module.state_dict()["weight"]), path
        seen += 1
    assert seen == 57 and "output.weight" not in stored
