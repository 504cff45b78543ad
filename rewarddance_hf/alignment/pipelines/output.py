"""What a pipeline gives: a sample of each prompt, with values in [0, 1]."""

from typing import Any

import torch


def has_processor(pipeline: Any) -> bool:
    """Whether a pipeline scales tensors by a processor of its own. Without, it may leave them as its decoder gives them."""
    return hasattr(pipeline, "image_processor") or hasattr(pipeline, "video_processor")


def scaled(pipeline: Any, images: torch.Tensor) -> torch.Tensor:
    """Tensors of a pipeline in [0, 1]: Kandinsky 2 and 3 scale arrays only, and leave tensors in [-1, 1]."""
    if has_processor(pipeline) or getattr(pipeline, "movq", None) is None:
        return images
    return (images / 2 + 0.5).clamp(0, 1)


def check_count(pipeline: Any, samples: Any, count: int) -> None:
    """Refuse pipelines that pass over all prompts of a batch but the first."""
    if len(samples) != count:
        raise ValueError(
            f"`{type(pipeline).__name__}` made {len(samples)} samples of {count} prompts, but there must be one of each. It may "
            "take one prompt at a time: set the batch size to 1."
        )
