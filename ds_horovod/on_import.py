"""Extends Horovod when it is imported, before or after this package, and imports nothing of it otherwise."""

from __future__ import annotations

import importlib
import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_HOROVOD = "horovod.torch"


def extend_horovod() -> None:
    """Extends Horovod now, or as soon as it is imported.

    Raises
    ------
    ImportError
        Now or then: this Horovod is not the one whose methods are known.
    """
    if _HOROVOD in sys.modules:
        importlib.import_module("ds_horovod.horovod")
    else:
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds Horovod as the others do, with a loader that extends it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _HOROVOD:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader, self)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    def __init__(self, own: Any, finder: _Finder) -> None:
        self._own = own
        self._finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        self._own.exec_module(module)
        sys.meta_path.remove(self._finder)
        importlib.import_module("ds_horovod.horovod")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)
