"""Prompts for a generator of clips of shapes, its samples, and how well they match the prompts."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from .clip_generator import CLIP_SAMPLING
from .clip_oracle import ClipOracleResult, check_clip
from .clip_scenes import clip_paraphrases
from .clips import CATEGORY_SHARES, ClipPlan, draw_plan, plan_pair
from .drawing import GENERATOR_STYLE, RADIUS_RANGES
from .generated import SAMPLING_BATCH_SIZE, is_held_out
from .preferences import ALIGNMENT_CRITERIA
from .rows import ShapesRows, draw_key
from .scenes import require_member


class ShapesClipPrompts(ShapesRows):
    """
    Prompts for clips, drawn when they are asked for: rows of `prompt`, `task`, `criteria` and `category` (`str`), and for
    `"image-to-video"` `condition`, the given first frame, as the generator draws. No text is in two splits.

    Arguments are those of [`ShapesRows`], and `task`, `"text-to-video"` or `"image-to-video"`.
    """

    name = "clip prompts"

    def __init__(
        self, num_rows: int, split: str = "train", task: str = "text-to-video", seed: int = 0, size: int = 32
    ) -> None:
        super().__init__(num_rows, split, seed, size)
        require_member("task", task, CATEGORY_SHARES)
        self.task = task

    def make_row(self, rng: random.Random, index: int) -> dict[str, Any]:
        category, prompt, plan, _ = plan_prompt(rng, self.task, self.split)
        row: dict[str, Any] = {
            "prompt": prompt,
            "task": self.task,
            "criteria": ALIGNMENT_CRITERIA,
            "category": category,
        }
        if self.task == "image-to-video":
            row["condition"] = draw_clip(plan, rng, self.size)[0]
        return row


def plan_prompt(rng: random.Random, task: str, split: str) -> tuple[str, str, ClipPlan, ClipPlan]:
    """A category, a prompt of it that belongs to the split, a clip that shows what it says, and one that does not."""
    while True:
        category = draw_key(rng, CATEGORY_SHARES[task])
        scene, right, wrong = plan_pair(category, task == "image-to-video", split, rng)
        prompt = rng.choice(clip_paraphrases(scene, split))
        if split == "ood" or is_held_out(prompt) == (split == "id"):
            return category, prompt, right, wrong


def draw_clip(plan: ClipPlan, rng: random.Random, size: int = 32) -> list[Image.Image]:
    """Frames of a clip as the generator draws."""
    jitter = 0.05 * GENERATOR_STYLE.position_jitter
    shift = rng.uniform(-jitter, jitter), rng.uniform(-jitter, jitter)
    return draw_plan(plan, rng.uniform(*RADIUS_RANGES[None]), shift, rng.getrandbits(64), GENERATOR_STYLE, size)


def check_clips(clips: torch.Tensor, rows: Sequence[dict[str, Any]]) -> list[ClipOracleResult]:
    """Facts of each of `clips` `(batch_size, num_frames, 3, height, width)` in [0, 1], by the oracle, for rows of prompts."""
    if not clips.isfinite().all():
        raise ValueError("`clips` holds NaN or infinite pixels. Check the generator, which may have diverged.")
    frames = clips.detach().float().cpu().permute(0, 1, 3, 4, 2).numpy()
    return [
        check_clip(list(clip), row["prompt"], row.get("condition")) for clip, row in zip(frames, rows, strict=True)
    ]


def sample_clips(
    pipeline: Any,
    rows: Sequence[dict[str, Any]],
    seed: int = 0,
    batch_size: int = SAMPLING_BATCH_SIZE,
    on_progress: Callable[[int], Any] = lambda count: None,
    **sampling: Any,
) -> torch.Tensor:
    """
    Draw one clip for each row of prompts: `(num_rows, num_frames, 3, height, width)` in [0, 1]. `sampling` takes the place of
    `CLIP_SAMPLING`. The noise of a clip depends on the seed and its place only, and not on the batches. `on_progress` is told how
    many there are.
    """
    clips: list[torch.Tensor] = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        seeds = [random.Random(f"noise/{seed}/{start + index}").getrandbits(63) for index in range(len(batch))]
        conditions = [row["condition"] for row in batch if "condition" in row]
        output = pipeline(
            prompt=[row["prompt"] for row in batch],
            generator=[torch.Generator().manual_seed(value) for value in seeds],
            output_type="pt",
            **{**CLIP_SAMPLING, **({"image": conditions} if conditions else {}), **sampling},
        )
        clips += output.frames
        on_progress(len(clips))
    return torch.stack(clips)


def clip_preferences(
    pipeline: Any,
    prompts: Sequence[dict[str, Any]],
    seed: int = 0,
    samples_per_prompt: int = 4,
    pairs_per_prompt: int = 2,
) -> list[dict[str, Any]]:
    """
    Preference rows about a generator's own clips: of two for one prompt, the chosen one shows all of it and the rejected one does not,
    by the oracle. Prompts whose samples are all right, or all wrong, give none.
    """
    repeated = [row for row in prompts for _ in range(samples_per_prompt)]
    clips = sample_clips(pipeline, repeated, seed)
    holds = np.array([result.all_hold for result in check_clips(clips, repeated)]).reshape(-1, samples_per_prompt)
    frames = (255 * clips.clamp(0, 1)).round().byte().permute(0, 1, 3, 4, 2).numpy()
    rows = []
    for index, (row, right) in enumerate(zip(prompts, holds, strict=True)):
        first = index * samples_per_prompt
        for k in range(min(pairs_per_prompt, right.sum(), (~right).sum())):
            pair = {
                name: [Image.fromarray(frame) for frame in frames[first + np.flatnonzero(held)[k]]]
                for name, held in (("chosen", right), ("rejected", ~right))
            }
            rows.append({**row, **pair})
    return rows
