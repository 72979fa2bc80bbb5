"""diffusers: the folder or the cached files of a model of images or video, so that `requantize_` finds its weights.

Importing this module registers the host. `import isqtorch` imports it once diffusers' models are imported.
"""

from __future__ import annotations

from isqtorch.inplace.host import register_host

from .host import DiffusersHost

register_host(DiffusersHost())

__all__ = ["DiffusersHost"]
