"""Prepare PEFT: its layers on packed layers merge in our way, and what cannot work is an error that says what to do."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora import LoraConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from isqtorch.inplace.host import announce
from isqtorch.inplace.origin import Origin
from isqtorch.modules import PackedModule
from isqtorch.policy.inventory import inspect_model
from isqtorch.report.report import QuantReport

from . import saved
from .layers import adopt
from .record import detach, record_of
from .session import session

_MARK = "_isqtorch"  # of the functions that `enable` puts in the place of PEFT's
_CHANGES_THE_WEIGHT = (
    "pissa",
    "olora",
    "corda",
    "loftq",
    "lora_ga",
    "mica",
)  # values of init_lora_weights, or their beginnings
_WAYS_OUT = (
    "Leave the layer in float when the model is quantized (exclude=[...], modules_to_not_convert=[...], or a topology that maps it to "
    "null), or take it out of the adapter's targets, or use plain LoRA"
)


def enable() -> None:
    """Let adapters merge into packed layers, and let `modules_to_save` name packed layers.

    Call it before `get_peft_model`: then errors name the packed layer, too. This wraps methods of two classes of PEFT
    for the whole process: how BaseTuner creates, merges and removes layers, and how ModulesToSaveWrapper copies and
    returns a module. A second call changes nothing. It breaks if PEFT renames them;
    test_enable_is_idempotent_and_leaves_other_layers_alone notices.
    """
    _wrap(BaseTuner, "inject_adapter", _inject)
    _wrap(BaseTuner, "merge_adapter", _merge)
    _wrap(BaseTuner, "merge_and_unload", _unload)
    _wrap(BaseTuner, "unload", _unload)
    _wrap(ModulesToSaveWrapper, "update", saved.update)
    _wrap(ModulesToSaveWrapper, "unload_and_optionally_merge_module", saved.unload)


def _wrap(owner: type, name: str, ours: Callable[..., Any]) -> None:
    theirs = getattr(owner, name)
    if hasattr(theirs, _MARK):
        return

    @functools.wraps(theirs)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ours(theirs, self, *args, **kwargs)

    setattr(wrapped, _MARK, True)
    setattr(owner, name, wrapped)


# ---- creating adapters -----------------------------------------------------------------------------------------------


def _inject(theirs: Any, tuner: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
    """`BaseTuner.inject_adapter`, with errors that name the packed layer. A model that is refused is as it was."""
    config = tuner.peft_config[adapter_name]
    _check_parameters(config, model)
    with _undone_on_error(model) as replaced, _explained(tuner, replaced), warnings.catch_warnings():
        # rows of a packed weight are output features, also where the layer was a Conv1D: PEFT corrects the option
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to True but the target module is `torch.nn.Linear`")
        theirs(tuner, model, adapter_name, *args, **kwargs)
    adopt(model)


def _check_parameters(config: Any, model: nn.Module) -> None:
    """ValueError if a packed weight is a target by its own name."""
    for target in getattr(config, "target_parameters", None) or ():
        for path, module in model.named_modules():
            for leaf in module.packed if isinstance(module, PackedModule) else ():
                name = f"{path}.{leaf}"
                if name == target or name.endswith(f".{target}"):
                    raise ValueError(
                        f"{_kind(config)}: target_parameters names {name}, which is packed as {module.packed[leaf]}, and adapters "
                        f"of parameters add to float weights. {_WAYS_OUT} on linear layers."
                    )


def _refusal(config: Any) -> str | None:
    """Why adapters of a configuration cannot be on packed layers, or None: they would write to the weight."""
    if not isinstance(config, LoraConfig):
        return None
    start = config.init_lora_weights
    if isinstance(start, str) and start.lower().startswith(_CHANGES_THE_WEIGHT):
        return f"init_lora_weights={start!r} changes the float weight of the layer"
    asked = [
        f.name for f in dataclasses.fields(config) if f.metadata.get("is_lora_variant") and getattr(config, f.name)
    ]
    changing = [name for name in asked if name in ("kasa_config", "mica")]
    return f"{changing[0]} changes the float weight of the layer" if changing else None


@contextmanager
def _explained(tuner: Any, replaced: list[tuple[nn.Module, str, nn.Module]]) -> Iterator[None]:
    """Errors of creating a layer name the packed layer and the ways out. Notes what is replaced."""
    create = tuner._create_and_replace

    def explain(
        config: Any, adapter_name: str, target: Any, target_name: str, parent: nn.Module, *args: Any, **kwargs: Any
    ) -> None:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(target, BaseTunerLayer):
            replaced.append((parent, target_name, target))
        if not isinstance(base, PackedModule):
            create(config, adapter_name, target, target_name, parent, *args, **kwargs)
            return
        path = kwargs.get("current_key", args[0] if args else target_name)
        what = f"{_kind(config)}: {path} is packed as {', '.join(dict.fromkeys(base.packed.values()))}"
        reason = _refusal(config)
        if reason is not None:
            raise ValueError(f"{what}, and {reason}. {_WAYS_OUT}.")
        try:
            create(config, adapter_name, target, target_name, parent, *args, **kwargs)
        except (ValueError, TypeError, RuntimeError, AttributeError, NotImplementedError) as error:
            raise ValueError(f"{what}, and this kind of adapter cannot be put on it: {error} {_WAYS_OUT}.") from error

    vars(tuner)["_create_and_replace"] = explain
    try:
        yield
    finally:
        del vars(tuner)["_create_and_replace"]


@contextmanager
def _undone_on_error(model: nn.Module) -> Iterator[list[tuple[nn.Module, str, nn.Module]]]:
    """Put replaced layers back, and make the same parameters trainable as before, if an error is raised."""
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield replaced
    except BaseException:
        for parent, name, target in reversed(replaced):
            parent._modules[name] = target
        for parameter, was in trainable.items():
            if parameter.requires_grad != was:
                parameter.requires_grad_(was)
        raise


def _kind(config: Any) -> str:
    return type(config).__name__


# ---- merging adapters ------------------------------------------------------------------------------------------------


def _merge(theirs: Any, tuner: Any, *args: Any, **kwargs: Any) -> Any:
    """`BaseTuner.merge_adapter`: one warning for all layers."""
    adopt(tuner.model)  # the layers may have been packed after the adapters were made
    with session(tuner.model, stacklevel=6):
        return theirs(tuner, *args, **kwargs)


def _unload(theirs: Any, tuner: Any, *args: Any, **kwargs: Any) -> Any:
    """`BaseTuner.merge_and_unload` and `unload`: the model is an ordinary quantized one afterwards."""
    adopt(tuner.model)
    formats = _formats(tuner.model)
    with session(tuner.model, unloads=True, stacklevel=6) as running:
        model = theirs(tuner, *args, **kwargs)
    merged = running.count > 0
    for module in model.modules():
        merged |= record_of(module) is not None
        detach(module)
    origin = Origin.of(model)
    if merged and origin is not None and origin.files:
        trouble = "adapters were merged into the model's layers, and are not in it"
        dataclasses.replace(origin, trouble=trouble).attach(model)
    if _formats(model) != formats:
        announce(model, QuantReport.of_packed(inspect_model(model)))
    return model


def _formats(model: nn.Module) -> list[str]:
    return [name for module in model.modules() if isinstance(module, PackedModule) for name in module.packed.values()]
