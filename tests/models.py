"""Small models with random weights, built without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from isqtorch import QuantLinear, quantize_

IDS = torch.arange(24).view(2, 12) % 60
"""Tokens for the language models."""

HIDDEN, INNER, EXPERTS = 64, 96, 5  # of FusedMoE


def tiny_llama(*, hidden: int = 256, tied: bool = False, layers: int = 2, dtype: torch.dtype = torch.bfloat16) -> Any:
    pytest.importorskip("transformers")  # a wheel is tried without it, too: Python 3.10
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def tiny_gpt2() -> Any:
    pytest.importorskip("transformers")
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=512, n_embd=256, n_layer=2, n_head=4, n_positions=128)
    return GPT2LMHeadModel(config).eval()


def tiny_bert() -> Any:
    pytest.importorskip("transformers")
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=512,
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=128,
    )
    return BertForMaskedLM(config).eval()


def tiny_moe(family: str = "Qwen3Moe") -> Any:
    """One layer of fused experts, 6 of 96 x 64, as `family` has them: Qwen3Moe, Mixtral or GptOss."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 64,
        "num_experts_per_tok": 2,
        "pad_token_id": 0,
    }
    if family == "GptOss":
        config = transformers.GptOssConfig(**sizes, num_local_experts=6)
    elif family == "Mixtral":
        config = transformers.MixtralConfig(**sizes, num_local_experts=6)
    else:
        config = transformers.Qwen3MoeConfig(**sizes, num_experts=6, moe_intermediate_size=96)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def linear(
    fmt: str = "q4k", *, rows: int = 24, columns: int = 512, bias: bool = True, dtype: torch.dtype = torch.float32
) -> QuantLinear:
    """A packed layer, always the same for the same arguments."""
    torch.manual_seed(0)
    return QuantLinear.from_float(nn.Linear(columns, rows, bias=bias, dtype=dtype), fmt)


def mlp(width: int = 256, depth: int = 3, *, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width, bias=bias) for _ in range(depth))).eval()


class MoEBlock(nn.Module):
    """A router, a list of experts and a shared expert, as models before transformers 5 write them."""

    def __init__(self, width: int = 256, experts: int = 4) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(experts))
        self.shared_experts = nn.Linear(width, width, bias=False)
        self.shared_expert_gate = nn.Linear(width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)  # [..., E]
        routed = torch.stack([expert(x) for expert in self.experts], dim=-1)  # [..., N, E]
        return (routed * weights[..., None, :]).sum(-1) + self.shared_experts(x) * self.shared_expert_gate(x).sigmoid()


class MoEModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, 256)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"attention": nn.Linear(256, 256), "mlp": MoEBlock()}) for _ in range(2)
        )
        self.lm_head = nn.Linear(256, 64, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer["mlp"](layer["attention"](x))
        return self.lm_head(x)


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 32, 3)
        self.norm = nn.BatchNorm2d(32)
        self.fc = nn.Linear(32 * 4, 64)
        self.small = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.adaptive_avg_pool2d(self.norm(self.conv(x)).relu(), 2).flatten(1)
        return self.small(self.fc(x).relu())


class Experts(nn.Module):
    """What a class with transformers' `use_experts_implementation` has, and the slow, obvious product."""

    def __init__(
        self,
        hidden: int = HIDDEN,
        inner: int = INNER,
        experts: int = EXPERTS,
        *,
        gate: bool = True,
        bias: bool = False,
        transposed: bool = False,
        norm: bool = False,
    ) -> None:
        super().__init__()
        self.has_gate, self.has_bias, self.is_transposed, self.has_post_expert_norm = gate, bias, transposed, norm
        self.is_concatenated, self._is_expert_parallel = True, False
        self.num_experts, self.act_fn, self.limit = experts, nn.SiLU(), 7.0
        shapes = {"gate_up_proj" if gate else "up_proj": (inner * (1 + gate), hidden), "down_proj": (hidden, inner)}
        for name, (rows, columns) in shapes.items():
            shape = (experts, columns, rows) if transposed else (experts, rows, columns)
            self.register_parameter(name, nn.Parameter(torch.randn(shape) * 0.1))
            if bias:
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(experts, rows)))
        if norm:
            self.post_expert_norm = nn.RMSNorm(hidden)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate).clamp(max=self.limit) * up

    def _product(self, name: str, x: Tensor, ids: Tensor) -> Tensor:
        w = getattr(self, name)[ids]  # [T, S, N, K]
        y = torch.einsum("tskn,tsk->tsn" if self.is_transposed else "tsnk,tsk->tsn", w, x)
        return y + getattr(self, f"{name}_bias")[ids] if self.has_bias else y

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        x = hidden_states[:, None].expand(*top_k_index.shape, -1)
        up = self._product("gate_up_proj" if self.has_gate else "up_proj", x, top_k_index)
        y = self._product("down_proj", self._apply_gate(up) if self.has_gate else self.act_fn(up), top_k_index)
        y = self.post_expert_norm(y) if self.has_post_expert_norm else y
        return (y * top_k_weights[..., None]).sum(1)


class FusedMoE(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(options.get("hidden", HIDDEN), options.get("experts", EXPERTS), bias=False)
        self.experts = Experts(**options)
        self.proj = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(2)
        return self.proj(self.experts(x, ids, weights))


def state_bytes(module: nn.Module) -> dict[str, bytes]:
    """The state dict as bytes, to compare exactly."""
    return {
        name: bytes(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        for name, tensor in module.state_dict().items()
        if tensor.numel()
    }


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def stored(model: nn.Module, folder: Path, name: str = "model.safetensors") -> Path:
    """The model's weights as its checkpoint."""
    save_file({key: value.clone() for key, value in model.state_dict().items()}, folder / name)
    return folder / name


def quantized(model: nn.Module, fmt: str | None, **options: Any) -> nn.Module:
    quantize_(model, fmt, **options)
    return model


def everything(model: nn.Module) -> tuple[Any, ...]:
    """What must not change when something fails: bytes, the very modules, and their own state."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return state_bytes(model), {n: id(m) for n, m in modules.items()}, {n: list(vars(m)) for n, m in modules.items()}
