"""Small models with random weights, built without a network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def tiny_llama(*, hidden: int = 256, tied: bool = False, layers: int = 2, dtype: torch.dtype = torch.bfloat16) -> Any:
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
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=512, n_embd=256, n_layer=2, n_head=4, n_positions=128)
    return GPT2LMHeadModel(config).eval()


def tiny_bert() -> Any:
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


def state_bytes(module: nn.Module) -> dict[str, bytes]:
    """The state dict as bytes, to compare exactly."""
    return {
        name: bytes(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        for name, tensor in module.state_dict().items()
        if tensor.numel()
    }
