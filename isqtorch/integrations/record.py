"""What a saved model's config.json says about its packed layers, checked. It may be anybody's file."""

from __future__ import annotations

from collections.abc import Mapping

from isqtorch.formats import get_format

METHOD = "isq"
FORMAT_VERSION = 1


def checked_version(op: str, version: object) -> int:
    """The number, if this version of the package understands it; ValueError otherwise."""
    if type(version) is not int or version < 1:
        raise ValueError(f"{op}: format_version is {version!r:.80}, must be a positive number")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{op}: this model has format_version {version}, newer than {FORMAT_VERSION}, the newest known here. Upgrade isqtorch."
        )
    return version


def checked_layers(op: str, layers: object) -> dict[str, str]:
    """{path: format} with canonical names; ValueError otherwise."""
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
