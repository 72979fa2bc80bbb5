"""What is given in the place of a model, and is none: the message says what to give instead."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from isqtorch.text import first_names, human_size

_SHOWN = 6  # modules that a message names


def no_module(given: object, op: str, fmt: object = None) -> str:
    """Say that something is no module, and what to call `op` with.

    Objects that hold modules, such as the pipelines of diffusers and transformers, are recognized by their attributes.

    Args:
        given: what was given as the model.
        op: name of the public function.
        fmt: what was given as the format.
    """
    name = type(given).__name__
    if isinstance(fmt, nn.Module):
        return f"the model comes first, then the format: {op}(model, {given!r:.40})"
    if isinstance(given, str):
        return (
            f"model must be an nn.Module, got the string {given!r:.80}. isqtorch.load opens a folder, a file or an id"
        )
    parts = modules_of(given)
    if not parts:
        return f"model must be an nn.Module, got {name}"
    example = (
        f"{op}({'pipe' if 'ipeline' in name else 'x'}.{parts[0][0]}{', ...' if fmt is None else f', {fmt!r:.40}'})"
    )
    listed = first_names(
        [f"{path} ({type(part).__name__}, {human_size(_bytes(part))})" for path, part in parts], _SHOWN
    )
    return f"model must be an nn.Module, and a {name} only holds some: {listed}. Give one of them: {example}"


def modules_of(given: object) -> list[tuple[str, nn.Module]]:
    """The modules that an object holds as attributes, the largest first."""
    held = getattr(given, "__dict__", None)
    found = {} if not isinstance(held, Mapping) else {k: v for k, v in held.items() if isinstance(v, nn.Module)}
    public = {name: part for name, part in found.items() if isinstance(name, str) and not name.startswith("_")}
    return sorted(public.items(), key=lambda item: -_bytes(item[1]))


def _bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
