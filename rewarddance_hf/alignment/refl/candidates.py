"""Candidates of prompts, from which Best-of-N references are chosen."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from transformers.utils import logging

from ...models.media_rewarddance import load_image
from ...scoring.engine.memory import BatchLimit
from ..pipelines.prompts import differs_in_batches
from .conditions import ConditionTrial, load_conditions, reason_against
from .drawing import draw


logger = logging.get_logger(__name__)

Row = Mapping[str, Any]  # `prompt`, and `condition` where there is one
Sample = Image.Image | list[Image.Image]


def candidate_seed(seed: int, prompt: str, candidate: int) -> int:
    """Seed of 32 bits that no other candidate is likely to have."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{candidate}/{prompt}".encode()).digest()[:4], "big")


class CandidateDrawer:
    """Draws candidates in batches."""

    def __init__(self, pipeline: Any, pipeline_kwargs: Mapping[str, Any], batch_size: int) -> None:
        self.pipeline = pipeline
        self.pipeline_kwargs = pipeline_kwargs
        self.limit = BatchLimit(batch_size)
        self.condition_trial = ConditionTrial(pipeline)
        self._shares_batches: bool | None = None  # None as long as nothing was tried

    def draw(
        self, rows: Sequence[Row], names: Sequence[str], seeds: Sequence[Sequence[int]], at_least: int | None = None
    ) -> list[dict[int, Sample]]:
        """
        Candidates of each row that can be looked at, by index; no more batches once there are `at_least`. Rows without a `condition`
        share batches where a trial shows that the pipeline makes of two prompts at once what it makes of each.
        """
        samples: list[dict[int, Sample]] = [{} for _ in rows]
        drawn = [0] * len(rows)
        plain = [place for place, row in enumerate(rows) if "condition" not in row]
        if self._go_together([rows[place]["prompt"] for place in plain], [seeds[place] for place in plain]):
            for place in plain:
                drawn[place] = len(seeds[place]) if at_least is None else min(at_least, len(seeds[place]))
            places = [(place, candidate) for place in plain for candidate in range(drawn[place])]
            while places:
                batch, places = places[: self.limit.max_rows], places[self.limit.max_rows :]
                self.limit.run_in_halves(batch, lambda part: self._call(rows, names, seeds, part, samples))
        for place, row in enumerate(rows):
            start, count = drawn[place], len(seeds[place])
            while start < count and (at_least is None or len(samples[place]) < at_least):
                size = 1 if self._is_alone(row, seeds[place]) else self.limit.max_rows
                if at_least is not None:
                    size = min(size, at_least - len(samples[place]))
                alone = [(place, candidate) for candidate in range(start, min(start + size, count))]
                start += len(alone)
                self.limit.run_in_halves(alone, lambda part: self._call(rows, names, seeds, part, samples))
        return samples

    def _go_together(self, prompts: Sequence[str], seeds: Sequence[Sequence[int]]) -> bool:
        """Whether candidates of several prompts can be drawn by one call of the pipeline."""
        other = next((place for place, prompt in enumerate(prompts) if prompt != prompts[0]), None)
        if other is None or differs_in_batches(self.pipeline, self.pipeline_kwargs, prompts):
            return False
        if self._shares_batches is None:
            first, second = (prompts[0], seeds[0][0]), (prompts[other], seeds[other][0])

            def draw_some(*chosen: tuple[str, int]) -> torch.Tensor:
                some, own_seeds = zip(*chosen, strict=True)
                return draw(self.pipeline, some, own_seeds, **{**self.pipeline_kwargs, "output_type": "pt"})[0]

            alone, exchanged = [draw_some(first), draw_some(second)], draw_some((prompts[0], second[1]))
            reason = reason_against(self.pipeline, "prompt", alone, exchanged, lambda: draw_some(first, second))
            self._shares_batches = reason is None
            how = "together" if reason is None else f"one by one, as {reason}"
            logger.info(f"Candidates of several prompts are drawn {how}.")
        return self._shares_batches

    def _is_alone(self, row: Row, seeds: Sequence[int]) -> bool:
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

    def _call(
        self,
        rows: Sequence[Row],
        names: Sequence[str],
        seeds: Sequence[Sequence[int]],
        batch: Sequence[tuple[int, int]],
        samples: list[dict[int, Sample]],
    ) -> None:
        """Put those of a batch of places of rows and candidates among the samples that can be looked at."""
        prompts = [rows[place]["prompt"] for place, _ in batch]
        chosen = [seeds[place][candidate] for place, candidate in batch]
        has_conditions = "condition" in rows[batch[0][0]]
        conditions = load_conditions([rows[place]["condition"] for place, _ in batch]) if has_conditions else None
        arguments = {**self.pipeline_kwargs, "output_type": "pt"}
        output = draw(self.pipeline, prompts, chosen, conditions, **arguments)
        images = output[0]
        if len(images) != len(batch):
            raise ValueError(
                f"The pipeline made {len(images)} samples of {len(batch)} prompts, but must make one of each. Leave out "
                f"what multiplies them; got the arguments {sorted(arguments)}."
            )
        blanked = output.get("nsfw_content_detected") or [False] * len(batch)
        for (place, candidate), image, is_blank in zip(batch, images, blanked, strict=True):
            if is_blank or not image.isfinite().all():
                reason = "was blanked by the safety checker" if is_blank else "has pixels that are NaN or infinite"
                logger.warning(f"Candidate {candidate} of `{names[place]}` is left out: it {reason}.")
            else:
                samples[place][candidate] = _as_images(image)


def _as_images(pixels: torch.Tensor) -> Sample:
    """Image of shape `(3, height, width)`, or clip with frames first."""
    if pixels.ndim == 4:
        return [load_image(frame.float().clamp(0, 1)) for frame in pixels]
    return load_image(pixels.float().clamp(0, 1))
