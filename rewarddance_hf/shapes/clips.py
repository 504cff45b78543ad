"""
Clips of colored shapes whose truth is known: motion, direction, speed and order of appearance, and faults in time.

A clip has [`NUM_FRAMES`] frames with one object each. What makes one clip better than the other is never in a single
frame: the faulty clip has the same places, colors and shapes at other times, or other ones of those that the prompt
leaves open. In the categories of [`ORDERED_CATEGORIES`] both clips even have the same frames, in another order. But who
knows that a frame is the first or the last can tell which object comes first, or where a motion starts; and beside the
given first frame of an image-to-video row, one later frame may show that the object is another, or has moved.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from .clip_scenes import CLOCK, DIRECTIONS, MANNERS, PACES, TURNS, ClipScene, clip_paraphrases
from .drawing import IN_DOMAIN, OUT_OF_DOMAIN, QUARTERS, RADIUS_RANGES, Nuisance, draw_objects
from .preferences import ALIGNMENT_CRITERIA
from .rows import ShapesRows, draw_key, preference_row
from .scenes import ALL_COMPOSITIONS, HELD_OUT_COMPOSITIONS, TRAINING_COMPOSITIONS, PlacedObject, require_member


NUM_FRAMES = 4
# Category of a row -> its share, for each task. A first frame that is given decides where an object goes when it may
# go one way only, and what comes first: such rows are for text-to-video.
CATEGORY_SHARES = {
    "text-to-video": {
        "direction": 0.2,
        "turn": 0.2,
        "order": 0.15,
        "motion": 0.15,
        "pace": 0.1,
        "swap": 0.1,
        "flicker": 0.1,
    },
    "image-to-video": {"turn": 0.25, "motion": 0.2, "pace": 0.1, "swap": 0.1, "flicker": 0.1, "first frame": 0.25},
}
ORDERED_CATEGORIES = ("direction", "turn", "order")


class ShapesClipPreferences(ShapesRows):
    """
    Preference rows about clips of colored shapes, made when they are asked for.

    A row holds `prompt` (`str`), `chosen` and `rejected` (lists of [`NUM_FRAMES`] `PIL.Image.Image`), `task`, `criteria`
    (`str`), `rationale` (a `dict` with the texts that follow the verdicts `"yes"` and `"no"`) and `category`; rows of
    `"image-to-video"` also `condition`, the given first frame.

    Arguments are those of [`ShapesRows`], and `task`, whose rows take turns when it is left out. With `shuffled` the frames of
    each clip come in an order of their own, drawn at random. Rows of [`ORDERED_CATEGORIES`] cannot be decided then, and are
    the only ones.
    """

    name = "clips"

    def __init__(
        self,
        num_rows: int,
        split: str = "train",
        task: str | None = None,
        seed: int = 0,
        size: int = 32,
        shuffled: bool = False,
    ) -> None:
        super().__init__(num_rows, split, seed, size)
        if task is not None:
            require_member("task", task, CATEGORY_SHARES)
        self.tasks = (task,) if task else tuple(CATEGORY_SHARES)
        self.shuffled = shuffled

    def make_row(self, rng: random.Random, index: int) -> dict[str, Any]:
        task = self.tasks[index % len(self.tasks)]
        row = make_clip_preference(rng, self.split, task, self.size)
        if self.shuffled:
            while row["category"] not in ORDERED_CATEGORIES:
                row = make_clip_preference(rng, self.split, task, self.size)
            # The reasons tell of frames in their order.
            row = {name: value for name, value in row.items() if name != "rationale"}
            row |= {name: rng.sample(row[name], NUM_FRAMES) for name in ("chosen", "rejected")}
        return row


@dataclass(frozen=True)
class ClipPlan:
    """What a clip shows: place, and color and shape, in each frame."""

    path: tuple[tuple[float, float], ...]
    names: tuple[tuple[str, str], ...]

    @property
    def description(self) -> str:
        """
        What each frame shows: a place, and the object where it is another than before. Words like "turns left" would follow
        from prompt and verdict, so that a judge could learn to write them without looking.
        """
        words = []
        for (x, y), name, before in zip(self.path, self.names, (None, *self.names), strict=False):
            place = f"{'above' if y < 0.5 else 'below'} {'left' if x < 0.5 else 'right'}"
            words.append(place if name == before else f"{' '.join(name)} {place}")
        return ", ".join(words)


def make_clip_preference(rng: random.Random, split: str, task: str, size: int = 32) -> dict[str, Any]:
    """Make one row of [`ShapesClipPreferences`], with frames of `size` x `size` pixels."""
    nuisance = OUT_OF_DOMAIN if split == "ood" else IN_DOMAIN
    category = draw_key(rng, CATEGORY_SHARES[task])
    given = task == "image-to-video"
    scene, chosen, rejected = plan_pair(category, given, split, rng)
    radius = rng.uniform(*RADIUS_RANGES[None])
    jitter = 0.05 * nuisance.position_jitter
    shifts = [(rng.uniform(-jitter, jitter), rng.uniform(-jitter, jitter)) for _ in range(2)]
    looks = [rng.getrandbits(64) for _ in range(2)]
    if given:  # both clips go on from the same image, each in its own way
        shifts[1], looks[1] = shifts[0], looks[0]
    clips = [
        draw_plan(plan, radius, shift, look, nuisance, size)
        for plan, shift, look in zip((chosen, rejected), shifts, looks, strict=True)
    ]
    prompt = rng.choice(clip_paraphrases(scene, split))
    words = chosen.description, rejected.description
    row = preference_row(prompt, clips, words, ALIGNMENT_CRITERIA, category, task)
    return {**row, "condition": clips[0][0].copy()} if given else row


def plan_pair(category: str, given: bool, split: str, rng: random.Random) -> tuple[ClipScene, ClipPlan, ClipPlan]:
    """What a prompt says, a clip that shows it, and one that does not; both go on from one image if it is `given`."""
    name, other = _draw_names(split, rng)
    if category == "order":
        scene = ClipScene("order", (name, other))
        switch = rng.randint(1, NUM_FRAMES - 1)
        names = (name,) * switch + (other,) * (NUM_FRAMES - switch)
        plans = [
            ClipPlan((place,) * NUM_FRAMES, shown)
            for place, shown in ((rng.choice(CLOCK), names), (rng.choice(CLOCK), names[::-1]))
        ]
        return scene, plans[0], plans[1]

    full = _draw_scene(category, given, name, rng)
    start = rng.randrange(4)
    chosen = _plan(full, start, (name,) * NUM_FRAMES, rng)
    rejected_start = start if given else rng.randrange(4)
    if category in ("direction", "turn", "pace"):
        others = [manner for manner in MANNERS[full.kind] if manner != full.manner]
        if category == "direction":
            opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
            others = [opposite[full.manner]]
        wrong = replace(full, manner=rng.choice(others))
        return full, chosen, _plan(wrong, rejected_start, chosen.names, rng)
    if category == "motion":
        wrong = _draw_scene("motion", given, name, rng, moving=full.kind == "stay")
        return full, chosen, _plan(wrong, rejected_start, chosen.names, rng)
    # What changes, or differs from the given first frame, is what the prompt leaves open.
    open_color = name[1] == other[1]
    scene = replace(full, objects=((None, name[1]) if open_color else (name[0], None),))
    if category == "first frame":
        return scene, chosen, _plan(full, start, (other,) * NUM_FRAMES, rng)
    pattern = (0, 0, 1, 1) if category == "swap" else (0, 1, 0, 1)
    names = tuple((name, other)[i] for i in pattern)
    return scene, chosen, _plan(full, rejected_start, names, rng)


def _draw_names(split: str, rng: random.Random) -> tuple[tuple[str, str], tuple[str, str]]:
    """Two pairs of color and shape of which exactly one part is the same."""
    allowed = ALL_COMPOSITIONS if split == "ood" else TRAINING_COMPOSITIONS
    while True:
        name = rng.choice(sorted(HELD_OUT_COMPOSITIONS) if split == "ood" else allowed)
        same = rng.randrange(2)
        others = [pair for pair in allowed if pair[same] == name[same] and pair != name]
        if others:
            return name, rng.choice(others)


def _draw_scene(
    category: str, given: bool, name: tuple[str, str], rng: random.Random, moving: bool | None = None
) -> ClipScene:
    if category == "motion":
        moving = rng.random() < 0.5 if moving is None else moving
        kinds = ["turn"] if moving else ["stay"]
    else:
        kinds = {"direction": ["move"], "turn": ["turn"], "pace": ["pace"]}.get(category, ["turn", "stay"])
    kind = rng.choice(kinds)
    return ClipScene(kind, (name,), rng.choice(MANNERS[kind]))


def _plan(scene: ClipScene, start: int, names: tuple[tuple[str, str], ...], rng: random.Random) -> ClipPlan:
    if scene.kind == "move":
        along = np.array(DIRECTIONS[scene.manner])
        across = np.array([rng.choice(QUARTERS)] * 2) * (1 - np.abs(along))
        ends = np.abs(along) * 0.5 + across
        reach = (QUARTERS[1] - QUARTERS[0]) / 2
        path = [tuple(ends + along * share) for share in np.linspace(-reach, reach, NUM_FRAMES)]
    else:
        pace = PACES[scene.manner] if scene.kind == "pace" else float(scene.kind == "turn")
        side = TURNS[scene.manner] if scene.kind == "turn" else rng.choice((-1, 1))
        path = [CLOCK[(start + side * int(pace * frame)) % 4] for frame in range(NUM_FRAMES)]
    return ClipPlan(tuple((float(x), float(y)) for x, y in path), names)


def draw_plan(
    plan: ClipPlan, radius: float, shift: tuple[float, float], look: int, nuisance: Nuisance, size: int
) -> list[Image.Image]:
    """Frames of a clip. Places are off by `shift`; `look` is the seed of ground, colors and noise."""
    return [
        # Each frame starts from the same seed: ground, colors and noise stay as they are.
        draw_objects([PlacedObject(*name, x + shift[0], y + shift[1], radius)], random.Random(look), nuisance, size)
        for (x, y), name in zip(plan.path, plan.names, strict=True)
    ]
