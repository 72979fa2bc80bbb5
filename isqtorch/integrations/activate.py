"""Register the plug-ins once their libraries are imported, without importing the libraries ourselves.

`import isqtorch` must be fast, yet afterwards `from_pretrained` of transformers must understand checkpoints saved by
isqtorch. Neither transformers nor diffusers has entry points for plug-ins, so an import hook waits for the module of
each that loads models, and registers the plug-in after it. This breaks if a library moves `from_pretrained` to another
module; test_a_saved_model_loads_after_importing_isqtorch and test_diffusers.py notice.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

from isqtorch.report.plan import Describer, register_describer

_AWAITED = {  # module that has from_pretrained: the plug-in; after it, all that the plug-in imports is available
    "transformers.modeling_utils": "isqtorch.integrations.transformers",
    "diffusers.models.modeling_utils": "isqtorch.integrations.diffusers",
}


def activate() -> None:
    """Register now what is imported already, and the others when they are. `plan` imports transformers itself."""
    register_describer(_describer)
    for awaited, plugin in _AWAITED.items():
        if awaited in sys.modules:
            _register(plugin)
        elif not any(
            getattr(finder, "awaited", None) == awaited for finder in sys.meta_path
        ):  # isqtorch may be reloaded
            sys.meta_path.insert(0, _Waiter(awaited, plugin))


def _register(plugin: str) -> None:
    try:
        importlib.import_module(plugin)
    except ImportError:
        pass  # transformers is too old for the plug-in: only isqtorch.IsqConfig needs it, and raises the error


class _Waiter(importlib.abc.MetaPathFinder):
    """Import hook: the ordinary finders load the awaited module, then the plug-in registers."""

    def __init__(self, awaited: str, plugin: str) -> None:
        self.awaited, self.plugin = awaited, plugin

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.awaited:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(self.plugin)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]  # of this one loader
        return spec


def _describer() -> Describer:
    from .describing import TransformersDescriber

    return TransformersDescriber()
