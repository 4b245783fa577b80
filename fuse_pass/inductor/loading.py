"""What waits until somebody loads a part of PyTorch, so that `import fuse_pass` loads neither Dynamo nor Inductor.

Both take longer to import than all the rest of PyTorch, and whoever runs layers eagerly needs neither.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Act = Callable[[ModuleType], None]

_lock = threading.Lock()
_waiting: dict[str, list[Act]] = {}


def when_loaded(name: str, act: Act) -> None:
    """Calls `act` with a module: now if it is loaded, or else when it is, before the import that loads it returns.

    Args:
        name: of the module, in full.
        act: should import nothing, for the module's own package may be half loaded.
    """
    with _lock:
        is_loaded = name in sys.modules and name not in _waiting  # and not one that our loader is loading now
        if not is_loaded:
            _waiting.setdefault(name, []).append(act)
            if _finder not in sys.meta_path:
                sys.meta_path.insert(0, _finder)
    if is_loaded:
        act(importlib.import_module(name))  # which waits for another thread that is loading it now


class _Finder(MetaPathFinder):
    """Leaves modules to the other finders, and has their loaders tell of those that something waits for."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _waiting:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Telling(spec.loader)
        return spec


class _Telling(Loader):
    """Loads one module as another loader does, and calls what waits for it."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)  # for who looks at a module before it is loaded

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:  # as if we had not been here: `inspect` and tracebacks ask it for the source
            module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        with _lock:
            acts = _waiting.pop(module.__name__, [])
        for act in acts:
            act(module)


_finder = _Finder()
