"""Samples of a pipeline by prompt and seed."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from ..pipelines.output import check_count
from ..pipelines.prompts import call


def draw(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    conditions: Sequence[Image.Image] | None = None,
    **arguments: Any,
) -> Any:
    """Call a pipeline, with a seed for each sample, and an image where `conditions` are given."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    if conditions is not None:
        arguments["image"] = conditions[0] if len(prompts) == 1 else list(conditions)
    output = call(pipeline, generators, prompt=list(prompts), **arguments)
    check_count(pipeline, output[0], len(prompts))
    return output


def check_range(pipeline: Any, images: torch.Tensor) -> None:
    """Make sure that a reward does not get the output of a VAE before it is scaled."""
    lowest, highest = (value.item() for value in images.detach().aminmax())
    if lowest < -1e-3 or highest > 1 + 1e-3:  # NaN is told by the reward
        raise ValueError(
            f"`{type(pipeline).__name__}` gave tensors with values from {lowest:.3g} to {highest:.3g}, but rewards "
            "take images in [0, 1]. Its image processor does not scale them, or it has none: give it one that does, or tune "
            "another pipeline."
        )
