"""What config.json of an MLX folder says about the quantization of its modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KEYS = ("quantization", "quantization_config")
"""The entries of config.json; mlx-lm writes the same under both, and reads the first one that is there."""

MODES: dict[str, tuple[dict[int, int], tuple[int, ...]]] = {
    "affine": ({1: 64, 2: 64, 3: 64, 4: 64, 5: 64, 6: 64, 8: 64}, (32, 64, 128)),
    "mxfp4": ({4: 32}, (32,)),
    "nvfp4": ({4: 16}, (16,)),
    "mxfp8": ({8: 32}, (32,)),
}
"""Mode -> ({bits: default group size}, possible group sizes)."""


@dataclass(frozen=True)
class Setting:
    """How one module is quantized.

    Attributes:
        mode: "affine", "mxfp4", "nvfp4" or "mxfp8".
        bits: bits per code.
        group: codes that share a scale.
    """

    mode: str
    bits: int
    group: int

    def __str__(self) -> str:
        return f"{self.mode} with {self.bits} bits in groups of {self.group}"

    def entry(self) -> dict[str, Any]:
        """The setting as config.json has it."""
        return {"group_size": self.group, "bits": self.bits, "mode": self.mode}


@dataclass(frozen=True)
class Settings:
    """The quantization of a folder.

    Attributes:
        default: for modules without an entry; None: the folder is not quantized.
        own: {path of a module: its setting, or None if it stays float}.
    """

    default: Setting | None = None
    own: Mapping[str, Setting | None] = field(default_factory=dict)


def is_mlx(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that MLX has quantized the weights beside it."""
    for key in KEYS:
        entry = config.get(key)
        if isinstance(entry, Mapping) and "quant_method" not in entry and "bits" in entry:
            return True
    return False


def read_settings(config: Mapping[str, Any], where: Path) -> Settings:
    """Parse the entries of config.json.

    Args:
        config: the content of config.json.
        where: its path, for messages.

    Raises:
        ValueError: an entry has a mode, bits or a group size that MLX does not have, or it is of another program.
    """
    key = next((key for key in KEYS if config.get(key) is not None), None)
    if key is None:
        return Settings()
    entry = config[key]
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: {key!r} must be an object, got {type(entry).__name__}")
    method = entry.get("quant_method")
    if key == "quantization_config" and method is not None:
        raise ValueError(
            f"{where}: 'quant_method' is {method!r:.80}, so this is a quantized folder of another program, not of MLX"
        )
    own: dict[str, Setting | None] = {}
    for path, value in entry.items():
        if isinstance(value, dict):
            own[path] = _setting(value, f"{where}: {key}[{path!r:.200}]")
        elif value is False:
            own[path] = None
    return Settings(_setting(entry, f"{where}: {key}"), own)


def _setting(entry: Mapping[str, Any], place: str) -> Setting:
    mode = entry.get("mode", "affine")
    if not isinstance(mode, str) or mode not in MODES:
        raise ValueError(f"{place}: 'mode' is {mode!r:.80}, must be one of {', '.join(MODES)}")
    widths, groups = MODES[mode]
    bits = entry.get("bits")
    bits = (4 if 4 in widths else next(iter(widths))) if bits is None else bits
    if type(bits) is not int or bits not in widths:
        raise ValueError(f"{place}: 'bits' is {bits!r:.80}, {mode} has {_either(widths)}")
    group = entry.get("group_size")
    group = widths[bits] if group is None else group
    if type(group) is not int or group not in groups:
        raise ValueError(f"{place}: 'group_size' is {group!r:.80}, {mode} has {_either(groups)}")
    return Setting(mode, bits, group)


def _either(values: Any) -> str:
    return ", ".join(map(str, values))
