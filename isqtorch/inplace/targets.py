"""What the float model predicts, as a packed model is refined against it: computed once, before anything changes.

Of each position only the most likely tokens are kept one by one, and the probability of all others together. The
divergence between two distributions that are merged in this way is a little smaller than that of the whole ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isqtorch.modules import PackedModule, QuantEmbedding, QuantExperts, QuantLinear
from isqtorch.modules.convert import name_of, to_float
from isqtorch.modules.parameter import plain_bytes
from isqtorch.policy.inventory import packed_names, storage_key
from isqtorch.progress import progress_bar
from isqtorch.running import Model, evaluating, run_model

from .vectors import originals, put_vectors
from .weights import Weights

TOKENS = 256
"""The most likely tokens that are kept of each position: 2 kB."""


@dataclass(frozen=True)
class Targets:
    """The predictions for windows of token ids.

    Attributes:
        tokens: int32 `[windows, T, k]`, the most likely tokens.
        log_p: f32 `[windows, T, k]`, their log-probabilities.
        rest: f32 `[windows, T]`, the log-probability of all other tokens; -inf: there are none.
    """

    tokens: Tensor
    log_p: Tensor
    rest: Tensor

    def rows(self, index: Tensor) -> Targets:
        """The predictions for some of the windows."""
        return Targets(self.tokens[index], self.log_p[index], self.rest[index])

    def divergence(self, logits: Tensor) -> Tensor:
        """KL(float model || model) of each position, in nats.

        Args:
            logits: `[windows, T, vocabulary]`, of the model.

        Returns:
            f32 `[windows, T]`, with gradients in the logits.
        """
        tokens = self.tokens.to(logits.device).long()
        log_p, rest = self.log_p.to(logits.device), self.rest.to(logits.device)
        logits = logits.float()
        norm = logits.logsumexp(-1)  # [windows, T]
        log_q = logits.gather(-1, tokens) - norm[..., None]
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        if logits.shape[-1] == tokens.shape[-1]:
            return kl
        others = logits.scatter(-1, tokens, -torch.inf).logsumexp(-1) - norm
        return kl + torch.where(rest > -torch.inf, rest.exp() * (rest - others), 0.0)


def predict(model: Model, windows: Tensor, batch: int, op: str, progress: bool | None) -> Targets:
    """Run the float model over windows and keep its predictions.

    Args:
        model: maps ids `[B, T]` to logits.
        windows: int64 `[windows, T]`.
        batch: windows of one forward.
        op: name of the calling function, for messages.
        progress: whether to show a progress bar; None: if stderr is a terminal.

    Raises:
        ValueError: the model gives no logits, or they are not finite.
    """
    found = []
    with evaluating(model):
        for rows in progress_bar("teach", "batch", progress, windows.split(batch)):
            logits = logits_of(run_model(model, rows), rows, op).float()
            if not bool(torch.isfinite(logits.amax(-1)).all()):
                raise ValueError(
                    f"{op}: the logits of the float model are not finite. Run it in bf16 or f32; or the checkpoint is damaged."
                )
            norm = logits.logsumexp(-1)
            top = logits.topk(min(TOKENS, logits.shape[-1]), dim=-1)
            others = logits.scatter_(-1, top.indices, -torch.inf).logsumexp(-1) - norm
            found.append((top.indices.int().cpu(), (top.values - norm[..., None]).cpu(), others.cpu()))
    return Targets(*(torch.cat(each) for each in zip(*found, strict=True)))


def logits_of(output: Any, ids: Tensor, op: str) -> Tensor:
    """The logits `[B, T, vocabulary]` in the output of a model for ids `[B, T]`.

    Raises:
        ValueError: there are none.
    """
    logits = output[0] if isinstance(output, (tuple, list)) else getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != ids.shape:
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"{op}: the model must return logits [{ids.shape[0]}, {ids.shape[1]}, vocabulary] for ids {list(ids.shape)}, got "
            f"{found}. Use a causal language model with its head."
        )
    return logits


@contextmanager
def in_floats(model: nn.Module, weights: Weights) -> Iterator[None]:
    """Let the packed layers of a model compute with the float weights of a checkpoint, and its norms as they were.

    Each layer reads its weight when it is called, and frees it afterwards. So no more than one float weight is in
    memory, and the whole checkpoint is read in every forward.
    """
    sharing: dict[object, list[str]] = {}  # the checkpoint may have a shared weight under any of its names
    layers: dict[PackedModule, dict[str, list[str]]] = {}
    for path in packed_names(model):
        module = model.get_submodule(path)
        assert isinstance(module, PackedModule)
        for leaf in module.packed:
            names = sharing.setdefault(storage_key(plain_bytes(getattr(module, leaf))), [])
            names.append(name_of(path, leaf))
            layers.setdefault(module, {})[leaf] = names
    own, before = dict(model.named_parameters()), originals(model)
    tuned = {name: own[name].detach().clone() for name in before}
    try:
        put_vectors(model, before)
        for layer, names_of in layers.items():
            vars(layer)["forward"] = _reader(layer, names_of, weights)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)
        put_vectors(model, tuned)
        weights.release()


def _reader(module: PackedModule, names: dict[str, list[str]], weights: Weights) -> Any:
    """The forward of the layer that `module` replaced, with weights that are read in each call."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        read = {leaf: _parameter(module, names[leaf], weights) for leaf in module.packed}
        if isinstance(module, QuantExperts):
            experts = module.to_float(read)
            vars(experts).pop("forward")  # this function: `to_float` copies what it finds
            return experts.forward(*args, **kwargs)
        assert isinstance(module, (QuantLinear, QuantEmbedding))
        return to_float(module, read["weight"]).forward(*args, **kwargs)

    return forward


def _parameter(module: PackedModule, names: list[str], weights: Weights) -> nn.Parameter:
    weight = weights.as_before(names)
    return nn.Parameter(weight.to(next(module.parameters(recurse=False)).device), requires_grad=False)
