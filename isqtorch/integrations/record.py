"""Checks of what the config.json of a saved model says about its packed layers. The file is untrusted input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from isqtorch.formats import get_format

METHOD = "isq"
FORMAT_VERSION = 1


def checked_version(op: str, version: object) -> int:
    """The version number; ValueError unless this version of the package understands it."""
    if type(version) is not int or version < 1:
        raise ValueError(f"{op}: format_version is {version!r:.80}, must be a positive number")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{op}: this model has format_version {version}, newer than {FORMAT_VERSION}, the newest known here. Upgrade isqtorch."
        )
    return version


def checked_layers(op: str, layers: object) -> dict[str, str]:
    """{path: canonical format name}; ValueError if `layers` is not valid."""
    if not isinstance(layers, Mapping):
        raise ValueError(f"{op}: 'layers' must map paths of layers to formats, got {type(layers).__name__}")
    checked = {}
    for path, name in layers.items():
        if not isinstance(path, str) or not isinstance(name, str):
            raise ValueError(f"{op}: 'layers' must map strings to strings, got {path!r:.80}: {name!r:.80}")
        try:
            checked[path] = get_format(name).name
        except ValueError as error:
            raise ValueError(f"{op}: layer {path[:200]!r}: {error}") from None
    return checked


def checked_activations(op: str, activations: object, layers: Mapping[str, str]) -> str | list[str] | None:
    """None, "fp8" (all layers in fp8), or the paths of some layers in fp8; ValueError if `activations` is not valid."""
    if activations is None or activations == "fp8":
        return "fp8" if activations else None
    if isinstance(activations, str) or not isinstance(activations, Sequence):
        raise ValueError(f'{op}: activations must be "fp8" or a list of layers in fp8, got {activations!r:.80}')
    for path in activations:
        if not isinstance(path, str) or layers.get(path) != "fp8":
            raise ValueError(f"{op}: activations names {path!r:.80}, which is no layer in fp8 according to 'layers'")
    return list(activations)
