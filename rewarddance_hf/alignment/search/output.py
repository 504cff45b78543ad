"""Images of a search in the type that was asked for."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from ...import_utils import require_extra


require_extra("diffusers", "diffusers")

from diffusers.image_processor import VaeImageProcessor  # noqa: E402


OUTPUT_TYPES = ("pil", "pt", "np")


def output_type_of(pipeline: Any, pipeline_kwargs: Mapping[str, Any]) -> str:
    """Type of the images that a call asks for. Refuses arguments that the pipeline does not take, and other types."""
    signature = inspect.signature(type(pipeline).__call__).parameters
    unknown = sorted(set(pipeline_kwargs) - set(signature))
    if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.values()):
        raise TypeError(f"`{type(pipeline).__name__}` takes no argument `{unknown[0]}`. Leave it out.")
    output_type = pipeline_kwargs.get("output_type", "pil")
    if output_type not in OUTPUT_TYPES:
        raise ValueError(
            f"`output_type` is {output_type!r}, but must be one of {OUTPUT_TYPES}: images are to be judged."
        )
    return output_type


def convert(image: torch.Tensor, output_type: str) -> Any:
    """Convert an image `(3, height, width)` or a clip with frames first to the type that was asked for, as pipelines do."""
    if output_type == "pt":
        return image
    frames = VaeImageProcessor.pt_to_numpy(image if image.ndim == 4 else image[None])
    converted = frames if output_type == "np" else VaeImageProcessor.numpy_to_pil(frames)
    return converted if image.ndim == 4 else converted[0]
