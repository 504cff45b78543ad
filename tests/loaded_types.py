"""
Writes down which types of weights are loaded in a process, and from where, while scripts run in it as they ship:

    LOADED_TYPES=types.jsonl python tests/loaded_types.py SCRIPT ARGUMENT... [--then SCRIPT ARGUMENT...]
"""

import functools
import json
import os
import runpy
import sys
from collections import Counter
from typing import Any

import diffusers
import transformers


def watch(model_class: type, file: str) -> None:
    """Add a line of JSON to a file for each model that a class loads."""
    load = model_class.from_pretrained.__func__

    @functools.wraps(load)
    def from_pretrained(cls: type, name: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = load(cls, name, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        always_float32 = cls._keep_in_fp32_modules or ()  # whatever type is asked for
        types: Counter[str] = Counter()
        for parameter_name, parameter in model.named_parameters():
            if not set(parameter_name.split(".")) & set(always_float32):
                types[str(parameter.dtype).removeprefix("torch.")] += 1
        with open(file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps({"class": cls.__name__, "name": str(name), "types": types}) + "\n")
        return loaded

    model_class.from_pretrained = classmethod(from_pretrained)


if __name__ == "__main__":
    for model_class in (transformers.PreTrainedModel, diffusers.ModelMixin):
        watch(model_class, os.environ["LOADED_TYPES"])
    commands: list[list[str]] = [[]]
    for part in sys.argv[1:]:
        if part == "--then":
            commands.append([])
        else:
            commands[-1].append(part)
    for sys.argv in commands:
        runpy.run_path(sys.argv[0], run_name="__main__")
