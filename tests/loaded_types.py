"""Writes down which types of weights are loaded in a process, and from where, while a script runs in it as it ships."""

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
        types: Counter[str] = Counter()
        for parameter in model.parameters():
            types[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
        line = {"class": cls.__name__, "name": str(name), "types": types}
        with open(file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        return loaded

    model_class.from_pretrained = classmethod(from_pretrained)


if __name__ == "__main__":
    for model_class in (transformers.PreTrainedModel, diffusers.ModelMixin):
        watch(model_class, os.environ["LOADED_TYPES"])
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
