"""Loading of judges: RewardDance checkpoints, plain vision-language models, and LoRA adapters of either."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers.utils import cached_file

from ..availability import check_available
from ..import_utils import require_extra
from ..models import RewardDanceForYesScoring, RewardDanceProcessor
from ..models.checkpoints_rewarddance import HUB_ARGUMENTS, find_adapter


CARD = "README.md"


def load_judge(
    pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
) -> tuple[RewardDanceForYesScoring, RewardDanceProcessor]:
    """
    Model and processor of a judge. An adapter is put on the base model that it names, and stays an adapter when saved again;
    a RewardDance `config.json` and a processor in its folder replace those of the base model.
    """
    name = os.fspath(pretrained_model_name_or_path)
    check_available(name, **kwargs)
    device = None
    if kwargs.get("device_map") is not None and find_spec("accelerate") is None:
        device = _single_device(kwargs.pop("device_map"))
    adapter = find_adapter(name, kwargs)
    source, arguments = name, {argument: kwargs[argument] for argument in HUB_ARGUMENTS if argument in kwargs}
    if adapter is not None:
        source, arguments = adapter.source_of("processor_config.json")
    processor = RewardDanceProcessor.from_pretrained(source, **arguments)
    model, loading_info = RewardDanceForYesScoring.from_pretrained(name, output_loading_info=True, **kwargs)
    if "score.weight" in loading_info["missing_keys"]:
        raise ValueError(
            f"{name!r} has no weights of the scalar head `score`, so scores of the regressive paradigm would be random "
            "numbers. Train it with `RewardDanceTrainer`, or score with the generative paradigm that it was made for."
        )
    return model if device is None else model.to(device), processor


def _single_device(device_map: Any) -> Any:
    """Device that a map names, which transformers takes with accelerate only: all of them if several are to be used."""
    if isinstance(device_map, dict):
        require_extra("train", "accelerate")
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device_map


def copy_card(name: str, arguments: dict[str, Any], folder: str | os.PathLike) -> None:
    """Keep the card of a judge, which knows its training and its base model, with a copy of it. That of another model is left."""
    target = Path(folder) / CARD
    try:
        card = None if target.exists() else cached_file(name, CARD, **arguments)
    except OSError:
        return
    if card is not None and "rewarddance" in (text := Path(card).read_text(encoding="utf-8")):
        target.write_text(text, encoding="utf-8")


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether the weights are split over processes: by FSDP 2 or tensor parallelism, FSDP 1, or DeepSpeed."""
    marks = ("device_mesh", "_is_flat_param", "ds_id")
    return any(hasattr(parameter, mark) for parameter in model.parameters() for mark in marks)


def merge_adapters(model: Any) -> RewardDanceForYesScoring:
    """The judge with the weights of its adapters added to its own, in place. Weights that are not finite are refused."""
    if not getattr(model, "peft_config", None):
        return model
    require_extra("train", "peft")
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    if isinstance(model, PeftModel):
        return model.merge_and_unload(safe_merge=True)
    # An adapter that transformers loaded is part of the model, and only peft's own class knows how to leave.
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            model.set_submodule(name, module.get_base_layer())
        elif isinstance(module, ModulesToSaveWrapper):
            model.set_submodule(name, module.modules_to_save[str(module.active_adapter)])
    del model.peft_config
    vars(model).pop("_weight_conversions", None)  # names of the adapter's weights, under which all would be saved
    model._hf_peft_config_loaded = False
    return model
