"""Candidates of a prompt, from which Best-of-N references are chosen."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from transformers.utils import logging

from ...models.media_rewarddance import load_image
from ...scoring.engine.memory import BatchLimit
from ..pipelines.prompts import differs_in_batches
from .conditions import ConditionTrial, load_conditions
from .drawing import draw


logger = logging.get_logger(__name__)


def candidate_seed(seed: int, prompt: str, candidate: int) -> int:
    """Seed of 32 bits that no other candidate is likely to have."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{candidate}/{prompt}".encode()).digest()[:4], "big")


class CandidateDrawer:
    """Draws candidates of a prompt in batches."""

    def __init__(self, pipeline: Any, pipeline_kwargs: Mapping[str, Any], batch_size: int) -> None:
        self.pipeline = pipeline
        self.pipeline_kwargs = pipeline_kwargs
        self.limit = BatchLimit(batch_size)
        self.condition_trial = ConditionTrial(pipeline)

    def draw(
        self, row: Mapping[str, Any], name: str, seeds: Sequence[int], at_least: int | None = None
    ) -> dict[int, list[Image.Image] | Image.Image]:
        """Candidates that can be looked at, by index; no more batches once there are `at_least`."""
        samples: dict[int, Any] = {}
        start = 0
        while start < len(seeds) and (at_least is None or len(samples) < at_least):
            size = 1 if self._is_alone(row, seeds) else self.limit.max_rows
            if at_least is not None:
                size = min(size, at_least - len(samples))
            batch = list(range(start, min(start + size, len(seeds))))
            start = batch[-1] + 1
            self.limit.run_in_halves(batch, lambda part: samples.update(self._call(row, name, seeds, part)))
        return samples

    def _is_alone(self, row: Mapping[str, Any], seeds: Sequence[int]) -> bool:
        """Whether each candidate needs a call of the pipeline of its own."""
        is_single = min(self.limit.max_rows, len(seeds)) == 1
        if is_single or differs_in_batches(self.pipeline, self.pipeline_kwargs, [row["prompt"]]):
            return True
        if "condition" not in row:
            return False

        def draw_some(indices: Sequence[int], conditions: Any) -> torch.Tensor:
            arguments = {**self.pipeline_kwargs, "output_type": "pt"}
            prompts, chosen = [row["prompt"]] * len(indices), [seeds[index] for index in indices]
            return draw(self.pipeline, prompts, chosen, conditions, **arguments)[0]

        return not self.condition_trial.run(row["condition"], draw_some)

    def _call(self, row: Mapping[str, Any], name: str, seeds: Sequence[int], batch: Sequence[int]) -> dict[int, Any]:
        prompts, chosen = [row["prompt"]] * len(batch), [seeds[candidate] for candidate in batch]
        conditions = load_conditions([row["condition"]] * len(batch)) if "condition" in row else None
        arguments = {**self.pipeline_kwargs, "output_type": "pt"}
        output = draw(self.pipeline, prompts, chosen, conditions, **arguments)
        images = output[0]
        if len(images) != len(batch):
            raise ValueError(
                f"The pipeline made {len(images)} samples of {len(batch)} prompts, but must make one of each. Leave out "
                f"what multiplies them; got the arguments {sorted(arguments)}."
            )
        blanked = output.get("nsfw_content_detected") or [False] * len(batch)
        samples = {}
        for candidate, image, is_blank in zip(batch, images, blanked, strict=True):
            if is_blank or not image.isfinite().all():
                reason = "was blanked by the safety checker" if is_blank else "has pixels that are NaN or infinite"
                logger.warning(f"Candidate {candidate} of `{name}` is left out: it {reason}.")
            else:
                samples[candidate] = _as_images(image)
        return samples


def _as_images(pixels: torch.Tensor) -> Image.Image | list[Image.Image]:
    """Image of shape `(3, height, width)`, or clip with frames first."""
    if pixels.ndim == 4:
        return [load_image(frame.float().clamp(0, 1)) for frame in pixels]
    return load_image(pixels.float().clamp(0, 1))
