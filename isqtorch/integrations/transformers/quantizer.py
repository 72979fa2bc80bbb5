"""The quantizer that transformers calls while it loads a model. The methods are in the order of the calls.

It overrides hooks of transformers' HfQuantizer, some of them private, and reads `_is_hf_initialized`. It breaks if
transformers changes them; test_transformers_load.py and test_transformers_save.py notice.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from isqtorch.formats import KEEP, get_format, mix_name
from isqtorch.inplace.dequantize import dequantize_
from isqtorch.inplace.origin import Origin
from isqtorch.inplace.pack import Job, naming_memory, pack_weight
from isqtorch.inplace.prepare import Prepared
from isqtorch.integrations.record import METHOD
from isqtorch.modules import PackedModule, QuantExperts
from isqtorch.modules.activations import permit, recorded_activations
from isqtorch.modules.convert import name_of, parameter_name
from isqtorch.modules.packed import ordinary_tensors
from isqtorch.modules.parameter import name_packed, plain_bytes
from isqtorch.modules.plausible import SWITCH, weight_fault
from isqtorch.ops.native import NATIVE_DEVICES
from isqtorch.policy.inventory import inspect_model, storage_key
from isqtorch.report.choice import Choice
from isqtorch.report.report import QuantReport

from .config import IsqConfig
from .experts import Matrix, pack_matrices, replaced
from .feeding import feed_while_loading
from .first_reading import choose_while_loading
from .mapped import MappedFiles, Pack
from .meter import Meter
from .shards import check_fully_sharded, check_shards, local_columns, mark_rows
from .skeleton import (
    describe_unloaded,
    offload_error,
    pack_on_meta,
    packed_formats,
    parents_of,
    prepare_on_cpu,
    restore,
    restore_activations,
    unpack_missing,
)
from .stored import Stack, StoredLoad

_NO_MEMORY = "Nothing is loaded. Free memory, or load the model onto a device with more of it."
_NEW = "newly initialized, not quantized: the checkpoint has no weight of its name and shape"


@dataclass
class _Load:
    """State while a float checkpoint is loaded."""

    prepared: Prepared
    origin: Origin
    files: MappedFiles
    jobs: dict[str, Job]  # name of the parameter -> how it is packed
    choice: Choice | None  # of "auto"
    meter: Meter | None  # set in the first reading of "auto"
    started: float = field(default_factory=time.perf_counter)
    misfits: set[str] = field(default_factory=set)  # parameters that have another shape in the checkpoint
    failure: Exception | None = None  # the first error; the loader would only log it
    stored: StoredLoad | None = None  # the weights that another program has quantized
    ready: dict[str, Tensor] = field(default_factory=dict)  # parameters that are packed already; see feeding.py

    def job(self, name: str) -> Job:
        """How a parameter is packed, or taken over."""
        kept = None if self.stored is None else self.stored.kept.get(name)
        return self.jobs[name] if kept is None else kept


@register_quantizer(METHOD)
class IsqHfQuantizer(HfQuantizer):  # type: ignore[misc]  # transformers is not typed
    """Packs weights as they are read, or prepares a model for weights that are already packed in the file."""

    quantization_config: IsqConfig

    def __init__(self, quantization_config: IsqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._load: _Load | None = None
        self._files = MappedFiles([])  # of the checkpoint that is loaded
        self._unchecked: nn.Module | None = None  # a model that may still be sharded over processes
        self.stored: dict[str, Any] | None = None  # the quantization_config of a checkpoint by another program

    # ---- before the weights ------------------------------------------------------------------------------------------

    def validate_environment(self, *_: Any, device_map: object = None, **__: Any) -> None:
        if self.pre_quantized and self.quantization_config.layers is None:
            raise ValueError(
                f"{METHOD}: the quantization_config in config.json has no 'layers', so it does not say what is packed. Save the model "
                "again with save_pretrained, or remove the entry if the weights are not packed."
            )
        if not self.pre_quantized and self.quantization_config.layers is not None:
            raise ValueError(
                "IsqConfig: 'layers' describes a saved model; to quantize one, give a format: IsqConfig(4)"
            )
        if not self.pre_quantized and isinstance(device_map, Mapping) and "disk" in device_map.values():
            raise offload_error()

    def _process_model_before_weight_loading(
        self, model: Any, device_map: object = None, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        check_fully_sharded(model)
        config = self.quantization_config
        self._unchecked = model
        files = [os.path.abspath(file) for file in checkpoint_files or [] if file.endswith(".safetensors")]
        self._files = MappedFiles(files)
        if self.pre_quantized:
            assert config.layers is not None, "checked by validate_environment"
            restore(model, config.layers, checkpoint_files or [])
            restore_activations(model, config.activations)
            return
        with torch.device("cpu"):  # transformers makes meta the default device here
            stored = None if self.stored is None else StoredLoad.open(model, self.stored, files)
        inventory, request, choice = describe_unloaded(model, device_map), config.request(), None
        if config.measuring is not None:
            request = config.measuring.auto.smallest()
        elif config.budget() is not None:
            request, choice = choose_while_loading(model, config, inventory, checkpoint_files, self.stored)
        elif stored is not None and mix_name(request.fmt) == KEEP:
            request = replace(request, assigned=stored.assigned(inventory))
        prepared, ready = prepare_on_cpu(inventory, request, feeds=config.feeds), dict[str, Tensor]()
        if config.feeds:
            prepared, ready = feed_while_loading(model, config.options, prepared, files)
        if stored is not None:
            stored.quantized.dropping(self._files.consume)
            if config.measuring is None:
                stored.keep(prepared.jobs)
        for message in prepared.warnings:
            warnings.warn(message, stacklevel=2)
        jobs, parents = {}, parents_of(model)
        for job in prepared.jobs:
            for name in job.names:
                pack_on_meta(model, name, job.fmt, parents)
                if stored is None or parameter_name(model, name) not in stored.kept:
                    jobs[parameter_name(model, name)] = job
        permit(model.modules(), request.options.activations)
        origin = Origin.made(files, None, config.request())
        self._load = _Load(prepared, origin, self._files, jobs, choice, config.measuring, stored=stored, ready=ready)

    # ---- weight by weight --------------------------------------------------------------------------------------------

    def _check_shards_once(self) -> None:
        """Check the shards when the first weight is loaded: only then is the model sharded."""
        model, self._unchecked = self._unchecked, None
        if model is not None:
            check_shards(model)

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        self._check_shards_once()
        return self._load is not None and param_name in self._load.jobs and param_name not in self._load.misfits

    def packs(self, model: Any, name: str) -> bool:
        """Whether a parameter becomes packed rows: of floats, or of blocks that the checkpoint has."""
        stored = None if self._load is None else self._load.stored
        return self.param_needs_quantization(model, name) or (stored is not None and name in stored.kept)

    def as_floats(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """The tensors of the files, with those of quantized weights replaced; see `StoredLoad`."""
        load = self._load
        return tensors if load is None or load.stored is None else load.stored.as_floats(tensors, load.jobs)

    def get_quantize_ops(self) -> Pack:
        return Pack(self._pack)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """The type to cast a tensor of the checkpoint to. A cast from or to packed bytes (uint8) is an error."""
        self._check_shards_once()
        stored = str(param.get_dtype()) if hasattr(param, "get_dtype") else str(param.dtype)
        is_bytes = stored in ("U8", "torch.uint8")
        if (dtype == torch.uint8 and not is_bytes) or (is_bytes and dtype is not None and dtype.is_floating_point):
            raise ValueError(
                f"{METHOD}: {converter.target_patterns[0]} is {stored} in the file, and {'not packed' if is_bytes else 'packed'} "
                "according to config.json. The checkpoint is damaged, or its files are of different models."
            )
        return super().get_new_dtype(converter, param, dtype)  # type: ignore[no-any-return]

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        conversions = super().update_weight_conversions(weight_conversions, model)
        return conversions if self._load is None else replaced(conversions)

    def pack_experts(self, model: Any, name: str, sources: Sequence[Sequence[Matrix]]) -> Tensor:
        """Pack the stack `name` from the matrices of its experts, which are read one at a time."""

        def packed(load: _Load) -> Tensor:
            job = load.job(name)
            shape = tuple(local(model.get_parameter(name)).shape)
            pieces = shape[0] * len(sources)

            def done(matrix: Tensor, expert: int) -> None:
                if load.meter is not None:
                    load.meter.add(job.names[0], matrix, expert, pieces)
                load.files.drop(matrix)

            with ordinary_tensors():
                return pack_matrices(sources, shape, job, done)

        return self._attempt(name, packed)

    def pack_turned(self, model: Any, name: str, read: Matrix) -> Tensor:
        """Pack the stack `name` from a float stack that the checkpoint may store transposed."""

        def packed(load: _Load) -> Tensor:
            weight = read()
            assert weight is not None, "a stack is never wholly on another rank"
            experts, rows, row_bytes = local(model.get_parameter(name)).shape
            as_it_is = (experts, rows, load.jobs[name].fmt.in_features(row_bytes))
            return _packed(load, model, name, weight if weight.shape == as_it_is else weight.transpose(1, 2))

        return self._attempt(name, packed)

    def _pack(self, model: Any, name: str, weight: Tensor | Stack) -> Tensor:
        """Pack one weight; the loader calls this for each."""
        if isinstance(weight, Stack):
            return self._pack_stack(model, name, weight)
        return self._attempt(name, lambda load: _packed(load, model, name, weight))

    def _pack_stack(self, model: Any, name: str, stack: Stack) -> Tensor:
        """Pack a stack of experts that is decoded one by one."""
        module = model.get_submodule(name.rpartition(".")[0])
        upright = stack.turned == module.is_turned()  # else its matrices are [K, N]
        experts = range(stack.weight.shape[0])
        return self.pack_experts(model, name, [[partial(stack.matrix, number, upright) for number in experts]])

    def _attempt(self, name: str, pack: Callable[[_Load], Tensor]) -> Tensor:
        load = self._load
        assert load is not None, "packing outside of a load"
        if name in load.ready:
            return load.ready.pop(name)
        if load.failure is None:
            job = load.job(name)
            try:
                with naming_memory("IsqConfig", job.names[0], f"packed in {job.fmt.name}", _NO_MEMORY):
                    return pack(load)
            except ValueError as error:
                load.failure = ValueError(f"IsqConfig: {name}: {error}")
            except Exception as error:
                load.failure = error
        return torch.empty(0, dtype=torch.uint8)  # after a failure nothing is packed; it is raised after loading

    # ---- after the weights -------------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        load, self._load = self._load, None
        name_packed(model)
        mark_rows(model)
        if load is None:
            with closing(self._files) as files:
                _check_loaded(model, files)
            model.isq_report = QuantReport.of_packed(inspect_model(model))
            return model
        if load.failure is not None:
            raise load.failure
        if "disk" in getattr(model, "hf_device_map", {}).values():
            raise offload_error()
        missing = unpack_missing(model)
        load.files.release(model)
        model.isq_report = _report(model, load, missing)
        if load.stored is not None:
            load.stored.explain(model.isq_report, load.prepared.inventory)
        if load.meter is None:
            for message in load.prepared.alarms:
                warnings.warn(message, stacklevel=2)
        load.origin.attach(model)
        record(model, self)
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """True: adapters can be trained. The packed weights do not change."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """Update the configuration: `save_pretrained` calls this before it writes config.json."""
        if not getattr(model, "_hf_peft_config_loaded", False):  # else only adapters are saved, with PEFT's paths
            record(model, self)
        return None, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        dequantize_(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        return model


def record(model: Any, quantizer: IsqHfQuantizer) -> None:
    """Write the packed layers and their formats into the model's configuration."""
    quantizer.quantization_config = quantizer.quantization_config.recorded(
        packed_formats(model), recorded_activations(model)
    )
    quantizer.pre_quantized = True
    model.config.quantization_config = quantizer.quantization_config


def _packed(load: _Load, model: Any, name: str, weight: Tensor) -> Tensor:
    path, _, leaf = name.rpartition(".")
    job, module = load.jobs[name], model.get_submodule(path)
    if isinstance(module, QuantExperts):
        matrix = weight.transpose(1, 2) if module.transposed and weight.dim() == 3 else weight
    else:
        matrix = weight if module.origin in (nn.Linear, nn.Embedding) else weight.t()
    target = local(module._parameters[leaf])
    if matrix.dim() != target.dim() or (*matrix.shape[:-1], job.fmt.row_bytes(matrix.shape[-1])) != target.shape:
        load.misfits.add(name)
        return weight  # the loader then reports the shape or initializes the layer anew
    with ordinary_tensors():
        source = (
            matrix if matrix.device.type in NATIVE_DEVICES else matrix.cpu()
        )  # packing on the CPU and copying is faster than the reference there
        importance, columns = None, slice(None)
        if job.importance is not None:
            columns = local_columns(module._parameters[leaf], job.fmt)
            importance = job.importance[..., columns]
        if load.meter is not None:
            load.meter.add(job.names[0], source)
        packed = pack_weight(source, job, importance, columns=columns)
        job.watch.finish()  # reads the weight, whose pages are dropped now
    load.files.drop(weight)
    return packed.to(weight.device)


def local(parameter: Any) -> Tensor:
    """This rank's part of a sharded parameter; any other parameter as it is."""
    part: Tensor = getattr(parameter, "_local_tensor", parameter)
    return part


def _check_loaded(model: Any, files: MappedFiles) -> None:
    """ValueError unless all packed layers got a weight, of their format, and layers that share one have the same.

    Samples of weights that are views of `files` are read from there, so that no pages become memory of this process.
    """
    first: dict[int, tuple[str, str]] = {}
    for path, module in model.named_modules():
        for leaf, format in module.packed.items() if isinstance(module, PackedModule) else ():
            name, weight = name_of(path, leaf), module._parameters[leaf]
            data = plain_bytes(weight)
            if data.device.type == "meta":  # offloaded
                continue
            if not getattr(weight, "_is_hf_initialized", False):
                raise ValueError(
                    f"{METHOD}: config.json says that {name} is packed as {format}, and the checkpoint has no weight of that shape. "
                    "It is damaged, or its files are of different models."
                )
            if id(weight) not in first:
                place = files.place(data)
                why = weight_fault(data, get_format(format), place)
                if place is None:
                    files.drop(data)
                if why is not None:
                    raise ValueError(
                        f"{METHOD}: config.json says that {name} is packed as {format}, and its bytes are not: read as {format}, {why}. "
                        f"config.json was edited or is of another model, or the weights are damaged. {SWITCH}=0 in the environment skips "
                        "this check."
                    )
            other, fmt = first.setdefault(id(weight), (name, format))
            if fmt != format:
                raise ValueError(
                    f"{METHOD}: {name} ({format}) and {other} ({fmt}) share one weight. config.json is damaged: one weight has one "
                    "format."
                )


def _report(model: Any, load: _Load, missing: list[str]) -> QuantReport:
    """The report of the decisions, corrected for weights that the checkpoint lacks or does not tie."""
    inventory, verdict = load.prepared.inventory, load.prepared.verdict
    layers, decisions = [], []
    for layer, decision in zip(inventory.layers, verdict.decisions, strict=True):
        if layer.name in missing:
            decision = replace(decision, format=None, reason=_NEW)
        if layer.tied_to is not None and layer.kind != "other":
            own, other = (model.get_parameter(parameter_name(model, name)) for name in (layer.name, layer.tied_to))
            if storage_key(own) != storage_key(other):
                decision = replace(decision, reason=f"the checkpoint has another weight than that of {layer.tied_to}")
                layer = replace(layer, tied_to=None)
        layers.append(layer)
        decisions.append(decision)
    inventory, verdict = replace(inventory, layers=layers), replace(verdict, decisions=decisions)
    report = replace(load.prepared, inventory=inventory, verdict=verdict).report(choice=load.choice)
    report.seconds = time.perf_counter() - load.started
    return report
