"""The table of the architectures of GGUF files that are known here. Reading and writing both use it."""

from __future__ import annotations

from typing import Any

from . import dense, gemma4, hybrids, others, routed, sparse, windowed
from .facts import Facts
from .record import Architecture

ARCHITECTURES: tuple[Architecture, ...] = (
    *windowed.RECORDS,
    *dense.RECORDS,
    *sparse.RECORDS,
    *routed.RECORDS,
    *gemma4.RECORDS,
    *hybrids.RECORDS,
    *others.RECORDS,
)
"""All records. Of several with the same name, the first one that applies is taken."""


def of_file(facts: Facts) -> Architecture:
    """The record of a file.

    Raises:
        ValueError: no record has this name.
    """
    name = facts.architecture
    if name == "clip":
        raise facts.error(
            "holds the vision or audio part of a model (architecture 'clip', an 'mmproj' file). Give the text model's file; the "
            "other part can only be loaded from the model's original folder."
        )
    named = [record for record in ARCHITECTURES if record.name == name]
    for record in named:
        if record.when is None or record.when(facts):
            return record
    raise facts.error(
        f"is of architecture {name!r:.60}, which no class of transformers is known for here. Known are "
        f"{', '.join(sorted({record.name for record in ARCHITECTURES}))}."
    )


def of_config(config: Any) -> Architecture:
    """The record with which a text config is written.

    Raises:
        ValueError: no record has this type of model.
    """
    kind = config.model_type
    for record in ARCHITECTURES:
        if kind in record.model_types:
            return record
    known = sorted({each for record in ARCHITECTURES for each in record.model_types})
    raise ValueError(f"models of type {kind!r} have no known architecture in GGUF. Known are {', '.join(known)}.")
