"""The curvature of the KL divergence in every weight of a model. It makes errors in different layers comparable.

To second order, KL(model || model with W + dW) = 1/2 dW^T F dW. F is the Fisher information: the mean of s s^T over
labels that are drawn from the model's own predictions, where s is the gradient of their log-likelihood in W. Only the
diagonal of F is kept, because rounding errors are nearly independent. The diagonal is approximated by its sums over
rows and columns:

    F[n, k] = R[n] C[k] / sum(R)        R[n] = sum over k of s[n, k]^2,  C[k] = sum over n of s[n, k]^2

One forward and one backward pass per chunk of text give it for all layers, including tied weights and fused experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from isqtorch.importance.windows import Text, Windows, read_calibration_text, token_windows
from isqtorch.modules.convert import locate, upright
from isqtorch.modules.packed import ordinary_tensors
from isqtorch.progress import progress_bar
from isqtorch.running import bos_token, context_length, evaluating, run_model, token_ids

from .sensitivity import Weighing

CHUNK = 256  # tokens of one backward pass, whose activations are all in memory
CHUNKS = 8


def measure_curvature(
    model: nn.Module,
    names: Sequence[str],
    tokenizer: Any,
    text: Text,
    *,
    progress: bool | None = None,
) -> dict[str, Weighing]:
    """Measure the weighing "kl": it turns the errors of a weight into the KL divergence they cause, in nats per token.

    The model runs in eval mode on chunks that are spread evenly over the text. Memory: the activations of one chunk and
    the gradient of one weight. `requires_grad` and `grad` of all parameters are restored afterwards. The result is
    deterministic: labels are drawn with a separate generator with a fixed seed.

    Args:
        model: a float causal language model that can run on its device.
        names: names of the weights as in reports; of tied weights any name.
        tokenizer: the tokenizer of the model; may be None if `text` is token ids.
        text: as for `collect_imatrix`.
        progress: whether to show a progress bar; None: if stderr is a terminal.

    Returns:
        The weighing of each weight, by name; without weights whose gradient is zero.

    Raises:
        ValueError: the text is too short, the model returns no logits or no gradients, or the gradients are not finite.
        OSError: the file cannot be read.
    """
    chunks = _chunks(model, tokenizer, text)
    meters = {name: _Meter() for name in names}
    generator = torch.Generator().manual_seed(0)
    with evaluating(model), torch.enable_grad(), _watched(model, meters):
        for chunk in progress_bar("probe", "chunk", progress, chunks):
            _sampled_loss(model, chunk[None], generator).backward()
    tokens = chunks.numel()
    found = {name: weighing for name, meter in meters.items() if (weighing := meter.weighing(name, tokens)) is not None}
    if not found:
        raise ValueError("probe: no gradient reached any weight; the model must be made of differentiable layers")
    return found


def _chunks(model: nn.Module, tokenizer: Any, text: Text) -> Tensor:
    """Chunks that are spread evenly over a text or over windows, int64 `[chunks, tokens]`."""
    longest = context_length(model)
    most = CHUNK if longest is None else min(CHUNK, longest)
    if isinstance(text, Windows) or (isinstance(text, Tensor) and text.ndim == 2 and len(text) > 1):
        rows = token_windows(model, text, tokenizer, "probe").ids
        return rows[torch.linspace(0, len(rows) - 1, min(CHUNKS, len(rows))).long(), :most]
    content, _ = read_calibration_text(text)
    ids, bos = token_ids(content, tokenizer, "probe"), bos_token(tokenizer)
    size = min(most, len(ids))
    if size < 2:
        raise ValueError(f"probe: {len(ids)} tokens are too few to measure with. Use a longer text.")
    starts = torch.linspace(0, len(ids) - size, min(CHUNKS, len(ids) // size)).long().tolist()
    chunks = torch.stack([ids[start : start + size] for start in starts])
    if bos is not None:
        chunks[:, 0] = bos  # as in calibration; the labels are sampled, so no target is lost
    return chunks


def _sampled_loss(model: nn.Module, ids: Tensor, generator: torch.Generator) -> Tensor:
    """Sum over positions of the log-likelihood of labels that are drawn from the model's predictions."""
    output = run_model(model, ids)
    logits = output[0] if isinstance(output, (tuple, list)) else getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 3 or not logits.requires_grad:
        raise ValueError(
            "probe: the model must return logits [B, T, vocabulary] with gradients. Use a causal language model."
        )
    log_p = logits[0].float().log_softmax(-1)
    p = log_p.detach().exp().cpu()
    if not bool(torch.isfinite(p).all()):
        raise ValueError("probe: the model's logits are not finite. Run the model in bf16 or f32.")
    labels = torch.multinomial(p, 1, generator=generator)
    return log_p.gather(1, labels.to(log_p.device)).sum()


class _Meter:
    """Sums of squared gradients of one weight: by row and by column, f64 on the CPU."""

    def __init__(self) -> None:
        self.rows: Tensor | None = None  # [N] or [E, N]
        self.columns: Tensor | None = None  # [K] or [E, K]

    def add(self, gradient: Tensor) -> None:
        squares = gradient.float().square()
        rows, columns = squares.sum(-1).cpu().double(), squares.sum(-2).cpu().double()
        self.rows = rows if self.rows is None else self.rows.add_(rows)
        self.columns = columns if self.columns is None else self.columns.add_(columns)

    def weighing(self, name: str, tokens: int) -> Weighing | None:
        if self.rows is None or self.columns is None:
            return None
        total = self.rows.sum(-1, keepdim=True)  # [1] or [E, 1]
        if not bool(torch.isfinite(total).all()):
            raise ValueError(f"probe: the gradient of {name} is not finite. Run the model in bf16 or f32.")
        if not bool(total.any()):
            return None
        share = torch.where(total > 0, self.columns / total, 0.0)  # an expert that no token reached costs nothing
        return Weighing(self.rows / (2 * tokens), share)


@contextmanager
def _watched(model: nn.Module, meters: dict[str, _Meter]) -> Iterator[None]:
    """Compute gradients only for the weights with a meter, and free each gradient once it is added to its meter."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    handles = []
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        for name, meter in meters.items():
            path, leaf = locate(model, name)
            module = model.get_submodule(path)
            weight = module._parameters[leaf]
            assert weight is not None
            weight.requires_grad_(True)
            handles.append(weight.register_post_accumulate_grad_hook(_taker(module, meter)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, wanted, gradient in before:
            parameter.requires_grad_(wanted)
            parameter.grad = gradient


def _taker(module: nn.Module, meter: _Meter) -> Any:
    def take(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        with ordinary_tensors(), torch.no_grad():
            meter.add(upright(module, gradient))

    return take
