"""What writers of other programs' checkpoints need of a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from isqtorch.integrations.companions import Companions
from isqtorch.modules.foreign import find_foreign
from isqtorch.modules.parameter import is_plain
from isqtorch.text import first_names

from .doors import open_checkpoint
from .gguf.outgoing import sources


def check_layers(op: str, model: nn.Module, file: str) -> None:
    """ValueError if the weights are not the whole model, or not here.

    Args:
        op: name of the calling function, for messages.
        model: the model.
        file: what is to be written, for messages: "a GGUF file".
    """
    adapters = [
        path
        for path, module in model.named_modules()
        if type(module).__module__.startswith("peft.") or hasattr(module, "base_layer")
    ]
    if adapters:
        raise ValueError(
            f"{op}: the model has adapters ({first_names([path or 'the model itself' for path in adapters], 2)}), and {file} has no "
            "place for them. Merge them first: model = model.merge_and_unload(). For packed layers, this needs "
            "isqtorch.integrations.peft.enable() before the adapters are made."
        )
    foreign = find_foreign(model)
    if foreign is not None:
        raise ValueError(f"{op}: {foreign}. Export a model in float, or one that isqtorch has packed.")
    for source in sources(model):
        tensor = getattr(source.module, source.leaf)
        if tensor.device.type == "meta":
            raise ValueError(
                f"{op}: {source.name} is on the meta device and has no values: it is not loaded, or was offloaded. Load the model into "
                "memory, without device_map='auto' if it does not fit on the GPU."
            )
        if isinstance(tensor, nn.Parameter) and not is_plain(tensor):
            raise ValueError(
                f"{op}: {source.name} is a {type(tensor).__name__}, not a whole tensor. Gather the model on one device first."
            )


def tokenizer_of(op: str, model: Any) -> Any:
    """The tokenizer of what a model was loaded from. Never uses the network.

    Args:
        op: name of the calling function, for messages.
        model: the model.

    Raises:
        OSError: there is none.
    """
    source = str(model.config.name_or_path or "")
    found, reason = None, ""
    if source:
        try:
            checkpoint = open_checkpoint(source, local=True)
            if checkpoint is not None:
                return checkpoint.tokenizer()
            found = Companions.load(source, local=True, trust_remote_code=False).tokenizer
        except (OSError, ValueError, ImportError) as error:
            reason = f" ({' '.join(str(error).split()):.200})"
    if found is None:
        raise OSError(
            f"{op}: no tokenizer is found with the model, which was loaded from {source or 'no file'}{reason}. Give it: "
            f"{op}(model, path, tokenizer). tokenizer=False writes none."
        )
    return found
