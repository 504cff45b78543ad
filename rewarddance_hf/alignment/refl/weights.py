"""Weights of a tuned denoiser on disk, in the layouts that diffusers loads."""

from copy import copy
from pathlib import Path
from typing import Any

from torch import nn

from ...import_utils import require_extra


require_extra("diffusers", "diffusers", "peft")

from diffusers.training_utils import cast_training_params  # noqa: E402
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers.utils import logging  # noqa: E402


logger = logging.get_logger(__name__)


ADAPTER_NAME = "default"
# Of an adapter that names no layers: the attention of all denoisers of diffusers, and what some add for text
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
LORA_FILE = "pytorch_lora_weights.safetensors"


def denoiser_name(pipeline: Any) -> str:
    """Name of the component that a pipeline denoises with."""
    if getattr(pipeline, "transformer_2", None) is not None:
        raise NotImplementedError(
            f"`{type(pipeline).__name__}` has two denoisers, `transformer` and `transformer_2`, but only pipelines with one "
            "can be tuned. Use a model with one, e.g. Wan 2.1."
        )
    for name in ("transformer", "unet"):
        if getattr(pipeline, name, None) is not None:
            return name
    raise ValueError(
        f"`{type(pipeline).__name__}` has neither `transformer` nor `unet` ({sorted(pipeline.components)}), but one of them "
        "is what is tuned. Pass a text-to-image or text-to-video pipeline."
    )


def make_trainable(pipeline: Any, name: str, peft_config: Any = None) -> None:
    """Freeze a pipeline except for what is trained, in float32: a new adapter of its denoiser, or all of the denoiser."""
    denoiser = getattr(pipeline, name)
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
    if getattr(denoiser, "peft_config", None):
        raise ValueError(
            f"`pipeline.{name}` has the adapters {sorted(denoiser.peft_config)} already, but would be tuned with a new one "
            "alone or in full. Merge them first: `pipeline.fuse_lora(); pipeline.unload_lora_weights()`."
        )
    if peft_config is None:
        denoiser.requires_grad_(True)
    else:
        _add_adapter(pipeline, name, denoiser, peft_config)
    cast_training_params(denoiser)


def _add_adapter(pipeline: Any, name: str, denoiser: Any, peft_config: Any) -> None:
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


def save_denoiser(pipeline: Any, name: str, folder: Path) -> None:
    """
    Save what was trained: `pipeline.load_lora_weights(folder)` loads an adapter, with its `lora_alpha`;
    `from_pretrained(folder, subfolder=name)` of the denoiser's class loads a whole denoiser.
    """
    denoiser = getattr(pipeline, name)
    if not getattr(denoiser, "peft_config", None):
        denoiser.save_pretrained(folder / name)
        return
    pipeline.save_lora_weights(
        folder,
        **{
            f"{name}_lora_layers": get_peft_model_state_dict(denoiser, adapter_name=ADAPTER_NAME),
            f"{name}_lora_adapter_metadata": denoiser.peft_config[ADAPTER_NAME].to_dict(),
        },
    )


def load_denoiser(pipeline: Any, name: str, folder: Path) -> None:
    """Load weights that [`save_denoiser`] wrote into a pipeline that is set up for training."""
    denoiser = getattr(pipeline, name)
    if not getattr(denoiser, "peft_config", None):
        if not (folder / name).is_dir():
            raise ValueError(
                f"{folder} has no folder `{name}`, but the whole denoiser is trained. Resume from a checkpoint of full "
                "tuning, or pass the `peft_config` that this one was made with."
            )
        loaded = type(denoiser).from_pretrained(folder, subfolder=name)
        denoiser.load_state_dict(loaded.state_dict())
        return
    if not (folder / LORA_FILE).is_file():
        raise ValueError(
            f"{folder} has no file {LORA_FILE}, but an adapter is trained. Resume from a checkpoint of the same adapter, or "
            "leave `peft_config` out."
        )
    weights = {key.removeprefix(f"{name}."): value for key, value in load_file(folder / LORA_FILE).items()}
    current = get_peft_model_state_dict(denoiser, adapter_name=ADAPTER_NAME)
    shapes, wanted = ({key: value.shape for key, value in tensors.items()} for tensors in (weights, current))
    if shapes != wanted:
        differing = sorted(key for key in {*shapes, *wanted} if shapes.get(key) != wanted.get(key))
        raise ValueError(
            f"The adapter in {folder} differs from the one that is trained in {len(differing)} weights (first: "
            f"{differing[:3]}). Resume with the `peft_config` that it was made with."
        )
    set_peft_model_state_dict(denoiser, weights, adapter_name=ADAPTER_NAME)
