"""Tiny pipelines as diffusers' own tests build them, imported from the folder `tests` of a checkout of diffusers."""

import importlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch


PACKAGE = "tests_of_diffusers"


def test_files(folder: Path) -> list[Path]:
    return sorted((folder / "pipelines").glob("*/test_*.py"))


def tiny_pipelines(folder: Path) -> Iterator[tuple[str, Callable[[], tuple[Any, dict[str, Any]]] | str]]:
    """Name of each test's pipeline, with a function that makes it and its inputs, or the reason why there is none."""
    if PACKAGE not in sys.modules:
        sys.modules[PACKAGE] = types.ModuleType(PACKAGE)
        sys.modules[PACKAGE].__path__ = [str(folder)]
        # Some files name it in full, as pytest does the folder of this sweep.
        tests = sys.modules.setdefault("tests", sys.modules[PACKAGE])
        tests.__path__ = list(dict.fromkeys([*getattr(tests, "__path__", []), str(folder)]))
        sys.modules["tests.pipelines"] = importlib.import_module(f"{PACKAGE}.pipelines")
    for file in test_files(folder):
        module_name = ".".join([PACKAGE, *file.relative_to(folder).with_suffix("").parts])
        try:
            module = importlib.import_module(module_name)
        except BaseException as error:  # modules skip themselves too
            yield f"{file.parent.name}/{file.stem}", f"{type(error).__name__}: {error}"
            continue
        seen = set()
        for name, kind in vars(module).items():
            if not inspect.isclass(kind) or kind.__module__ != module_name:
                continue
            if not (hasattr(kind, "get_dummy_components") and hasattr(kind, "get_dummy_inputs")):
                continue
            pipeline_class = inspect.getattr_static(kind, "pipeline_class", None)
            key = (pipeline_class, kind.get_dummy_components, kind.get_dummy_inputs)
            if not inspect.isclass(pipeline_class) or key in seen or _is_base(kind):
                continue
            seen.add(key)
            yield f"{pipeline_class.__name__} [{file.parent.name}/{file.stem}::{name}]", _builder(kind, pipeline_class)


def _is_base(kind: type) -> bool:
    """Whether a class cannot build by itself, as the classes that derive from it tell it what to build."""
    _, *parameters = inspect.signature(kind.get_dummy_components).parameters.values()
    return any(parameter.default is parameter.empty for parameter in parameters)


def _builder(kind: type, pipeline_class: type) -> Callable[[], tuple[Any, dict[str, Any]]]:
    def build() -> tuple[Any, dict[str, Any]]:
        test = object.__new__(kind)
        torch.manual_seed(0)
        pipeline = pipeline_class(**test.get_dummy_components())
        takes = inspect.signature(test.get_dummy_inputs).parameters
        return pipeline, test.get_dummy_inputs(**({"device": "cpu"} if "device" in takes else {}))

    return build
