"""What a checkpoint consists of: all weights or an adapter, and in which files."""

import json
import os
from dataclasses import dataclass
from typing import Any

from transformers.utils import cached_file, find_adapter_config_file, has_file, is_peft_available


HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
CONFIG_OVERRIDES = ("paradigm", "score_normalization", "score_temperature")
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
PICKLED_WEIGHT_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
ADAPTER_FILES = ("adapter_model.safetensors",)
PICKLED_ADAPTER_FILES = ("adapter_model.bin",)


@dataclass
class AdapterSource:
    """Where an adapter and its base model are."""

    name: str  # repository ID or folder
    arguments: "dict[str, Any]"  # for its files: `revision`, `token`, ...
    base: str
    base_arguments: "dict[str, Any]"
    settings: "dict[str, Any]"  # content of `adapter_config.json`

    def source_of(self, filename: str) -> "tuple[str, dict[str, Any]]":
        """The adapter with its arguments if it has a file, else the base model with its own."""
        try:
            found = cached_file(self.name, filename, **self.arguments)
        except OSError:
            found = None
        return (self.name, self.arguments) if found else (self.base, self.base_arguments)


def find_adapter(name: Any, kwargs: "dict[str, Any]") -> "AdapterSource | None":
    """
    Adapter with this name, or None: a folder that also holds all weights does not count as one, because transformers
    puts it on those weights itself. `kwargs` are those of `from_pretrained`; `AutoModel` passes the adapter in
    `adapter_kwargs`, and `name` is its base model.
    """
    arguments = {argument: kwargs[argument] for argument in HUB_ARGUMENTS if argument in kwargs}
    base_arguments = {k: v for k, v in arguments.items() if k not in ("revision", "subfolder")}
    from_auto_model = dict(kwargs.get("adapter_kwargs") or {})
    adapter = from_auto_model.pop("_adapter_model_path", None)
    base = None
    if adapter is not None and adapter != name:
        base, base_arguments, arguments = name, arguments, {**base_arguments, **from_auto_model}
        name = adapter
    if name is None or any(os.path.isfile(os.path.join(name, file)) for file in WEIGHT_FILES):
        return None
    config_file = find_adapter_config_file(os.fspath(name), **arguments)
    if config_file is None:
        return None
    if not is_peft_available():
        raise ImportError(
            f"{os.fspath(name)!r} is an adapter, and peft is needed to load it, but not installed. Install it with "
            "`pip install peft`."
        )
    with open(config_file, encoding="utf-8") as file:
        settings = json.load(file)
    if base is None:
        base, base_arguments["revision"] = settings.get("base_model_name_or_path"), settings.get("revision")
    if not base:
        raise ValueError(
            f"`base_model_name_or_path` in `adapter_config.json` of {os.fspath(name)!r} is {base!r}, but an adapter needs "
            "its base model. Write the base model's repository ID or folder there."
        )
    return AdapterSource(os.fspath(name), arguments, base, base_arguments, settings)


def refuse_pickles(
    name: str,
    arguments: "dict[str, Any]",
    files: "tuple[str, ...]" = WEIGHT_FILES,
    pickled_files: "tuple[str, ...]" = PICKLED_WEIGHT_FILES,
    variant: "str | None" = None,
) -> None:
    """
    Refuse weights that are in pickle files only, which can run any code when they are opened. `variant` is a part of file
    names, e.g. "fp16" in `model.fp16.safetensors`.
    """
    folder = f"{arguments['subfolder']}/" if arguments.get("subfolder") else ""
    options = {k: v for k, v in arguments.items() if k in ("revision", "token", "local_files_only", "cache_dir")}

    def first(names: "tuple[str, ...]") -> "str | None":
        if variant:
            names = tuple(f".{variant}.".join(file.rsplit(".", 1)) for file in names)
        return next((file for file in names if has_file(name, folder + file, **options)), None)

    if first(files) is None and (pickled := first(pickled_files)) is not None:
        raise ValueError(
            f"{name!r} has its weights in {pickled!r}, a pickle file, which can run any code when it is opened, so it is not "
            "loaded. Take a revision with safetensors files, or load it where you trust it with transformers itself and save it "
            "again with `save_pretrained`."
        )


__all__ = ["AdapterSource", "find_adapter", "refuse_pickles"]
