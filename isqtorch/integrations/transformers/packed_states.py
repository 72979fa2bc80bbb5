"""Packed keys or values as a tensor: attention reads the packed blocks, all other code gets floats.

What a cache returns goes through a model's own code before it reaches attention. So packed states are a tensor with the
shape and the type of the floats. Any function of torch that meets them computes with decoded floats; only
`scaled_dot_product_attention`, or the attention function "sdpa" of transformers, reads the blocks where it can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_map_only
from transformers import AttentionInterface

_FEW = 64  # queries that share keys: above, decoding whole heads for torch's attention is faster on a CPU


class PackedStates(Tensor):
    """Keys or values of a layer, `[B, heads, tokens, head_dim]`.

    Attributes:
        packed: uint8 `[B, heads, tokens, row_bytes]`. A row has zeros after its head_dim numbers up to whole blocks.
        format: name of the format.
    """

    packed: Tensor
    format: str

    @staticmethod
    def __new__(cls, packed: Tensor, format: str, head_dim: int, dtype: torch.dtype) -> PackedStates:
        self = Tensor._make_wrapper_subclass(cls, (*packed.shape[:3], head_dim), dtype=dtype, device=packed.device)
        self.packed, self.format = packed, format
        return self

    def floats(self) -> Tensor:
        """The decoded states."""
        coarse = torch.float32 if self.dtype == torch.float64 else self.dtype
        decoded: Tensor = torch.ops.isqtorch.dequantize(self.packed, self.format, coarse)
        return decoded[..., : self.shape[-1]].to(self.dtype)

    def part(self, index: tuple[Any, ...]) -> PackedStates | None:
        """`self[index]` without decoding, if the index has nothing but slices, and none of the numbers of a row."""
        if len(index) > 3 or not all(isinstance(i, slice) for i in index):
            return None
        return PackedStates(self.packed[index], self.format, self.shape[-1], self.dtype)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            out = _attended(*args, **kwargs)
            if out is not None:
                return out
        if func is Tensor.__getitem__ and isinstance(args[0], PackedStates):
            part = args[0].part(args[1] if isinstance(args[1], tuple) else (args[1],))
            if part is not None:
                return part
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        args, kwargs = tree_map_only(PackedStates, PackedStates.floats, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedStates({self.format}, {list(self.shape)}, {str(self.dtype).removeprefix('torch.')})"


def attend_packed() -> None:
    """Let the attention function "sdpa" of transformers read packed states as they are; once in a process.

    Its own way to share keys between heads copies them, which would decode them.
    """
    usual = AttentionInterface._global_mapping["sdpa"]
    if hasattr(usual, "_isqtorch_wrapped"):
        return

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
    ) -> tuple[Tensor, Tensor | None]:
        if isinstance(key, PackedStates) and not (settings.get("softcap") or settings.get("position_bias") is not None):
            causal = settings.get("is_causal")
            out = _attended(
                query,
                key,
                value,
                attention_mask,
                settings.get("dropout", 0.0),
                getattr(module, "is_causal", True) if causal is None else causal,
                scale=settings.get("scaling"),
                enable_gqa=True,
            )
            if out is not None:
                return out.transpose(1, 2).contiguous(), None
        return usual(module, query, key, value, attention_mask, **settings)  # type: ignore[no-any-return]

    attention._isqtorch_wrapped = usual  # type: ignore[attr-defined]
    AttentionInterface.register("sdpa", attention)


def _attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """`scaled_dot_product_attention` of packed keys and values; None: it needs floats."""
    if not isinstance(key, PackedStates) or not isinstance(value, PackedStates) or isinstance(query, PackedStates):
        return None
    if dropout_p or query.dim() != 4 or query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return None
    if query.shape[1] != key.shape[1] and not enable_gqa:
        return None
    if torch.is_grad_enabled() and (query.requires_grad or (attn_mask is not None and attn_mask.requires_grad)):
        return None  # the operator has no gradient
    if key.shape[:3] != value.shape[:3] or query.shape[0] != key.shape[0]:
        return None
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    queries, tokens = query.shape[2], key.shape[2]
    if attn_mask is None and is_causal and queries > 1:  # the last query sees all tokens
        seen = torch.ones(queries, tokens, dtype=torch.bool, device=query.device).tril(tokens - queries)
        attn_mask = seen[None, None]
    if attn_mask is not None:
        attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape))
        if attn_mask.dim() != 4 or attn_mask.shape[-1] != tokens:
            return None
    if query.device.type == "cpu" and queries * (query.shape[1] // key.shape[1]) > _FEW:
        return _by_heads(query, key, value, attn_mask, scale)
    columns = _columns(key)
    q = query if columns == query.shape[-1] else functional.pad(query, (0, columns - query.shape[-1]))
    out: Tensor = torch.ops.isqtorch.attention(
        q, key.packed, value.packed, key.format, value.format, float(scale), attn_mask
    )
    return out[..., : value.shape[-1]]


def _by_heads(query: Tensor, key: PackedStates, value: PackedStates, mask: Tensor | None, scale: float) -> Tensor:
    """Many queries: the floats of one head of keys and values at a time."""
    shared = query.shape[1] // key.shape[1]
    if mask is not None and mask.dtype not in (torch.bool, query.dtype):
        mask = mask.to(query.dtype)
    out = query.new_empty(*query.shape[:3], value.shape[-1])
    for b in range(query.shape[0]):
        for head in range(key.shape[1]):
            of_head = (slice(b, b + 1), slice(head, head + 1))
            keys, values = (PackedStates.part(states, of_head) for states in (key, value))
            assert keys is not None and values is not None
            heads = slice(head * shared, (head + 1) * shared)
            own = mask
            if own is not None:
                own = own[b : b + 1] if own.shape[0] > 1 else own
                own = own[:, heads] if own.shape[1] > 1 else own
            k, v = (states.floats().expand(-1, shared, -1, -1) for states in (keys, values))
            out[b : b + 1, heads] = functional.scaled_dot_product_attention(
                query[b : b + 1, heads], k, v, attn_mask=own, scale=scale
            )
    return out


def _columns(states: PackedStates) -> int:
    """The numbers in a packed row: head_dim up to whole blocks."""
    return -(-states.shape[-1] // 32) * 32
