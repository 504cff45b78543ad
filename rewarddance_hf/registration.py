"""Judges are known to transformers as soon as this package is imported, which imports neither transformers nor torch for it."""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


TRANSFORMERS = "transformers"
# Names of transformers by which a judge may be loaded
AUTO_CLASSES = ("AutoConfig", "AutoModel", "AutoProcessor")
PIPELINE = "pipeline"


def register_when_used() -> None:
    """Register judges where transformers is in use already, or else with the first of the names above that is taken from it."""
    module = sys.modules.get(TRANSFORMERS)
    if module is None:
        sys.meta_path.insert(0, _TransformersFinder())
        return
    for name in (*AUTO_CLASSES, PIPELINE):
        if name in vars(module):
            _register(name)
    _watch(module)


def _register(name: str) -> None:
    from . import models

    if name == PIPELINE:
        models.register_pipeline()


def _watch(module: Any) -> None:
    """Give the module a function for names that it has not got yet, which is asked before that of its class (PEP 562)."""

    def get(name: str) -> Any:
        if name not in (*AUTO_CLASSES, PIPELINE):
            raise AttributeError(f"module {TRANSFORMERS!r} has no attribute {name!r}")
        value = type(module).__getattr__(module, name)
        _register(name)
        return value

    module.__getattr__ = get


class _TransformersFinder(MetaPathFinder):
    """Watches transformers once it is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TRANSFORMERS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)  # by all others
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            _watch(sys.modules[TRANSFORMERS])  # the module puts another one in its place

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
