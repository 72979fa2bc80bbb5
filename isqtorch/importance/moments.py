"""Second moments: how the inputs of a layer vary together. The rule "feedback" needs them.

H is the mean of x x' over the tokens of a calibration run, f32 `[K, K]`. An importance matrix is its diagonal. Layers
that read the same input (q, k and v; gate and up) share one H. What an error D of a weight costs is tr(D H D').
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from torch import Tensor

from isqtorch.policy.options import ImatrixLike

from . import moments_files
from .imatrix import Imatrix, read_imatrix
from .inputs import Input, LayerMoments, feeds_attention, importance_of_inputs


class Moments(Imatrix):
    """Second moments of a model's inputs, with held-out rows to judge with. `collect_moments` and `calibrate` make it.

    It is an importance matrix as well, that of its diagonals, so `imatrix=` accepts it everywhere. With `rule="feedback"`
    the whole moments are used.

    Attributes:
        inputs: {name of the first layer or stack of experts that reads an input: its moments, one for each expert}.
        readers: {layer or stack: key in `inputs`}.

    Example:
        moments = isqtorch.collect_moments(model, text, tokenizer, max_tokens=2048)
        moments.save("demo.safetensors")
        isqtorch.quantize_(model, "q4k", rule="feedback", imatrix="demo.safetensors")
    """

    def __init__(
        self,
        inputs: Mapping[str, Sequence[Input]],
        readers: Mapping[str, str],
        stacks: Mapping[str, bool],
        others: Mapping[str, tuple[Tensor, Tensor]] | None = None,
        *,
        source: str = "moments",
        chunk_count: int | None = None,
        chunk_size: int | None = None,
        datasets: tuple[str, ...] = (),
    ) -> None:
        """Store moments.

        Args:
            inputs: see the class.
            readers: see the class.
            stacks: {key in `inputs`: whether it is a stack of experts}.
            others: sums and counts of layers without moments.
            source, chunk_count, chunk_size, datasets: see `Imatrix`.

        Raises:
            ValueError: a sum is negative or not finite.
        """
        self.inputs = {key: tuple(parts) for key, parts in inputs.items()}
        self.readers = dict(readers)
        self.stacks = dict(stacks)
        sums, counts = {}, {}
        for layer, key in readers.items():
            sums[layer], counts[layer] = importance_of_inputs(
                self.inputs[key], feeds_attention(layer), self.stacks[key]
            )
        for layer, (squares, tokens) in (others or {}).items():
            sums[layer], counts[layer] = squares, tokens
        super().__init__(sums, counts, source=source, chunk_count=chunk_count, chunk_size=chunk_size, datasets=datasets)

    def __repr__(self) -> str:
        return f"Moments({len(self.inputs)} inputs of {len(self)} layers from {self.source})"

    def __deepcopy__(self, memo: object) -> Moments:
        """Return itself: copies of configurations must not copy gigabytes, and nothing changes moments."""
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of all moments."""
        return sum(part.nbytes for parts in self.inputs.values() for part in parts)

    def of(self, layer: str, columns: int, experts: int | None = None) -> LayerMoments | None:
        """The moments of a layer; None if it has none.

        Args:
            layer: path of the module in the model; for stacked experts, path of the parameter.
            columns: K.
            experts: E for a stack of experts, None for a matrix.

        Raises:
            ValueError: there are moments of another shape.
        """
        key = self.readers.get(layer)
        if key is None or not self.inputs.get(key):
            return None
        parts = self.inputs[key]
        if (
            self.stacks[key] != (experts is not None)
            or len(parts) != (experts or 1)
            or parts[0].total.columns != columns
        ):
            raise ValueError(
                f"{self.source}: layer {layer!r} needs moments of {experts or 1} x {columns} columns, the entry has "
                f"{len(parts)} x {parts[0].total.columns}. The moments are of another model; use the right ones, or none."
            )
        return LayerMoments(parts, feeds_attention(layer), self.stacks[key])

    def under(self, path: str) -> Moments:
        """The same moments, where all names begin with `path`: those of a part of a model become those of the model."""

        def named(name: str) -> str:
            return f"{path}.{name}"

        return Moments(
            {named(key): parts for key, parts in self.inputs.items()},
            {named(name): named(key) for name, key in self.readers.items()},
            {named(key): stacked for key, stacked in self.stacks.items()},
            {named(name): (self.sums[name], self.counts[name]) for name in self.sums if name not in self.readers},
            source=self.source,
            chunk_count=self.chunk_count,
            chunk_size=self.chunk_size,
            datasets=self.datasets,
        )

    def check(self) -> None:
        """Look at all values. A file may hold anything, and is not read before.

        Raises:
            ValueError: a sum is not finite or not symmetric, or a held-out row is not finite.
        """
        for key, parts in self.inputs.items():
            fault = next((fault for part in parts if (fault := part.fault()) is not None), None)
            if fault is not None:
                raise ValueError(f"{self.source}: the moments of {key!r} {fault}. Collect them again.")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file: `.safetensors` for the moments, or the importance alone as `Imatrix.save` does.

        Args:
            path: the file; its extension selects the format.

        Raises:
            ValueError: the extension is unknown, or there is nothing to save.
            OSError: the file cannot be written; an existing file stays as it was.
        """
        if not moments_files.is_name(path):
            super().save(path)
            return
        if not self.inputs:
            raise ValueError(f"{os.fspath(path)}: nothing to save, {self!r}")
        others = {name: (self.sums[name], self.counts[name]) for name in self.sums if name not in self.readers}
        facts = {"source": self.source, "chunk_count": self.chunk_count, "chunk_size": self.chunk_size}
        content = moments_files.Content(
            self.inputs, self.readers, self.stacks, others, {**facts, "datasets": list(self.datasets)}
        )
        moments_files.write(content, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Moments:
        """Read a file that `save` has written.

        The moments stay in the file, which is mapped, until a layer needs them. So a file may be larger than memory.

        Args:
            path: the file.

        Returns:
            The moments.

        Raises:
            OSError: the file cannot be read; FileNotFoundError if there is none.
            ValueError: the file does not hold moments, or is damaged. The message names the entry and the fault.

        Example:
            isqtorch.collect_moments(model, text, tokenizer, max_tokens=2048).save("demo.safetensors")
            print(isqtorch.Moments.load("demo.safetensors"))
        """
        content = moments_files.read(path)
        facts = content.facts
        return cls(
            content.inputs,
            content.readers,
            content.stacks,
            content.others,
            source=os.fspath(path),
            chunk_count=facts["chunk_count"],
            chunk_size=facts["chunk_size"],
            datasets=tuple(facts["datasets"]),
        )


def load_imatrix(imatrix: ImatrixLike | None) -> Imatrix | None:
    """Convert a user's argument (a path, a dict or an Imatrix) to an Imatrix; a file of moments to Moments. None stays None."""
    if imatrix is None or isinstance(imatrix, Imatrix):
        return imatrix
    if isinstance(imatrix, (str, os.PathLike)):
        return Moments.load(imatrix) if moments_files.is_file(imatrix) else read_imatrix(imatrix)
    if isinstance(imatrix, Mapping):
        return Imatrix(imatrix)
    raise ValueError(f"imatrix must be a dict of layer names, a path or an Imatrix, got {type(imatrix).__name__}")
