"""Pack a model with feedback that is never in memory as floats: one decoder layer is read, fed, packed and freed at a time.

The hidden states of all windows are kept, and go from layer to layer. What else a layer gets (masks, positions) is seen
once, in a run of the model in which the layers do nothing. It must be the same for every window. Models that are built in
another way are a `Misfit`. The moments are those of the float model, so the bytes are those that `quantize_` makes.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from isqtorch.importance.collecting import MomentWatch
from isqtorch.importance.imatrix import importance_of
from isqtorch.importance.moments import Moments
from isqtorch.importance.windows import Windows
from isqtorch.modules.convert import owner_of, parameter_name, weight_matrix
from isqtorch.modules.packed import ordinary_tensors
from isqtorch.policy.layers import LayerInfo
from isqtorch.progress import progress_bar
from isqtorch.quantizers import scale_rule, uses_importance
from isqtorch.running import evaluating, run_model

from .pack import Job, naming_memory, pack_weight
from .prepare import Prepared
from .source import Source

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None  # glibc has it


class Misfit(ValueError):
    """A model that cannot run layer by layer. The message begins with the reason."""


class Streamed(NamedTuple):
    """What streaming gives.

    Attributes:
        prepared: the request; its jobs have importance, and the shelf has the moments of the head.
        packed: {name of a parameter: its packed bytes}, of all layers that were streamed.
    """

    prepared: Prepared
    packed: dict[str, Tensor]


@dataclass(frozen=True)
class _Call:
    """How a layer is called, besides its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Stopped(Exception):
    """Ends a run of the model before its layers or its head compute anything."""


def stream(
    model: nn.Module, source: Source, windows: Windows, prepared: Prepared, device: torch.device, progress: bool | None
) -> Streamed:
    """Pack the decoder layers of a model one by one.

    Args:
        model: with parameters on the meta device and real buffers; its layers are not replaced. It is of no use afterwards.
        source: the checkpoint.
        windows: the calibration text.
        prepared: the request, for a model with the same names.
        device: where the layers run and are packed.
        progress: whether to show a progress bar; None: if stderr is a terminal.

    Raises:
        Misfit: the model does not run layer by layer, or the checkpoint lacks a parameter.
        ValueError: a weight cannot be packed, or inputs of a layer are not finite.
        OSError: a file cannot be read.
    """
    path, layers = _decoder(model)
    head = next((layer for layer in prepared.inventory.layers if layer.role == "head" and layer.kind == "linear"), None)
    head_module = None if head is None else model.get_submodule(head.name)
    outside = [job for job in prepared.jobs if job.feedback is not None and not _inside(job, path)]
    strange = [job.names[0] for job in outside if head is None or head.name not in job.names]
    if strange:
        raise Misfit(f"{strange[0]} is outside of the layers {path}.*")
    packed: dict[str, Tensor] = {}
    jobs: list[Job] = []
    infos = {layer.name: layer for layer in prepared.inventory.layers}
    with ordinary_tensors(), evaluating(model):
        _read_rest(model, source, path, head_module, device)
        hidden, calls = _captured(model, layers, windows)
        bar = progress_bar("stream", "layer", progress, list(enumerate(layers)))
        for number, layer in bar:
            here = f"{path}.{number}"
            own = [job for job in prepared.jobs if _inside(job, here)]
            with naming_memory(prepared.request.op, here, "read and fed", "Nothing is loaded."):
                empty = _read(model, here, source, device)
                watch = MomentWatch(layer)
                with watch.running():
                    _feed(layer, hidden, calls[number], watch)
                moments = watch.moments(_source(model)).under(here)
            prepared.shelf.put(moments)
            for job in own:
                ready = _with_importance(job, moments, infos)
                with naming_memory(
                    prepared.request.op, job.names[0], f"packed in {job.fmt.name}", "Nothing is loaded."
                ):
                    try:
                        packed[parameter_name(model, job.names[0])] = pack_weight(
                            weight_matrix(*owner_of(model, job.names[0])).detach(), ready
                        )
                    except ValueError as fault:
                        raise ValueError(f"{prepared.request.op}: {job.names[0]}: {fault}") from None
                    job.watch.finish()  # it holds the weight
                jobs.append(ready)
            prepared.shelf.put(None)
            del watch, moments
            _restore(model, empty)
            source.release()
            if _trim is not None:  # packed weights lie between large blocks that are free now; the holes would add up
                _trim(0)
        rest = [job for job in prepared.jobs if not _inside(job, path)]
        if head is not None and head_module is not None:
            moments = _of_head(model, layers, head, head_module, hidden, windows, any(job.feedback for job in rest))
            prepared.shelf.put(moments)
            rest = [_with_importance(job, moments, infos) for job in rest]
    order = {job.names: number for number, job in enumerate(prepared.jobs)}
    jobs = sorted([*jobs, *rest], key=lambda job: order[job.names])
    done = replace(prepared, jobs=jobs, imatrix=_source(model))
    return Streamed(done, packed)


def _source(model: nn.Module) -> str:
    return f"calibration of {type(model).__name__}"


def _inside(job: Job, path: str) -> bool:
    return all(name.startswith(f"{path}.") for name in job.names)


def _with_importance(job: Job, moments: Moments, infos: dict[str, LayerInfo]) -> Job:
    """A job with the importance that is known now."""
    layers = [infos[name] for name in job.names]
    importance = importance_of(moments, layers, layers[0].shape)
    rule = None if importance is None else scale_rule(job.fmt)
    uses = job.feedback is not None or uses_importance(job.fmt, rule)
    return replace(job, importance=importance if uses else None, rule=rule)


# ---- the parts of the model ------------------------------------------------------------------------------------------


def _decoder(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of layers that holds most of the model's weights, and its path."""
    found: tuple[int, str, nn.ModuleList] | None = None
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len({type(layer) for layer in module}) == 1:
            size = sum(parameter.numel() for parameter in module.parameters())
            if found is None or size > found[0]:
                found = size, path, module
    if found is None:
        raise Misfit(f"{type(model).__name__} has no list of layers of one class")
    return found[1], found[2]


def _read(model: nn.Module, path: str, source: Source, device: torch.device) -> list[tuple[nn.Module, str, Any]]:
    """Read the parameters and saved buffers of a part of the model. Returns what was in their places."""
    before: list[tuple[nn.Module, str, Any]] = []
    for prefix, module in model.get_submodule(path).named_modules(prefix=path):
        _read_own(module, prefix, source, device, before)
    return before


def _read_own(
    module: nn.Module, path: str, source: Source, device: torch.device, before: list[tuple[nn.Module, str, Any]]
) -> None:
    """Read the tensors that a module itself holds."""
    for leaf, parameter in list(module._parameters.items()):
        if parameter is None or parameter.device.type != "meta":
            continue
        name = f"{path}.{leaf}" if path else leaf
        value = source.read(name)
        if value is None or value.shape != parameter.shape:
            raise Misfit(f"{source.where} has no {name} of the model's shape")
        before.append((module, leaf, parameter))
        value = value.to(device, parameter.dtype, copy=True)
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    for leaf, buffer in list(module._buffers.items()):
        if buffer is None:
            continue
        value = None if leaf in module._non_persistent_buffers_set else source.read(f"{path}.{leaf}" if path else leaf)
        module._buffers[leaf] = (buffer if value is None else value.to(buffer.dtype, copy=True)).to(device)


def _restore(model: nn.Module, before: list[tuple[nn.Module, str, Any]]) -> None:
    for module, leaf, parameter in before:
        module._parameters[leaf] = parameter


def _read_rest(model: nn.Module, source: Source, path: str, head: nn.Module | None, device: torch.device) -> None:
    """Read everything outside of the layers, except for the head."""
    for name, module in model.named_modules():
        if module is not head and not name.startswith(f"{path}."):
            _read_own(module, name, source, device, [])
    source.release()


# ---- running ---------------------------------------------------------------------------------------------------------


@contextmanager
def _instead(layers: Sequence[nn.Module], forward: Callable[[int, Tensor, _Call], Any]) -> Iterator[None]:
    """Call a function in the place of each layer, with its number, its hidden states, and what else it gets."""

    def replaced(number: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            rest = dict(kwargs)
            states = args[0] if args else rest.pop("hidden_states", None)
            if not isinstance(states, Tensor):
                raise Misfit("its layers get no hidden states as their first argument")
            return forward(number, states, _Call(args[1:], rest))

        return call

    try:
        for number, layer in enumerate(layers):
            vars(layer)["forward"] = replaced(number)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _captured(model: nn.Module, layers: nn.ModuleList, windows: Windows) -> tuple[list[Tensor], list[_Call]]:
    """The hidden states before the first layer, of every window, and how each layer is called."""
    try:
        return _captured_as(model, layers, windows, lambda states: states)
    except Misfit as misfit:
        first = misfit
    try:
        return _captured_as(model, layers, windows, lambda states: (states,))  # layers of some models return tuples
    except Misfit:
        raise first from None


def _captured_as(
    model: nn.Module, layers: nn.ModuleList, windows: Windows, result: Callable[[Tensor], Any]
) -> tuple[list[Tensor], list[_Call]]:
    hidden: list[Tensor] = []
    calls: list[_Call] = []
    last: list[Tensor] = []
    run: list[int] = []  # the layers that have been called in this window

    def forward(number: int, states: Tensor, call: _Call) -> Any:
        if number == 0:
            hidden.append(states.detach().clone())
            last[:], run[:] = [states], []
        if number != len(run):
            raise Misfit("its layers do not follow each other")
        run.append(number)
        if len(hidden) == 1:
            calls.append(call)
        elif not _same(calls[number], call):
            raise Misfit("its layers are called in another way for each window")
        if states is not last[0]:
            raise Misfit("it changes the hidden states between its layers")
        if number == len(layers) - 1:
            raise _Stopped
        return result(states)

    with _instead(list(layers), forward):
        for ids in windows.ids:
            try:
                run_model(model, ids[None])
            except _Stopped:
                continue
            except Misfit:
                raise
            except Exception as error:  # of any kind: the code between the layers expects other results
                raise Misfit(f"it does not run layer by layer ({type(error).__name__}: {str(error)[:200]})") from error
            raise Misfit("not all of its layers run")
    return hidden, calls


def _feed(layer: nn.Module, hidden: list[Tensor], call: _Call, watch: MomentWatch) -> None:
    """Run a layer over all windows. Its outputs take the place of its inputs."""
    for number, states in enumerate(hidden):
        with watch.tokens.window(states.shape[1]):
            out = layer(states, *call.args, **call.kwargs)
        hidden[number] = (out[0] if isinstance(out, tuple) else out).detach()


def _of_head(
    model: nn.Module,
    layers: nn.ModuleList,
    head: LayerInfo,
    module: nn.Module,
    hidden: list[Tensor],
    windows: Windows,
    full: bool,
) -> Moments:
    """The moments of the head's input; only its importance unless `full`."""
    above, _, leaf = head.name.rpartition(".")
    watch = MomentWatch(nn.ModuleDict({leaf: module}), None if full else ())
    at = iter(hidden)

    def forward(number: int, states: Tensor, call: _Call) -> Any:
        return next(at) if number == len(layers) - 1 else states

    def stop(*_: Any) -> None:
        raise _Stopped

    with watch.running(), _instead(list(layers), forward):
        handle = module.register_forward_pre_hook(stop)  # after the hook of the watch
        try:
            for ids in windows.ids:
                with watch.tokens.window(ids.shape[0]):
                    try:
                        run_model(model, ids[None])
                    except _Stopped:
                        continue
                raise Misfit(f"it does not call {head.name}")
        finally:
            handle.remove()
    moments = watch.moments(_source(model))
    return moments.under(above) if above else moments


def _same(one: Any, other: Any) -> bool:
    """Whether two calls, or values of them, are equal."""
    if isinstance(one, _Call):
        return isinstance(other, _Call) and _same(one.args, other.args) and _same(one.kwargs, other.kwargs)
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape and bool(torch.equal(one, other))
    if isinstance(one, dict):
        return (
            isinstance(other, dict) and one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
        )
    if isinstance(one, (tuple, list)):
        return isinstance(other, type(one)) and len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and (one is other or (isinstance(one, (bool, int, float, str)) and one == other))
