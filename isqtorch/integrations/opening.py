"""Open a model without reading its weights: where it is, its configuration, and its class."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from isqtorch.files.checkpoints import opened

from .bounded import check_size, parameters_on_meta
from .checkpoints.doors import open_checkpoint
from .checkpoints.incoming import Checkpoint
from .classes import Need, auto_class, described, unable
from .companions import Companions
from .hub import check_source, is_cached, naming_hub
from .record import METHOD

_NEEDED: dict[Need, str] = {
    "reads": "a model of text that is an encoder or a decoder alone",
    "answers": "one that answers a text with text",
    "continues": "one that predicts the next token of a text",
}


@dataclass(frozen=True)
class Opened:
    """A model whose weights were not read yet.

    Attributes:
        source: the folder, file or id, as the user gave it.
        checkpoint: the file or folder of another program; None for a transformers model.
        config: the configuration.
        auto: the Auto class that loads the model.
        cls: the class of the model; None: code of its repository.
        local: whether everything is on this machine, so that the network is not asked.
        trust_remote_code: as the user gave it.
    """

    source: str
    checkpoint: Checkpoint | None
    config: Any
    auto: Any
    cls: Any
    local: bool
    trust_remote_code: bool

    @classmethod
    def of(cls, source: str | os.PathLike[str], *, trust_remote_code: bool = False, local: bool = False) -> Opened:
        """Find a model, and read its configuration.

        Args:
            source: what `isqtorch.load` takes.
            trust_remote_code: whether code of the model's repository may run.
            local: never use the network.

        Raises:
            ValueError: a file is damaged, or transformers has no class for the model.
            OSError: there is no such file or folder, or the Hub does not give it.
            ImportError: transformers or accelerate is missing.
        """
        name = os.fspath(source)
        checkpoint = open_checkpoint(name, local=local)
        with needs_transformers():
            from transformers import AutoConfig
        if checkpoint is not None:
            config, local = checkpoint.config(), True
        else:
            check_source(name)
            name = os.path.expanduser(name) if os.path.isdir(os.path.expanduser(name)) else name
            local = local or is_cached(name)
            with naming_hub(name):
                config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, local_files_only=local)
        return cls(name, checkpoint, config, *auto_class(name, config, trust_remote_code), local, trust_remote_code)

    def __str__(self) -> str:
        return described(self.source, self.config)

    @property
    def quantized_by(self) -> str | None:
        """The method by which the folder of a transformers model is quantized; None: it is not."""
        if self.checkpoint is not None:
            return None
        return METHOD if self.has_own_header else quantized_by(self.config)

    @property
    def is_decoded(self) -> bool:
        """Whether another library has quantized the folder of a transformers model in a way that is read here."""
        return self.checkpoint is None and stored_entry(self.config) is not None

    @property
    def has_own_header(self) -> bool:
        """Whether a folder's weights were written by `isqtorch.checkpoint.save`. transformers cannot load such files."""
        path = Path(self.source, "model.safetensors")
        if not path.is_file():
            return False
        with opened(path, "np") as file:
            return "isqtorch" in (file.metadata() or {})

    @property
    def home(self) -> str | None:
        """The folder or id with files beside the weights, such as those of a tokenizer; None: it is one file."""
        if self.checkpoint is None:
            return self.source
        return self.checkpoint.where if os.path.isdir(self.checkpoint.where) else None

    def check(self, need: Need, what: str) -> None:
        """ValueError unless the model does with a text what is needed.

        Args:
            need: what the model has to do.
            what: what needs it, for the message: "calibration_file".
        """
        why = unable(self.cls, self.config, need)
        if why is not None:
            raise ValueError(f"{self}, {why}, but {what} needs {_NEEDED[need]}")

    def check_tokenizer(self, what: str) -> None:
        """ValueError if the model has no tokenizer. `what` needs it, for the message."""
        if self.companions.tokenizer is None:
            why = f" ({self.companions.why})" if self.companions.why else ""
            way = (
                f". Copy the tokenizer files of the original model there (tokenizer.json and tokenizer_config.json), or write "
                f"them: tokenizer.save_pretrained({self.source!r})."
            )
            raise ValueError(f"{self.source} has no tokenizer, and {what} needs one{why}{way if self.home else ''}")

    @cached_property
    def companions(self) -> Companions:
        """The tokenizer and the processor, as far as the model has them.

        Raises:
            OSError: a file cannot be read.
        """
        if self.home is not None:
            with naming_hub(self.home):
                return Companions.load(self.home, local=self.local, trust_remote_code=self.trust_remote_code)
        assert self.checkpoint is not None
        try:
            found = self.checkpoint.tokenizer()
        except ValueError as error:
            return Companions(why=str(error))
        inner = getattr(found, "tokenizer", None)
        return Companions(found) if inner is None else Companions(inner, found)

    def empty(self, dtype: torch.dtype | None = None) -> Any:
        """The model with parameters on the meta device, and with real buffers.

        Raises:
            ValueError: the configuration makes no model, or one that is much larger than the checkpoint.
        """
        try:
            if self.checkpoint is not None:
                with torch.device("meta"):  # no memory is taken before the sizes are known
                    trial = empty_model(self.auto, self.config, where=self.source)
                check_size(trial, self.checkpoint.elements, self.source)
            return empty_model(self.auto, self.config, dtype, self.trust_remote_code, self.source)
        except (ImportError, OSError):
            raise
        except Exception as error:  # of any kind: the classes compute with the values of the configuration
            if isinstance(error, ValueError) and str(error).startswith(f"{self.source}:"):
                raise
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{self.source}: transformers makes no model of its configuration ({type(error).__name__}: {reason:.300})"
            ) from error

    def own_dtype(self) -> torch.dtype | None:
        """The float type that the configuration names, or None."""
        own = getattr(self.config, "dtype", None) or getattr(self.config.get_text_config(), "dtype", None)
        return own if isinstance(own, torch.dtype) and own.is_floating_point else None


def empty_model(
    auto: Any,
    config: Any,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    where: str = "config.json",
) -> Any:
    """A model of a configuration with parameters on the meta device, and with real buffers, which no file has."""
    settings = {} if dtype is None else {"dtype": dtype}
    with parameters_on_meta(where):
        return auto.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code, **settings)


def stored_entry(config: Any) -> dict[str, Any] | None:
    """The `quantization_config` of a method that is read here, as a dict; None for others and for our own."""
    found = _quantization(config)
    entry = None if found is None else dict(found if isinstance(found, Mapping) else found.to_dict())
    if entry is None or entry.get("quant_method") == METHOD:
        return None
    from isqtorch.formats.stored import method_of  # takes a while to import, and few models need it

    try:
        method_of(entry)
    except (ValueError, NotImplementedError):
        return None
    return entry


def _quantization(config: Any) -> Any:
    """The `quantization_config` in a model's configuration, or None."""
    return getattr(config.get_text_config(), "quantization_config", None) or getattr(
        config, "quantization_config", None
    )


def quantized_by(config: Any) -> str | None:
    """The quantization method in a model's configuration, or None."""
    found = _quantization(config)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, Mapping) else getattr(found, "quant_method", None)
    return str(getattr(method, "value", method))


@contextmanager
def needs_transformers() -> Iterator[None]:
    """Turn the import error of a missing transformers into a message that says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in ("transformers", "accelerate"):
            raise
        raise ImportError("isqtorch loads models with transformers: pip install 'isqtorch[hf]'") from error
