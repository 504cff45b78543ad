"""Loading of judges: RewardDance checkpoints, plain vision-language models, and LoRA adapters of either."""

import json
import os
from typing import Any

from transformers.utils import cached_file, find_adapter_config_file

from ..import_utils import require_extra
from ..models import RewardDanceConfig, RewardDanceForYesScoring, RewardDanceProcessor
from ..models.modeling_rewarddance import HUB_ARGUMENTS


CONFIG_OVERRIDES = ("paradigm", "score_normalization", "score_temperature")
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")


def load_judge(
    pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
) -> tuple[RewardDanceForYesScoring, RewardDanceProcessor]:
    """
    Load model and processor of a judge.

    An adapter is put on the base model that it names, and stays an adapter when saved again. Its folder may hold a
    RewardDance `config.json` and a processor, which then replace those of the base model.

    Args:
        pretrained_model_name_or_path (`str` or `os.PathLike`):
            Repository ID on the Hub or local folder: RewardDance checkpoint, any image-text-to-text model, or an adapter.
        kwargs:
            Arguments of [`RewardDanceForYesScoring.from_pretrained`]: `dtype`, `device_map`, `revision`, ...

    Returns:
        `tuple`: [`RewardDanceForYesScoring`] and [`RewardDanceProcessor`].

    Raises:
        `ValueError`: If weights are missing.
        `ImportError`: If an adapter is to be loaded without peft.
    """
    name = os.fspath(pretrained_model_name_or_path)
    hub_arguments = {argument: kwargs[argument] for argument in HUB_ARGUMENTS if argument in kwargs}
    adapter_config_file = find_adapter_config_file(name, **hub_arguments)
    has_all_weights = any(os.path.isfile(os.path.join(name, file)) for file in WEIGHT_FILES)
    if adapter_config_file is not None and not has_all_weights:
        return _load_adapter(name, adapter_config_file, hub_arguments, kwargs)
    processor = RewardDanceProcessor.from_pretrained(name, **hub_arguments)
    model, loading_info = RewardDanceForYesScoring.from_pretrained(name, output_loading_info=True, **kwargs)
    _check_scalar_head(name, loading_info["missing_keys"])
    return model, processor


def _load_adapter(
    name: str, adapter_config_file: str, hub_arguments: dict[str, Any], kwargs: dict[str, Any]
) -> tuple[RewardDanceForYesScoring, RewardDanceProcessor]:
    # `from_pretrained` of transformers would read the configuration of the base model, which may be a plain
    # vision-language model that knows nothing of paradigm and temperature.
    require_extra("train", "peft")
    with open(adapter_config_file, encoding="utf-8") as file:
        adapter_config = json.load(file)
    base = adapter_config.get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"`base_model_name_or_path` in `adapter_config.json` of {name!r} is {base!r}, but an adapter needs its base "
            "model. Write the base model's repository ID or folder there."
        )
    base_arguments = {k: v for k, v in hub_arguments.items() if k not in ("revision", "subfolder")}
    base_arguments["revision"] = adapter_config.get("revision")

    source, arguments = _source("processor_config.json", (name, hub_arguments), (base, base_arguments))
    processor = RewardDanceProcessor.from_pretrained(source, **arguments)
    source, arguments = _source("config.json", (name, hub_arguments), (base, base_arguments))
    overrides = {k: kwargs.pop(k) for k in CONFIG_OVERRIDES if k in kwargs}
    config = RewardDanceConfig.from_pretrained(source, **arguments, **overrides)
    if config.paradigm != "regressive" and config.yes_token_id is None:
        config.yes_token_id, config.no_token_id = processor.yes_token_id, processor.no_token_id

    kwargs = {k: v for k, v in kwargs.items() if k not in HUB_ARGUMENTS}
    model, loading_info = RewardDanceForYesScoring.from_pretrained(
        base, config=config, output_loading_info=True, **base_arguments, **kwargs
    )
    missing = set(model.load_adapter(name, adapter_kwargs=hub_arguments).missing_keys)
    if missing:
        raise ValueError(
            f"Adapter {name!r} lacks {len(missing)} weights that its `adapter_config.json` announces (first: "
            f"{sorted(missing)[:3]}), which would be random numbers. Save or download it again."
        )
    if "score" not in (adapter_config.get("modules_to_save") or []):
        _check_scalar_head(name, loading_info["missing_keys"])
    return model, processor


def _source(
    filename: str, adapter: tuple[str, dict[str, Any]], base: tuple[str, dict[str, Any]]
) -> tuple[str, dict[str, Any]]:
    """The first of two repositories, each with its Hub arguments, if it has a file, else the second."""
    name, arguments = adapter
    try:
        return adapter if cached_file(name, filename, **arguments) else base
    except OSError:
        return base


def _check_scalar_head(name: str, missing_keys: list[str] | set[str]) -> None:
    if "score.weight" in missing_keys:
        raise ValueError(
            f"{name!r} has no weights of the scalar head `score`, so scores of the regressive paradigm would be random "
            "numbers. Train it with `RewardDanceTrainer`, or score with the generative paradigm that it was made for."
        )
