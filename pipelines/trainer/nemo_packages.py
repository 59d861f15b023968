"""NeMo's package of language models, without all that its __init__ modules bring along.

`import nemo.collections.llm.gpt.model.base` first runs the __init__ of every package above it, which imports each model
family, recipe and launcher that NeMo has: 4.6 of 10.3 seconds on each rank. Here these packages are there at once with
their submodules alone, and run their __init__ when somebody asks for a name that is none of these.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import Any

PACKAGES = tuple(f"nemo.collections.llm{below}" for below in ("", ".gpt", ".gpt.data", ".gpt.model"))


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name in PACKAGES else None
        if spec is not None and spec.loader is not None:
            spec.loader = _OnDemand(spec.loader)
        return spec


class _OnDemand(Loader):
    """The package's own loader, which waits for the first name that is no submodule."""

    def __init__(self, own: Loader) -> None:
        self.own = own

    def __getattr__(self, name: str) -> Any:  # get_source and the like
        return getattr(self.own, name)

    def exec_module(self, module: ModuleType) -> None:
        def missing(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            if find_spec(f"{module.__name__}.{name}") is not None:
                return importlib.import_module(f"{module.__name__}.{name}")
            if vars(module).pop("__getattr__", None):  # else: in the middle of its __init__
                self.own.exec_module(module)
            return getattr(module, name)

        module.__getattr__ = missing  # type: ignore[method-assign]


def install() -> None:
    """Before the first import of nemo.collections.llm; without effect on what is imported already. Idempotent."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
