"""Checkpoints that carry their own code, so that `trust_remote_code=True` loads them without this package."""

import json
import os
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from ..models import RewardDanceForYesScoring, RewardDanceProcessor
from ..scoring.loading import merge_adapters


# Files of a checkpoint, and which Auto classes find their code by them.
AUTO_CLASSES = {"config.json": ("AutoConfig", "AutoModel"), "processor_config.json": ("AutoProcessor",)}
# What the tokenizer remembers about how it was loaded here, which does not belong in a release.
LOADING_DETAILS = ("is_local", "local_files_only")


def save_with_code(
    model: RewardDanceForYesScoring,
    processor: RewardDanceProcessor,
    save_directory: str | os.PathLike,
    max_shard_size: str = "5GB",
) -> None:
    """
    Save a judge in the form for the Hub: weights (adapters merged), configuration, processor, and the code of all
    three, which `AutoModel`, `AutoConfig` and `AutoProcessor` load with `trust_remote_code=True`.
    """
    folder = Path(save_directory)
    model = merge_adapters(model)
    model.check_processor(processor)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    processor.save_pretrained(folder)

    tokenizer_file = folder / "tokenizer_config.json"
    settings = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    settings = {name: value for name, value in settings.items() if name not in LOADING_DETAILS}
    tokenizer_file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    check_code(folder)


def check_code(folder: str | os.PathLike) -> None:
    """Raise a `ValueError` unless a checkpoint names its code in `auto_map` and holds all files of it."""
    folder = Path(folder)
    for name, auto_classes in AUTO_CLASSES.items():
        auto_map = json.loads((folder / name).read_text(encoding="utf-8")).get("auto_map") or {}
        for auto_class in auto_classes:
            if auto_class not in auto_map:
                raise ValueError(
                    f"`auto_map` in {name!r} of {str(folder)!r} has {sorted(auto_map)}, but `{auto_class}` needs an entry to "
                    "find the code of the checkpoint. Save it with `save_with_code`."
                )
            code = folder / (auto_map[auto_class].split(".")[0] + ".py")
            try:
                get_relative_import_files(code)
            except FileNotFoundError as error:
                raise ValueError(
                    f"{str(folder)!r} lacks {Path(error.filename).name!r}, which {auto_map[auto_class]!r} needs. Save it with "
                    "`save_with_code`."
                ) from error
