"""Samples of a pipeline by prompt and seed."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...models.media_rewarddance import load_image
from ..pipelines.output import check_count
from ..pipelines.prompts import call


def draw(pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], condition: Any = None, **arguments: Any) -> Any:
    """Call a pipeline, with a seed for each sample."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    if condition is not None:
        arguments["image"] = load_image(condition, "condition")
    output = call(pipeline, generators, prompt=list(prompts), **arguments)
    check_count(pipeline, output[0], len(prompts))
    return output


def check_conditions(pipeline: Any, name: str, arguments: Mapping[str, Any]) -> None:
    """Check that a pipeline can be given the conditions of rows."""
    if "image" not in inspect.signature(pipeline.__call__).parameters:
        raise ValueError(
            f"`{name}` has a column `condition`, but `{type(pipeline).__name__}` takes no `image` to give it to. Use an "
            "image-to-video or editing pipeline, or remove the column."
        )
    if arguments.get("image") is not None:
        raise ValueError(
            f"`image` was given as an argument of the pipeline, but `{name}` has a column `condition` with one for each row. "
            "Leave one of the two out."
        )


def check_range(pipeline: Any, images: torch.Tensor) -> None:
    """Make sure that a reward does not get the output of a VAE before it is scaled."""
    lowest, highest = (value.item() for value in images.detach().aminmax())
    if lowest < -1e-3 or highest > 1 + 1e-3:  # NaN is told by the reward
        raise ValueError(
            f"`{type(pipeline).__name__}` gave tensors with values from {lowest:.3g} to {highest:.3g}, but rewards "
            "take images in [0, 1]. Its image processor does not scale them, or it has none: give it one that does, or tune "
            "another pipeline."
        )
