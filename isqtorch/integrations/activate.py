"""Register the transformers plug-in once transformers is imported, without importing transformers ourselves.

`import isqtorch` must be fast, yet afterwards `from_pretrained` must understand checkpoints saved by isqtorch.
transformers has no entry points for plug-ins, so an import hook waits for its module that loads models and registers
the plug-in after it. This breaks if transformers moves `from_pretrained` to another module;
test_a_saved_model_loads_after_importing_isqtorch notices.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

from isqtorch.report.plan import Describer, register_describer

_AWAITED = "transformers.modeling_utils"  # has from_pretrained; after it, all that the plug-in imports is available


def activate() -> None:
    """Register now if transformers is already imported, else when it is imported. `plan` imports it itself."""
    register_describer(_describer)
    if _AWAITED in sys.modules:
        _register()
    elif not any(type(finder).__name__ == _Waiter.__name__ for finder in sys.meta_path):  # isqtorch may be reloaded
        sys.meta_path.insert(0, _Waiter())


def _register() -> None:
    try:
        importlib.import_module("isqtorch.integrations.transformers")
    except ImportError:
        pass  # transformers is too old for the plug-in: only isqtorch.IsqConfig needs it, and raises the error


class _Waiter(importlib.abc.MetaPathFinder):
    """Import hook: the ordinary finders load the awaited module, then the plug-in registers."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]  # of this one loader
        return spec


def _describer() -> Describer:
    from .describing import TransformersDescriber

    return TransformersDescriber()
