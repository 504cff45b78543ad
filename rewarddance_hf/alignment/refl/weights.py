"""What is trained of a pipeline, one denoiser or two, and its weights on disk, in the layouts that diffusers loads."""

from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...import_utils import require_extra


require_extra("diffusers", "diffusers", "peft")

from diffusers.training_utils import cast_training_params  # noqa: E402
from peft import LoraConfig, get_peft_model_state_dict  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers.utils import logging  # noqa: E402

from ...trainer.sharding import plain_class  # noqa: E402
from ..pipelines.models import DENOISERS  # noqa: E402
from .sharding import fill  # noqa: E402


logger = logging.get_logger(__name__)


ADAPTER_NAME = "default"
# Of an adapter that names no layers: the attention of all denoisers of diffusers, and what some add for text
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
LORA_FILE = "pytorch_lora_weights.safetensors"
CONFIG_NAME = "config.json"
SECOND = "transformer_2"


def denoiser_names(pipeline: Any, chosen: Sequence[str] | None = None) -> tuple[str, ...]:
    """Names of the components that a pipeline denoises with, one or two, or of those that were chosen."""
    found = [name for name in DENOISERS if getattr(pipeline, name, None) is not None]
    if not found:
        raise ValueError(
            f"`{type(pipeline).__name__}` has neither `transformer` nor `unet` ({sorted(pipeline.components)}), but one of them "
            "is what is tuned. Pass a text-to-image or text-to-video pipeline."
        )
    unknown = [name for name in chosen or () if name not in found]
    if unknown or (chosen is not None and not chosen):
        raise ValueError(
            f"`denoisers` is {list(chosen or ())}, but `{type(pipeline).__name__}` denoises with {found}. Name some of these."
        )
    return tuple(name for name in found if chosen is None or name in chosen)


class Denoisers(nn.ModuleDict):
    """Two denoisers of a pipeline as the one model of a trainer, which the pipeline calls one by one."""

    @property
    def first(self) -> Any:
        return next(iter(self.values()))

    @property
    def config(self) -> Any:
        """Configuration of the first one."""
        return self.first.config

    @property
    def peft_config(self) -> Any:
        """Adapters of the first one, which are those of the other too."""
        return getattr(self.first, "peft_config", None)


def model_of(pipeline: Any, names: Sequence[str]) -> nn.Module:
    """All that is trained, as one module."""
    models = {name: getattr(pipeline, name) for name in names}
    return Denoisers(models) if len(models) > 1 else models[names[0]]


def make_trainable(pipeline: Any, names: Sequence[str], peft_config: Any = None) -> None:
    """Freeze a pipeline except for what is trained, in float32: new adapters of its denoisers, or all of the denoisers."""
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
    for name in names:
        denoiser = getattr(pipeline, name)
        if getattr(denoiser, "peft_config", None):
            raise ValueError(
                f"`pipeline.{name}` has the adapters {sorted(denoiser.peft_config)} already, but would be tuned with a new one "
                "alone or in full. Merge them first: `pipeline.fuse_lora(); pipeline.unload_lora_weights()`."
            )
        if peft_config is None:
            denoiser.requires_grad_(True)
        else:
            _add_adapter(pipeline, denoiser, peft_config)
        cast_training_params(denoiser)


def _add_adapter(pipeline: Any, denoiser: Any, peft_config: Any) -> None:
    if not isinstance(peft_config, LoraConfig) or peft_config.modules_to_save:
        raise TypeError(
            f"`peft_config` is a `{type(peft_config).__name__}`"
            f"{' with `modules_to_save`' if isinstance(peft_config, LoraConfig) else ''}, but must be a plain `LoraConfig`: "
            "`pipeline.load_lora_weights` loads nothing else. Pass one, or None to train the whole denoiser."
        )
    missing = [
        method
        for owner, method in ((denoiser, "add_adapter"), (type(pipeline), "save_lora_weights"))
        if not hasattr(owner, method)
    ]
    if missing:
        raise ValueError(
            f"`peft_config` was given, but `{type(pipeline).__name__}` with `{type(denoiser).__name__}` does not support LoRA "
            f"(no `{missing[0]}`). Leave `peft_config` out to train the whole denoiser, or use another pipeline."
        )
    peft_config = copy(peft_config)
    peft_config.task_type = None  # that of language models, whatever the flags of other trainers say by default
    if peft_config.target_modules is None and not peft_config.target_parameters:
        names = [name for name, _ in denoiser.named_modules()]
        found = [layer for layer in ATTENTION if any(name.endswith(f".{layer}") for name in names)]
        peft_config.target_modules = found or "all-linear"
    try:
        denoiser.add_adapter(peft_config, adapter_name=ADAPTER_NAME)
    except ValueError as error:  # no module of that name, or not of a kind that LoRA knows
        linear = {
            module.rpartition(".")[2] for module, kind in denoiser.named_modules() if "Linear" in type(kind).__name__
        }
        raise ValueError(
            f"The adapter does not fit `{type(denoiser).__name__}`: {error} Name some of its linear layers in "
            f"`target_modules`, e.g. out of {sorted(linear)[:20]}."
        ) from error


def set_gradient_checkpointing(denoiser: Any) -> None:
    """Compute activations again in the backward pass, or warn that the denoiser cannot."""
    if getattr(denoiser, "_supports_gradient_checkpointing", False):
        denoiser.enable_gradient_checkpointing()
    else:
        logger.warning(
            f"`{type(denoiser).__name__}` does not support gradient checkpointing and is trained without. Pass "
            "`gradient_checkpointing=False` to silence this warning."
        )


def complete_config(denoiser: Any) -> None:
    """Give a denoiser's configuration the methods that reporters such as TensorBoard call on those of transformers."""
    config = denoiser.config
    object.__setattr__(config, "to_json_string", denoiser.to_json_string)
    object.__setattr__(config, "to_dict", lambda: dict(config))


def is_on_device(pipeline: Any, device: torch.device) -> bool:
    """Whether all models of a pipeline are on a device. The `device` of a pipeline is that of some of them."""
    models = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    return all(parameter.device == device for model in models for parameter in model.parameters())


def trained_state(denoiser: Any) -> dict[str, torch.Tensor]:
    """Weights of what is trained: an adapter, or the whole denoiser."""
    if getattr(denoiser, "peft_config", None):
        return get_peft_model_state_dict(denoiser, adapter_name=ADAPTER_NAME)
    return denoiser.state_dict()


def save_denoiser(pipeline: Any, name: str, folder: Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """
    Save what was trained: `pipeline.load_lora_weights(folder)` loads an adapter, with its `lora_alpha`, and that of a second
    denoiser with `subfolder="transformer_2", load_into_transformer_2=True`; `from_pretrained(folder, subfolder=name)` of the
    denoiser's class loads a whole denoiser. Of one that is split over processes, `state` is what was put together.
    """
    denoiser = getattr(pipeline, name)
    if not getattr(denoiser, "peft_config", None):
        if state is not None:
            with torch.device("meta"):
                denoiser = plain_class(denoiser).from_config(denoiser.config)
            denoiser.load_state_dict(state, assign=True)
        denoiser.save_pretrained(folder / name)
        return
    file, key = adapter_file(name, folder)
    pipeline.save_lora_weights(
        file.parent,
        **{
            f"{key}_lora_layers": trained_state(denoiser) if state is None else state,
            f"{key}_lora_adapter_metadata": denoiser.peft_config[ADAPTER_NAME].to_dict(),
        },
    )


def adapter_file(name: str, folder: Path) -> tuple[Path, str]:
    """File of a denoiser's adapter, and its name in there: diffusers takes the second one's for one of the first."""
    if name == SECOND:
        return folder / SECOND / LORA_FILE, DENOISERS[0]
    return folder / LORA_FILE, name


def load_denoiser(pipeline: Any, name: str, folder: Path) -> None:
    """Load weights that [`save_denoiser`] wrote into a pipeline that is set up for training."""
    denoiser = getattr(pipeline, name)
    if not getattr(denoiser, "peft_config", None):
        if not (folder / name / CONFIG_NAME).is_file():
            raise ValueError(
                f"{folder} has no folder `{name}` with a whole denoiser, but that is trained. Resume from a checkpoint of full "
                "tuning, or pass the `peft_config` that this one was made with."
            )
        loaded = plain_class(denoiser).from_pretrained(folder, subfolder=name).state_dict()
        for entry, value in denoiser.state_dict().items():
            fill(value, loaded[entry])
        return
    file, key = adapter_file(name, folder)
    if not file.is_file():
        raise ValueError(
            f"{folder} has no file {file.relative_to(folder)}, but an adapter of `{name}` is trained. Resume from a checkpoint "
            "of the same adapters, or leave `peft_config` out."
        )
    weights = {entry.removeprefix(f"{key}."): value for entry, value in load_file(file).items()}
    current = trained_state(denoiser)
    shapes, wanted = ({entry: value.shape for entry, value in tensors.items()} for tensors in (weights, current))
    if shapes != wanted:
        differing = sorted(entry for entry in {*shapes, *wanted} if shapes.get(entry) != wanted.get(entry))
        raise ValueError(
            f"The adapter in {file.parent} differs from the one that is trained in {len(differing)} weights (first: "
            f"{differing[:3]}). Resume with the `peft_config` that it was made with."
        )
    for entry, value in current.items():
        fill(value, weights[entry])
