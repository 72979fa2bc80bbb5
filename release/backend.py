"""The build backend: that of setuptools, and the torch that is installed already.

A build in isolation cannot import what is installed. A torch among the build requirements would therefore be downloaded
for the build alone, on Linux with gigabytes of CUDA. Any torch >= 2.10 has the headers and libraries that the build needs,
so the one beside which pip installs the package serves. torch is a requirement only where there is none. The metadata and
the source distribution need none at all.

pip runs an isolated build with the interpreter of the environment that it installs into. Other front ends make an environment
of their own for the build and hide the first one; with them, build without isolation.
"""

from __future__ import annotations

import importlib.metadata
import re
import site
import sys
from pathlib import Path

from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

OLDEST_TORCH = (2, 10)
COMPILES = sys.platform != "win32"  # nothing is compiled on Windows yet


def get_requires_for_build_wheel(config_settings: dict[str, str | list[str] | None] | None = None) -> list[str]:
    """What a front end has to install before it builds a wheel."""
    del config_settings
    if not COMPILES:
        return []
    return ["ninja"] if installed_torch() else ["ninja", f"torch>={'.'.join(map(str, OLDEST_TORCH))}"]


get_requires_for_build_editable = get_requires_for_build_wheel


def installed_torch() -> Path | None:
    """The folder of packages that has a torch which is new enough: one on the path, or one that isolation hides."""
    hidden = site.getsitepackages()
    if sys.prefix == sys.base_prefix:  # elsewhere Python ignores the folder of the user
        hidden.append(site.getusersitepackages())
    for folder in [*sys.path, *hidden]:
        for found in importlib.metadata.distributions(name="torch", path=[folder]):
            version = re.match(r"(\d+)\.(\d+)", found.version)
            if version and (int(version[1]), int(version[2])) >= OLDEST_TORCH and Path(folder, "torch").is_dir():
                return Path(folder)
    return None


def show_torch() -> None:
    """Make the installed torch importable. Packages of the isolated build come first."""
    folder = installed_torch()
    if folder and str(folder) not in sys.path:
        sys.path.append(str(folder))
