"""Conditions of rows: the image that a pipeline is given beside the prompt, and how many of them it takes at once."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image, ImageStat
from transformers.utils import logging

from ...models.media_rewarddance import load_image


logger = logging.get_logger(__name__)

# How much a sample may change with the size of its batch, by rounding, over how much it changes with the condition
LARGEST_CHANGE = 0.1


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


def load_conditions(conditions: Sequence[Any]) -> list[Image.Image]:
    """Conditions of rows as images of Pillow."""
    return [load_image(condition, "condition") for condition in conditions]


class ConditionTrial:
    """
    Whether a pipeline makes of several conditions at once what it makes of each. Pipelines disagree about lists of images: some take one
    for each prompt, some show all of them to each prompt, some take the first or none. The first call finds out, by samples of two
    rows that are made alone and together: these may differ by a small part of what another condition changes.
    """

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.holds: bool | None = None  # None as long as nothing was tried

    def run(self, condition: Any, draw: Callable[[Sequence[int], list[Image.Image]], torch.Tensor]) -> bool:
        """
        Args:
            condition:
                Condition of a row.
            draw (`Callable`):
                Makes samples, as a tensor, of two rows or one of them, by their indices (0 and 1) and conditions.

        Returns:
            `bool`: Whether conditions can be given together.
        """
        if self.holds is None:
            reason = self._reason_against(load_image(condition, "condition"), draw)
            self.holds = reason is None
            how = "together" if self.holds else f"one by one, as {reason}"
            logger.info(f"Rows with a `condition` are sampled {how}.")
        return self.holds

    def _reason_against(self, image: Image.Image, draw: Callable[..., torch.Tensor]) -> str | None:
        """What keeps conditions apart, if anything does."""
        other = _unlike(image)
        alone, exchanged = [draw([0], [image]), draw([1], [other])], draw([1], [image])
        return reason_against(self.pipeline, "condition", alone, exchanged, lambda: draw([0, 1], [image, other]))


def reason_against(
    pipeline: Any,
    what: str,
    alone: Sequence[torch.Tensor],
    exchanged: torch.Tensor,
    draw_together: Callable[[], torch.Tensor],
) -> str | None:
    """
    What keeps two samples of a pipeline apart, if anything does: `alone` are both, `exchanged` is the second with the condition or prompt of the
    first, which is `what` differs.
    """
    name = type(pipeline).__name__
    try:
        together = draw_together()
    except Exception as error:  # whatever a pipeline says to what it is not made for
        return f"`{name}` failed with two at once: {type(error).__name__}: {error}"
    both = torch.cat(list(alone))
    if together.shape != both.shape:
        return f"`{name}` makes samples of the shape {tuple(together.shape)} of two, not {tuple(both.shape)}"
    effect = _distances(alone[1], exchanged).max().item()
    change = _distances(together, both).max().item()
    if not change <= LARGEST_CHANGE * effect:  # nor if one is NaN
        return f"samples of `{name}` change by {change:.2g} with two at once, and by {effect:.2g} with the {what}"
    return None


def _distances(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Mean difference of pixels, by sample."""
    return (ours.float() - theirs.float()).abs().flatten(1).mean(dim=1)


def fit_together(conditions: Sequence[Image.Image]) -> bool:
    """Whether conditions are of one size, which decides on that of the result in some pipelines."""
    return len({condition.size for condition in conditions}) == 1


def _unlike(image: Image.Image) -> Image.Image:
    """A plain image of the same size that nobody takes for `image`."""
    brightness = ImageStat.Stat(image.convert("L")).mean[0]
    return Image.new("RGB", image.size, "black" if brightness > 127 else "white")
