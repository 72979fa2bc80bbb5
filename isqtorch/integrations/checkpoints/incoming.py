"""What a checkpoint of another program gives to a model: packed blocks or float values, weight by weight.

A reader has two parts. `Checkpoint` is the file or folder before there is a model: it gives the configuration and the
tokenizer. `Incoming` knows the model's parameters by name. It undoes what the program's converter has done to a tensor
(another order of rows, another name, halves that are stored apart), and it never holds more than one weight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from isqtorch.formats import QuantFormat
from isqtorch.inplace.source import Source


@dataclass(frozen=True)
class Held:
    """How a checkpoint holds one parameter of the model. Nothing was read yet.

    Attributes:
        fmt: the format whose blocks the checkpoint has; None: it has float values, or `instead` applies.
        instead: the format in which to pack the decoded values, because the checkpoint has them quantized in a type
            that is no format here, or in an order of columns that blocks cannot follow; None: they stay float.
        note: for the report: what the checkpoint has, and why it is not taken over as it is; empty: nothing to say.
    """

    fmt: QuantFormat | None = None
    instead: QuantFormat | None = None
    note: str = ""

    def is_float(self) -> bool:
        return self.fmt is None and self.instead is None


class Incoming(Source):
    """The weights of a checkpoint, by the names of a model's parameters and saved buffers.

    Attributes:
        where: the file or folder, for messages.
        files: absolute paths of the files.
        notes: what the report says about the checkpoint as a whole.
    """

    files: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def exact(self, name: str, turned: bool = False) -> tuple[QuantFormat, ...]:
        held = self.held(name)
        return () if held is None or held.fmt is None else (held.fmt,)

    def packed(self, name: str, fmt: QuantFormat) -> Tensor | None:
        held = self.held(name)
        return self.blocks(name) if held is not None and held.fmt is fmt else None

    @abstractmethod
    def held(self, name: str) -> Held | None:
        """How the checkpoint holds a parameter; None if it does not have it. Reads no values."""

    @abstractmethod
    def blocks(self, name: str) -> Tensor:
        """The packed rows of a parameter whose `held(name).fmt` is a format, in the model's order of rows.

        Returns:
            uint8 `[N, row_bytes]` or `[E, N, row_bytes]`, contiguous, in memory that the caller owns. `N` are the
            output features, also where the model stores the weight transposed.

        Raises:
            ValueError: the file is damaged, or was changed after it was opened.
        """

    @abstractmethod
    def unused(self, names: Iterable[str]) -> list[str]:
        """The tensors of the checkpoint that none of these parameters takes, by the names in the file."""


class Checkpoint(ABC):
    """A file or folder of another program.

    Attributes:
        where: the file or folder, for messages.
        files: absolute paths of all files with weights.
        kind: the name of the file format, for messages: "GGUF", "MLX".
        elements: how many numbers the files have, packed or not, or more than that. No model of them is much larger.
        notes: for the report: what the file has that the configuration cannot say; known after `config()`.
    """

    where: str
    files: tuple[str, ...]
    kind: str
    elements: int
    notes: tuple[str, ...] = ()

    @abstractmethod
    def config(self) -> Any:
        """The configuration of the model, as transformers' classes take it, with `tie_word_embeddings` as in the file.

        Raises:
            ValueError: the file lacks a value, or no class of transformers has this architecture.
        """

    @abstractmethod
    def tokenizer(self) -> Any:
        """The tokenizer or processor, with the chat template.

        Raises:
            ValueError: the file has none, or one of an unknown kind.
        """

    @abstractmethod
    def generation(self) -> dict[str, Any]:
        """Settings for the model's generation_config, such as `eos_token_id`, as far as the file has them."""

    @abstractmethod
    def weights(self, model: Any) -> Incoming:
        """The weights for a model that was made of `config()`. The model may be on the meta device, and packed.

        Raises:
            ValueError: the file's tensors are not those of this model.
        """
