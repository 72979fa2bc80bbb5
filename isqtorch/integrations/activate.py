"""Registers the transformers plug-in as soon as transformers is there, without importing transformers.

`import isqtorch` must stay light, yet afterwards `from_pretrained` must understand a checkpoint saved by isqtorch. transformers
has no plug-in entry points, so its module that loads models is waited for: when somebody imports it, we register behind it.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_AWAITED = "transformers.modeling_utils"  # where from_pretrained is; with it, all that the plug-in imports is there


def activate() -> None:
    """Register now if transformers is imported already, else once it is."""
    if _AWAITED in sys.modules:
        _register()
    elif not any(type(finder).__name__ == _Waiter.__name__ for finder in sys.meta_path):  # isqtorch may be reloaded
        sys.meta_path.insert(0, _Waiter())


def _register() -> None:
    try:
        importlib.import_module("isqtorch.integrations.transformers")
    except ImportError:
        pass  # a transformers without what the plug-in needs: isqtorch.IsqConfig says so, nothing else needs it


class _Waiter(importlib.abc.MetaPathFinder):
    """Lets the ordinary finders find the awaited module, and registers after it was executed."""

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
