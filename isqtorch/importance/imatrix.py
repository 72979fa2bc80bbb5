"""Importance matrices: how much the rounding error in each input column of a layer matters.

The statistic is llama.cpp's: the mean over tokens of the squared input of a column. It is kept as sums and counts,
because two of the three file formats (`files.py`) store these. Quantizers use sums / counts.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from math import inf, prod
from pathlib import Path

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from isqtorch.files.binary import MAX_NAME_BYTES, open_binary
from isqtorch.files.gguf_names import gguf_names, names_to_write
from isqtorch.files.writing import write_atomically
from isqtorch.ops.checks import MOST_IMPORTANCE
from isqtorch.policy.inventory import inspect_model
from isqtorch.policy.layers import LayerInfo
from isqtorch.policy.options import ImatrixLike

from . import files

_KIND_OF = {".gguf": "gguf", ".imatrix": "legacy", ".dat": "legacy", ".cimatrix": "cimatrix"}  # for writing; see `save`


class Imatrix(Mapping[str, Tensor]):
    """An importance matrix: a read-only mapping from entry name to column weights, f32 `[K]` or `[E, K]` on the CPU.

    The weights are sums / counts: the mean square of each input column over the tokens of a calibration run. Use
    `vector` to look up a layer: it also tries the names that other programs use, and it checks the length.

    Attributes:
        sums: the stored sums, f32 `[K]`, `[E, K]`, or `[E * K]` if there is one count for all experts.
        counts: the divisors, int64 `[1]` or `[E]`: tokens in a GGUF file, calls in a legacy file, otherwise 1.
        source: where the matrix comes from, for messages.
        format: kind of the file: "gguf", "legacy" or "cimatrix"; None if the matrix was not read from a file.
        chunk_count, chunk_size, datasets: facts about the calibration run; None or () if the file does not hold them.

    Example:
        im = isqtorch.Imatrix({"model.layers.0.mlp.up_proj": torch.rand(256)})
        isqtorch.quantize_(model, "q4k", imatrix=im, include=[r"layers\\.0\\.mlp\\.up_proj"])
    """

    def __init__(
        self,
        sums: Mapping[str, Tensor | ArrayLike],
        counts: Mapping[str, Tensor] | None = None,
        *,
        source: str = "imatrix",
        format: str | None = None,
        chunk_count: int | None = None,
        chunk_size: int | None = None,
        datasets: tuple[str, ...] = (),
    ) -> None:
        """Check and store sums and counts. Without `counts`, the sums are the weights.

        Raises:
            ValueError: a name is not a string of 1 to 1024 bytes; a vector is empty, has more than two dimensions, or
                has a negative or non-finite number; or counts have the wrong shape.
        """
        self.source = source
        self.format = format
        self.chunk_count = chunk_count
        self.chunk_size = chunk_size
        self.datasets = datasets
        self.sums = {name: self._checked_sums(name, value) for name, value in sums.items()}
        self.counts = {name: self._checked_counts(name, (counts or {}).get(name)) for name in self.sums}

    def __getitem__(self, name: str) -> Tensor:
        sums, counts = self.sums[name], self.counts[name]
        divisor = counts.to(torch.float32)
        if sums.ndim == 2:
            divisor = divisor[:, None]  # [E, 1]
        return torch.where(divisor > 0, sums / divisor, 1.0)  # without data, all columns get the same weight

    def __iter__(self) -> Iterator[str]:
        return iter(self.sums)

    def __len__(self) -> int:
        return len(self.sums)

    def __repr__(self) -> str:
        return f"Imatrix({len(self)} entries from {self.source})"

    def vector(self, layer: str, in_features: int, experts: int | None = None) -> Tensor | None:
        """Look up the weights for one layer.

        Args:
            layer: path of the module in the model; for stacked experts, path of the parameter.
            in_features: K, the number of columns.
            experts: E for a stack of experts, None for a matrix.

        Returns:
            f32 `[K]`; with `experts`, `[E, K]`, or `[K]` if the entry has one vector for all experts. None if there is
            no entry for the layer.

        Raises:
            ValueError: there is an entry, but its length is wrong.
        """
        name, expert = self._find(layer)
        if name is None:
            return None
        shape = (in_features,) if experts is None else (experts, in_features)
        weights = self[name]
        if expert is not None and experts is None:  # the layer is one of a list of experts; the entry holds all of them
            if in_features and weights.shape[-1] % in_features == 0 and expert * in_features < weights.numel():
                weights = weights.reshape(-1, in_features)[expert]
        if experts is not None and weights.shape == (in_features,):
            shape = (in_features,)  # one vector for all experts
        if weights.numel() != prod(shape) or (weights.ndim == 2 and weights.shape[1] != in_features):
            raise self._misfit(layer, name, shape)
        weights = weights.reshape(shape)
        if self.format == "cimatrix" and (experts is not None or expert is not None):
            unused = (weights == 0).all(dim=-1, keepdim=True)  # mistral.rs stores zeros for experts without data
            weights = torch.where(unused, 1.0, weights)
        return weights

    def shares(self, layer: str, experts: int) -> Tensor:
        """Return the fraction of the tokens that each expert of a stack got, f64 `[E]`.

        Args:
            layer: path of the stack (a parameter) in the model.
            experts: E. If the counts per expert are not known, all fractions are 1 / E.
        """
        name, _ = self._find(layer)
        counts = None if name is None else self.counts[name].double()
        if counts is None or counts.shape != (experts,) or not float(counts.sum()):
            return torch.full((experts,), 1 / experts, dtype=torch.float64)
        return counts / counts.sum()

    @property
    def unseen(self) -> dict[str, int]:
        """{name of an entry: number of its experts without a token}, only for entries with such experts.

        A single matrix counts as one expert. Without a token, all columns get the same weight. Legacy files do not hold
        this information.
        """
        found = {name: int((counts == 0).sum()) for name, counts in self.counts.items()}
        return {name: count for name, count in found.items() if count}

    def summary(self) -> str:
        """Describe in one line where the numbers come from."""
        about = [f"{len(self)} entries"]
        if self.datasets:
            about.append("from " + ", ".join(self.datasets))
        if self.chunk_count:
            about.append(f"{self.chunk_count} chunks" + (f" of {self.chunk_size} tokens" if self.chunk_size else ""))
        return f"importance matrix {self.source}: {', '.join(about)}"

    def for_model(self, model: nn.Module) -> Imatrix:
        """Return the entries for the layers of a model, quantized or not, named by the paths of its modules.

        Use this to save a matrix from llama.cpp for mistral.rs, which does not know GGUF names.

        Raises:
            ValueError: an entry has the wrong length for its layer, or there is no entry for any layer.
        """
        sums, counts = {}, {}
        for layer in inspect_model(model).layers:
            if layer.kind not in ("linear", "experts"):
                continue
            number = layer.shape[0] if layer.kind == "experts" else None
            name, expert = self._find(layer.name)
            if name is None or self.vector(layer.name, layer.shape[-1], number) is None:  # checks the length
                continue
            matrices, tokens = self.sums[name].reshape(-1, layer.shape[-1]), self.counts[name]
            tokens = tokens.expand(len(matrices)) if len(tokens) == 1 else tokens
            if expert is not None and number is None:
                matrices, tokens = matrices[expert : expert + 1], tokens[expert : expert + 1]
            sums[layer.name] = matrices[0] if number is None else matrices
            counts[layer.name] = tokens
        if not sums:
            raise ValueError(f"{self!r} has no entry for any layer of this model. It was made for another one.")
        return Imatrix(
            sums,
            counts,
            source=self.source,
            format=self.format,
            chunk_count=self.chunk_count,
            chunk_size=self.chunk_size,
            datasets=self.datasets,
        )

    # ---- writing -----------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file: `.gguf` or `.imatrix` (or `.dat`) for llama.cpp, `.cimatrix` for mistral.rs.

        In files for llama.cpp, layers of known model families get GGUF names. Experts that are separate layers become
        one entry; fused experts become one entry for each matrix that GGUF may have. Only `.gguf` holds the number of
        tokens per expert.

        Args:
            path: the file; its extension selects the format.

        Raises:
            ValueError: the extension is unknown, there is nothing to save, or the format cannot hold a name or value.
            OSError: the file cannot be written; an existing file stays as it was.
        """
        kind = check_extension(path)
        if not self.sums:
            raise ValueError(f"{os.fspath(path)}: nothing to save, {self!r}")
        sums, counts = (self.sums, self.counts) if kind == "cimatrix" else self._for_llama_cpp()
        content = files.Content(sums, counts, self.format, self.chunk_count, self.chunk_size, tuple(self.datasets))
        try:
            pieces = list(files.encode(content, kind))  # find all errors before the file is changed
        except struct.error as error:  # only with counts from a malformed file
            raise ValueError(f"{os.fspath(path)}: a number of tokens or chunks is too large: {error}") from None
        write_atomically(path, pieces)

    def _for_llama_cpp(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return sums and counts under GGUF names. A layer without a unique GGUF name keeps its name."""
        owners: dict[str, dict[int | None, str]] = {}  # GGUF name -> number of the expert -> our name
        clashes: set[str] = set()
        for name in self.sums:
            targets, expert = names_to_write(name)
            for target in targets:
                others = owners.setdefault(target, {})
                if expert in others or (others and (expert is None) != (None in others)):
                    clashes |= {name, *others.values()}  # such as encoder and decoder: both keep their names
                others[expert] = name
        sums, counts, moved = {}, {}, set()
        for target, parts in owners.items():
            stack = [parts.get(expert) for expert in range(len(parts))] if None not in parts else [parts[None]]
            if None in stack or clashes & set(parts.values()) or len({self.sums[p].shape for p in parts.values()}) > 1:
                continue  # experts are missing, or their shapes differ
            names = [part for part in stack if part is not None]
            pieces = [self.sums[name] for name in names]
            sums[target] = pieces[0] if None in parts else torch.stack(pieces)
            counts[target] = torch.cat([self.counts[name] for name in names])
            moved |= set(names)
        kept = self.sums.keys() - moved
        sums |= {name: self.sums[name] for name in kept}
        counts |= {name: self.counts[name] for name in kept}
        return sums, counts

    # ---- checks ------------------------------------------------------------------------------------------------------

    def _find(self, layer: str) -> tuple[str | None, int | None]:
        """Return the name of the entry for a layer (or None), and the number of the expert in it (or None)."""
        candidates, expert = gguf_names(layer)
        for name in (layer, f"{layer}.weight"):
            if name in self.sums:
                return name, None
        return next((name for name in candidates if name in self.sums), None), expert

    def _misfit(self, layer: str, name: str, shape: tuple[int, ...]) -> ValueError:
        want, got = (" x ".join(map(str, dims)) for dims in (shape, self.sums[name].shape))
        return ValueError(
            f"{self.source}: layer {layer!r} needs {want} importance values, entry {name!r} has {got}. "
            "The importance matrix was made for another model; use the right one, or none."
        )

    def _error(self, name: str, message: str) -> ValueError:
        return ValueError(f"{self.source}: entry {name[:80]!r}: {message}")

    def _checked_sums(self, name: str, value: Tensor | ArrayLike) -> Tensor:
        if not isinstance(name, str) or not name or len(name.encode(errors="replace")) > MAX_NAME_BYTES:
            raise ValueError(
                f"{self.source}: the name of an entry must be a string of 1 to {MAX_NAME_BYTES} bytes, got {name!r:.80}"
            )
        try:
            sums = torch.as_tensor(value).detach().to("cpu", torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise self._error(name, f"not a tensor of numbers: {error}") from None
        if sums.ndim not in (1, 2) or sums.numel() == 0:
            raise self._error(name, f"shape {list(sums.shape)}, must be [columns] or [experts, columns]")
        low, high = torch.aminmax(sums)
        if not (low >= 0 and high < inf):  # also false for NaN
            position = int(torch.nonzero(~(torch.isfinite(sums) & (sums >= 0)).flatten())[0])
            bad = sums.flatten()[position].item()
            raise self._error(name, f"value {position} is {bad}, must be finite and not negative")
        return sums

    def _checked_counts(self, name: str, counts: Tensor | None) -> Tensor:
        sums = self.sums[name]
        experts = sums.shape[0] if sums.ndim == 2 else 1
        if counts is None:
            return torch.ones(experts, dtype=torch.int64)
        if counts.shape != (experts,):
            raise self._error(name, f"counts have shape {list(counts.shape)}, must be [{experts}]")
        return counts.to("cpu", torch.int64)


def read_imatrix(path: str | os.PathLike[str]) -> Imatrix:
    """Read an importance matrix written by llama.cpp (GGUF or legacy) or mistral.rs (.cimatrix).

    The kind of the file is recognised from its content, not from its name. The whole file is checked before a value is
    used. The function needs at most a small multiple of the file's size in memory.

    Args:
        path: the file.

    Returns:
        The matrix, under the names of the file. `Imatrix.vector` looks up layers of a transformers model.

    Raises:
        OSError: the file cannot be read; FileNotFoundError if there is none.
        ValueError: the file is not an importance matrix, or is damaged. The message names the byte and the fault.

    Example:
        isqtorch.collect_imatrix(model, text, tokenizer, max_tokens=2048).save("demo.gguf")
        im = isqtorch.read_imatrix("demo.gguf")
        print(im.summary(), im.vector("model.layers.0.mlp.up_proj", 256).shape)
    """
    with open_binary(path) as reader:
        kind = files.detect(reader)
        try:
            content = files.read(reader, kind)
            return Imatrix(
                content.sums,
                content.counts,
                source=reader.path,
                format=kind,
                chunk_count=content.chunk_count,
                chunk_size=content.chunk_size,
                datasets=content.datasets,
            )
        except ValueError as error:
            raise ValueError(f"{error} (reading it as {files.KINDS[kind]})") from None


def check_extension(path: str | os.PathLike[str]) -> str:
    """Return the kind of file that `Imatrix.save` writes to this path. Raise ValueError if the extension is unknown."""
    kind = _KIND_OF.get(Path(path).suffix.lower())
    if kind is None:
        raise ValueError(f"{os.fspath(path)}: the name of an importance matrix must end in {', '.join(_KIND_OF)}")
    return kind


def imatrix_name(imatrix: ImatrixLike | None) -> str:
    """Name the source of an importance matrix: of a file only its name, without folders, because reports are shared."""
    if isinstance(imatrix, (str, os.PathLike)):
        return Path(imatrix).name
    source = getattr(imatrix, "source", None)
    return Path(str(source)).name if source else "given in memory"


def importance_of(imatrix: Imatrix, layers: Sequence[LayerInfo], shape: tuple[int, ...]) -> Tensor | None:
    """Return the first vector found for layers that share a weight, or None.

    A head comes before the embedding that it is tied to, because an embedding has no input activations. Raise ValueError
    for importance that the operator `quantize` would refuse.
    """
    experts = shape[0] if len(shape) == 3 else None
    for layer in sorted(layers, key=lambda layer: layer.kind == "embedding"):
        vector = imatrix.vector(layer.name, shape[-1], experts)
        if vector is not None:
            largest = vector.max().item()
            if largest > MOST_IMPORTANCE:  # the operator would refuse it, when half of the model is packed
                raise ValueError(
                    f"{imatrix.source}: layer {layer.name!r} has importance {largest:.6g}, more than 2**40, which no activations have. "
                    "Collect it again; of your own numbers only the ratios count: divide them by the largest."
                )
            return vector
    return None
