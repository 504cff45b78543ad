"""Pairs of images whose label depends on the criteria: one shows what the prompt says, the other is drawn better."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from .captions import canonical_caption, caption_paraphrases
from .drawing import IN_DOMAIN, draw_objects, place_objects
from .oracle import check_facts
from .preferences import ALIGNMENT_CRITERIA, DEGRADATIONS, KIND_SHARES, QUALITY_CRITERIA, SHARP, break_scene
from .rows import ShapesRows, draw_key, preference_row
from .scenes import TRAINING_COMPOSITIONS, sample_scene


class ShapesOpposingCriteria(ShapesRows):
    """
    Preference rows in which the same pair comes twice, with opposite labels under different criteria.

    The image that is chosen in an even row, for what it shows, is noisy, blurred or coarse. It is the rejected one of
    the next row, which asks for image quality. Whoever is not told the criteria gets exactly one row of each pair wrong.

    Rows are those of [`~rewarddance_hf.shapes.preferences.ShapesPreferences`], with the category `"alignment"` or
    `"quality"`; arguments are those of [`ShapesRows`], with an even number of rows, and without the split `"ood"`.
    """

    name = "opposing"
    splits = ("train", "id")
    rows_per_draw = 2

    def __init__(self, num_rows: int, split: str = "train", seed: int = 0, size: int = 32) -> None:
        super().__init__(num_rows, split, seed, size)
        if num_rows % 2:
            raise ValueError(f"`num_rows` is {num_rows}, but each pair has two rows. Pass an even number.")

    def make_row(self, rng: random.Random, index: int) -> dict[str, Any]:
        return _make_pair(rng, self.size)[index % 2]


def _make_pair(rng: random.Random, size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    scene = sample_scene(rng, draw_key(rng, KIND_SHARES), TRAINING_COMPOSITIONS)
    prompt = rng.choice(caption_paraphrases(scene))
    defect = rng.choice(list(DEGRADATIONS))
    right = place_objects(scene, rng)
    while True:
        broken = break_scene(scene, rng)
        wrong = place_objects(broken, rng)
        if not all(check_facts(scene, wrong).values()):
            break
    images = [
        draw_objects(right, rng, replace(IN_DOMAIN, **DEGRADATIONS[defect]), size),
        draw_objects(wrong, rng, IN_DOMAIN, size),
    ]
    captions = [canonical_caption(shown) for shown in (scene, broken)]
    drawn = [f"{captions[0]}, {defect}", f"{captions[1]}, {SHARP}"]
    return (
        preference_row(prompt, images, captions, ALIGNMENT_CRITERIA, "alignment"),
        preference_row(prompt, images[::-1], drawn[::-1], QUALITY_CRITERIA, "quality"),
    )
