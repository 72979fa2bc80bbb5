"""refine_: tune the scales of a packed model so that it predicts what the float model predicts."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from isqtorch.formats import get_format
from isqtorch.formats.tunable import untunable
from isqtorch.importance.windows import Text
from isqtorch.modules import PackedModule, QuantLinear
from isqtorch.modules.parameter import is_plain, plain_bytes
from isqtorch.policy.inventory import check_model, packed_names, storage_key
from isqtorch.progress import progress_bar
from isqtorch.report.refinement import Refinement
from isqtorch.running import evaluating, run_model

from .lessons import OP, lessons, order
from .targets import Targets, logits_of
from .tuning import Scales, Tuned, Vector
from .vectors import remember

_LOOKS = 8  # times that the held-out windows are looked at
_WARM = 10  # steps until the step size is full; a quarter of few steps


def refine_(
    model: nn.Module,
    teacher: nn.Module | str | os.PathLike[str] | None = None,
    *,
    text: Text | None = None,
    tokenizer: Any = None,
    steps: int = 200,
    learning_rate: float = 1e-3,
    batch: int = 4,
    norms: bool = True,
    seed: int = 0,
    progress: bool | None = None,
) -> Refinement:
    """Tune the scales and offsets of a packed model so that it predicts what the float model predicts.

    The codes stay, so the model has the same size and the same formats, and files and kernels read it as before. The
    float model is only needed at the beginning: its predictions for all windows of the text are computed once. Then
    gradient steps lower the KL divergence from them. Scales are rounded to the types in which they are stored before
    each forward, so the divergence is that of the real model. Every eighth window is held out, and the step with the
    lowest divergence on these windows is kept. The model must not run elsewhere meanwhile.

    Linear layers are tuned, in all formats whose scales are real numbers: all but mxfp4 and q8_1. Experts, embeddings
    and heads that share a table with an embedding stay as they are; the report names them.

    Memory: the activations of `batch` windows of 256 tokens, 30 bytes for each scale and offset, 2 kB for each token of
    the text (at most 65,536 are read); and the float model if it is given as a module. From a checkpoint, its weights
    are read one by one in each forward.

    Args:
        model: a causal language model with packed layers; changed in place.
        teacher: the float model; or where its weights are: a folder, a .safetensors or a .gguf file. None: the
            checkpoint that the model was loaded from, as for `requantize_`.
        text: the text to learn from, as for `collect_imatrix`: a text, the path of a file, token ids `[T]`, windows of
            token ids `[S, T]`, or "self" to let the packed model write it.
        tokenizer: the tokenizer of the model, for a text or a text file.
        steps: number of gradient steps. A few hundred are enough; the best one is kept.
        learning_rate: how far a scale moves in one step at the beginning, as a share of itself. It falls to 0.
        batch: windows of one step.
        norms: also tune the vectors of norms. `requantize_` gives them the values from before again.
        seed: of the order of the windows. With the same seed the result is the same on the same device.
        progress: whether to show progress bars; None: if stderr is a terminal.

    Returns:
        The divergence on the held-out windows before and after, the step that was kept, and the layers that were left.
        If the process is interrupted, the model has the best scales that were found so far.

    Raises:
        TypeError: `model` is not an nn.Module.
        ValueError: the model has no packed layer that can be tuned, the arguments or the text are not valid, the float
            model is not known or has another vocabulary, or values are not finite.
        OSError: a file cannot be read.

    Example:
        float_model = copy.deepcopy(model)
        isqtorch.quantize_(model, "afq3")
        print(isqtorch.refine_(model, float_model, text=text, tokenizer=tokenizer, steps=50))
    """
    began = time.perf_counter()
    check_model(model, OP)
    if any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in model.modules()):
        raise ValueError(
            f"{OP}: the model is compiled, and compiled code does not see new gradients. Refine it before."
        )
    _check_numbers(steps, learning_rate, batch)
    scales, left = _tunable(model)
    learn, held, targets, held_targets, notes = lessons(model, teacher, text, tokenizer, steps, batch, progress)
    vectors = _vectors(model) if norms else {}
    originals = {name: vector.stored()[0] for name, vector in vectors.items()}
    layers = list(dict.fromkeys(scales.values()))  # several layers may share one weight
    tuned: list[Tuned] = [*layers, *vectors.values()]
    with evaluating(model), _forwards(model, scales), _gradients_for(model, vectors):
        before = _divergence(model, held, held_targets, batch)
        best = _Best(before, tuned)
        try:
            batches = order(len(learn), batch, seed)
            optimizer = torch.optim.Adam(
                [change for each in tuned for change in each.changes], lr=0.0, betas=(0.9, 0.99)
            )
            # f16 has no gradients below 6e-8
            boost = 1024.0 if any(parameter.dtype == torch.float16 for parameter in model.parameters()) else 1.0
            with progress_bar("refine", "step", progress, total=steps) as bar:
                for step in range(1, steps + 1):
                    rows = next(batches)
                    _step(
                        model,
                        learn[rows],
                        targets.rows(rows),
                        tuned,
                        optimizer,
                        learning_rate * _share(step, steps),
                        boost,
                    )
                    if step % max(1, steps // _LOOKS) == 0 or step == steps:
                        best.look(step, _divergence(model, held, held_targets, batch))
                        bar.set_postfix_str(f"KL {before:.4g} -> {best.value:.4g}", refresh=False)
                    bar.update()
        finally:
            best.put_back()
            remember(model, originals)
    return Refinement(
        before=before,
        after=best.value,
        steps=steps,
        kept=best.step,
        tokens=learn.numel(),
        held_tokens=held.numel(),
        layers=len(layers),
        norms=len(vectors),
        left=left,
        notes=notes,
        seconds=time.perf_counter() - began,
    )


def _check_numbers(steps: int, learning_rate: float, batch: int) -> None:
    """ValueError unless the numbers make sense."""
    for name, value in (("steps", steps), ("batch", batch)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{OP}: {name} must be an integer of 1 or more, got {value!r}")
    if isinstance(learning_rate, bool) or not isinstance(learning_rate, (int, float)) or not 0 < learning_rate <= 0.1:
        raise ValueError(f"{OP}: learning_rate must be a number above 0 and at most 0.1, got {learning_rate!r}")


# ---- what is tuned ---------------------------------------------------------------------------------------------------


def _tunable(model: nn.Module) -> tuple[dict[str, Scales], dict[str, str]]:
    """The scales of the weights that can be tuned, by the name of each layer; and the other packed layers with reasons."""
    names = packed_names(model)
    if not names:
        raise ValueError(f"{OP}: the model holds no packed layer. Use quantize_ first.")
    users: dict[object, list[str]] = {}
    left: dict[str, str] = {}
    for name in names:
        module = model.get_submodule(name)
        assert isinstance(module, PackedModule)
        for leaf in module.packed:
            weight = module._parameters[leaf]
            if weight is None or not is_plain(weight) or weight.device.type == "meta":
                raise ValueError(f"{OP}: {name} is offloaded or spread over processes. Refine the model before.")
        if isinstance(module, QuantLinear):
            users.setdefault(storage_key(plain_bytes(module.weight)), []).append(name)
        else:
            left[name] = "embeddings and experts are not tuned"
    tables = {
        storage_key(plain_bytes(cast(Tensor, module.weight)))
        for name in left
        if hasattr(module := model.get_submodule(name), "weight")
    }
    found: dict[str, Scales] = {}
    for key, layers in users.items():
        layer = model.get_submodule(layers[0])
        assert isinstance(layer, QuantLinear)
        fmt, packed = get_format(layer.format), plain_bytes(layer.weight)
        why = "it shares the table of an embedding" if key in tables else untunable(fmt)
        if why is None and not packed.is_contiguous():
            why = "its rows are not contiguous"
        if why is not None:
            left |= dict.fromkeys(layers, f"{fmt.name}: {why}" if why == untunable(fmt) else why)
            continue
        found |= dict.fromkeys(layers, Scales(packed.detach(), fmt))
    if not found:
        first = next(iter(left))
        raise ValueError(f"{OP}: no packed layer can be tuned; {first}: {left[first]}.")
    return found, left


@contextmanager
def _forwards(model: nn.Module, scales: dict[str, Scales]) -> Iterator[None]:
    """Let the layers give gradients in their scales."""
    layers = [(model.get_submodule(name), each) for name, each in scales.items()]
    try:
        for layer, each in layers:
            vars(layer)["forward"] = lambda x, layer=layer, each=each: each.product(x, layer.bias)
        yield
    finally:
        for layer, _ in layers:
            vars(layer).pop("forward", None)


def _vectors(model: nn.Module) -> dict[str, Vector]:
    """The vectors of the norms, by the names of the parameters."""
    found = {}
    for path, module in model.named_modules():
        if "Norm" not in type(module).__name__:
            continue
        for leaf, parameter in module.named_parameters(path, recurse=False):
            if parameter.ndim == 1 and parameter.is_floating_point() and is_plain(parameter):
                found[leaf] = Vector(parameter)
    return found


@contextmanager
def _gradients_for(model: nn.Module, vectors: Mapping[str, Vector]) -> Iterator[None]:
    """No parameter of the model gets a gradient but these; afterwards each has what it had before."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _, gradient in before:
            if gradient is not None:
                parameter.grad = None
            parameter.requires_grad_(False)
        for vector in vectors.values():
            vector.parameter.requires_grad_(True)
        yield
    finally:
        for parameter, wanted, gradient in before:
            parameter.requires_grad_(wanted)
            parameter.grad = gradient


# ---- steps -----------------------------------------------------------------------------------------------------------


def _share(step: int, steps: int) -> float:
    """The step size as a share of the largest: a short rise, then half a wave of a cosine down to 0."""
    return min(1.0, step / max(1, min(_WARM, steps // 4))) * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))


def _step(
    model: nn.Module,
    rows: Tensor,
    targets: Targets,
    tuned: Sequence[Tuned],
    optimizer: torch.optim.Optimizer,
    rate: float,
    boost: float,
) -> None:
    """One gradient step on some windows."""
    with torch.enable_grad():
        logits = logits_of(run_model(model, rows), rows, OP)
        _check_vocabulary(logits, targets)
        loss = targets.divergence(logits).mean()
    if not loss.requires_grad:
        raise ValueError(f"{OP}: no gradient reaches the logits. A part of the model runs without gradients.")
    if not bool(torch.isfinite(loss)):
        raise ValueError(
            f"{OP}: the divergence became {float(loss)}. Use a smaller learning_rate, or run the model in f32."
        )
    optimizer.zero_grad()
    loss.backward(torch.full_like(loss, boost))
    for each in tuned:
        each.take_gradient()
    for change in (change for each in tuned for change in each.changes):
        if change.grad is not None:
            change.grad /= boost
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    for each in tuned:
        each.write()


def _check_vocabulary(logits: Tensor, targets: Targets) -> None:
    """ValueError if the float model predicts tokens that the model does not have."""
    highest = int(targets.tokens.max())
    if highest >= logits.shape[-1]:
        raise ValueError(
            f"{OP}: the float model predicts token {highest}, and the model has {logits.shape[-1]} tokens: they are not the "
            "same model."
        )


def _divergence(model: nn.Module, rows: Tensor, targets: Targets, batch: int) -> float:
    """The mean divergence on windows."""
    total = 0.0
    with torch.no_grad():
        for index in torch.arange(len(rows)).split(batch):
            logits = logits_of(run_model(model, rows[index]), rows[index], OP)
            some = targets.rows(index)
            _check_vocabulary(logits, some)
            total += float(some.divergence(logits).double().sum())
    value = total / rows.numel()
    if not math.isfinite(value):
        raise ValueError(f"{OP}: the logits of the model are not finite. Run it in bf16 or f32.")
    return value


class _Best:
    """The scales with the lowest divergence so far."""

    def __init__(self, value: float, tuned: Sequence[Tuned]) -> None:
        self.tuned, self.value, self.step = tuned, value, 0
        self._stored = [each.stored() for each in tuned]

    def look(self, step: int, value: float) -> None:
        """Remember what the model has now, if it is better."""
        if value < self.value:
            stored = [each.stored() for each in self.tuned]  # an interrupt here keeps the one before
            self.value, self.step, self._stored = value, step, stored

    def put_back(self) -> None:
        for each, stored in zip(self.tuned, self._stored, strict=True):
            each.put_back(stored)
