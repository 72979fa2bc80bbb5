"""A GGUF file as a checkpoint."""

from __future__ import annotations

import os
from math import prod
from typing import Any

from isqtorch.files.gguf_model import GgufModel
from isqtorch.integrations.checkpoints.incoming import Checkpoint, Incoming

from .architectures import of_file
from .config import read_config, read_generation
from .facts import Facts
from .types import SIZES
from .weights import GgufWeights


class GgufCheckpoint(Checkpoint):
    """A GGUF file, or all parts of one that was split.

    Args:
        path: the file, or one of its parts.

    Attributes:
        architecture: the name of the architecture in the file.

    Raises:
        ValueError: a file is damaged, is no model, or has an architecture that is not known.
        OSError: a file is missing or cannot be read.
    """

    kind = "GGUF"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = GgufModel(path, SIZES)
        self.where, self.files = self._file.where, self._file.files
        name = self._file.metadata.get("general.architecture")
        if not isinstance(name, str) or not name:
            raise ValueError(
                f"load: {self.where}: has no 'general.architecture', so it is no model: an importance matrix, or a damaged file"
            )
        shapes = {tensor.name: tensor.shape for tensor in self._file.tensors.values()}
        self.elements = sum(prod(shape) for shape in shapes.values())
        self._facts = Facts(self.where, name, self._file.metadata, shapes)
        kind = self._file.metadata.get("general.type", "model")
        if kind not in ("model", "mmproj"):
            raise self._facts.error(f"is of the kind {kind!r:.40} (general.type), not a model")
        self._record = of_file(self._facts)
        self.architecture = name
        self._notes: list[str] = []

    def config(self) -> Any:
        config, self._notes = read_config(self._facts, self._record, self._file)
        self._file.release()
        return config

    def tokenizer(self) -> Any:
        from .tokenizer import read_tokenizer

        return read_tokenizer(self._facts)

    def generation(self) -> dict[str, Any]:
        return read_generation(self._facts)

    def weights(self, model: Any) -> Incoming:
        return GgufWeights(self._file, self._record, model, self._notes)
