"""Judges are known to transformers as soon as this package is imported, which imports neither transformers nor torch for it."""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


TRANSFORMERS = "transformers"
# Names of transformers by which a judge may be loaded, and their modules
AUTO_CLASSES = {
    "AutoConfig": "transformers.models.auto.configuration_auto",
    "AutoModel": "transformers.models.auto.modeling_auto",
    "AutoProcessor": "transformers.models.auto.processing_auto",
}
PIPELINE = {"pipeline": "transformers.pipelines"}
NAMES = AUTO_CLASSES | PIPELINE


def register_when_used() -> None:
    """Register judges where transformers is in use already, or else with the first of the names above that is taken from it."""
    if TRANSFORMERS not in sys.modules:
        sys.meta_path.insert(0, _TransformersFinder())
        return
    _watch(type(sys.modules[TRANSFORMERS]))
    for name, module in NAMES.items():
        if module in sys.modules:
            _register(name)


def _register(name: str) -> None:
    from . import models

    if name in PIPELINE:
        models.register_pipeline()


def _watch(module_class: Any) -> None:
    """Watch the class of the module, of which transformers makes a new object now and then: it imports names when asked for them."""
    get = module_class.__getattr__

    def __getattr__(module: ModuleType, name: str) -> Any:
        value = get(module, name)
        if name in NAMES and module.__name__ == TRANSFORMERS:
            _register(name)
        return value

    module_class.__getattr__ = __getattr__


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
            _watch(type(sys.modules[TRANSFORMERS]))  # the module has put another one in its place

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
