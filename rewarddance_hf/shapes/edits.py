"""
Edits of shapes whose truth is known: a source image, an instruction, an edit that does what it says and leaves the rest, and
one that does not.

The rejected image of a row breaks the facts of its category by the oracle of edits, and no others:

- `"instruction"`: what is asked for is not done, or something else is done to the right object.
- `"object"`: it is done to another object, or another one is added or removed.
- `"rest"`: it is done, and something else has changed too: another object, or more of the object itself.
- `"quality"`: it is done, but drawn worse.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from PIL import Image

from .drawing import IN_DOMAIN, OUT_OF_DOMAIN, QUARTER_REACH, QUARTERS, Nuisance, add_noise, draw_objects
from .edit_instructions import EDITS, Edit, instruction_paraphrases
from .edit_oracle import check_edit_facts
from .models import PROMPT_TEXTS
from .preferences import ALIGNMENT_CRITERIA, DEGRADATIONS, QUALITY_CRITERIA, SHARP
from .rows import ShapesRows, draw_key, preference_row
from .scenes import ALL_COMPOSITIONS, HELD_OUT_COMPOSITIONS, TRAINING_COMPOSITIONS, PlacedObject


# What is wrong with the rejected image -> share of the rows.
CATEGORY_SHARES = {"instruction": 0.3, "object": 0.3, "rest": 0.25, "quality": 0.15}
# Facts that it breaks; of "rest" one of them.
BROKEN_FACTS = {
    "instruction": ({"instruction"},),
    "object": ({"instruction", "others"},),
    "rest": ({"others"}, {"target"}),
    "quality": (set[str](),),
}
SMALL_RADIUS, LARGE_RADIUS = (0.14, 0.155), (0.2, 0.215)
SIZE_RATIO = 1.4
LARGE_SHARE = 0.25  # of source images with one large object
STEP = QUARTERS[1] - QUARTERS[0]

# Wording of a judge of edits: that of images, whose words the base model knows.
EDIT_TEXTS = {**PROMPT_TEXTS, "instruction": PROMPT_TEXTS["prompt"], "source_image": PROMPT_TEXTS["condition"]}

Objects = tuple[PlacedObject, ...]


class ShapesEdits(ShapesRows):
    """
    Preference rows about edits of colored shapes, made when they are asked for; arguments are those of [`ShapesRows`].

    A row holds `prompt` (`str`, the instruction), `condition` (`PIL.Image.Image`, the source image), `chosen` and `rejected`
    (`PIL.Image.Image`), `task` (`"image-editing"`), `criteria` (`str`), `rationale` (a `dict` with the texts that follow the
    verdicts `"yes"` and `"no"`), `category` (one of `CATEGORY_SHARES`) and `edit` (one of `EDITS`).
    """

    name = "edits"

    def make_row(self, rng: random.Random, index: int) -> dict[str, Any]:
        return make_edit_preference(rng, self.split, self.size)


def make_edit_preference(rng: random.Random, split: str, size: int = 32) -> dict[str, Any]:
    """Make one row of [`ShapesEdits`], with images of `size` x `size` pixels."""
    nuisance = OUT_OF_DOMAIN if split == "ood" else IN_DOMAIN
    category = draw_key(rng, CATEGORY_SHARES)
    edit, source, chosen, rejected = plan_edits(category, split, rng)
    prompt = rng.choice(instruction_paraphrases(edit, split))
    look = rng.getrandbits(64)
    worse, defect, endings = nuisance, "", ("", "")
    if category == "quality":
        defect = rng.choice(list(DEGRADATIONS))
        worse = replace(nuisance, **DEGRADATIONS[defect])
        endings = (f", {SHARP}", f", {defect}")
    condition, *samples = (
        draw_like(objects, look, rng, conditions, size)
        for objects, conditions in ((source, nuisance), (chosen, nuisance), (rejected, worse))
    )
    words = [describe(objects) + ending for objects, ending in zip((chosen, rejected), endings, strict=True)]
    criteria = QUALITY_CRITERIA if defect else ALIGNMENT_CRITERIA
    row = preference_row(prompt, samples, words, criteria, category, "image-editing")
    return {**row, "condition": condition, "edit": edit.kind}


def plan_edits(category: str, split: str, rng: random.Random) -> tuple[Edit, Objects, Objects, Objects]:
    """Edit, and the objects of the source image, of the right edit, and of one whose fault is that of the category."""
    allowed = set(ALL_COMPOSITIONS if split == "ood" else TRAINING_COMPOSITIONS)
    kind = rng.choice(list(EDITS))
    while True:
        source = _draw_source(split, rng)
        edit = _draw_edit(kind, source, rng)
        edited = _apply(edit, source, rng)
        if edited is None or not _is_drawable(edited) or not all(check_edit_facts(edit, source, edited).values()):
            continue
        wrong = _spoil(category, edit, source, edited, rng)
        if wrong is None or not _is_drawable(wrong):
            continue
        facts = check_edit_facts(edit, source, wrong)
        broken = {name for name, holds in facts.items() if not holds}
        shown = {(item.color, item.shape) for item in (*source, *edited, *wrong)}
        is_held_out = bool(shown & HELD_OUT_COMPOSITIONS)
        if broken in BROKEN_FACTS[category] and shown <= allowed and is_held_out == (split == "ood"):
            return edit, source, edited, wrong


def draw_like(
    objects: Sequence[PlacedObject], look: int, rng: random.Random, nuisance: Nuisance, size: int
) -> Image.Image:
    """
    Draw objects on the ground that the seed `look` gives: images of one look differ in their objects and in noise only.
    Colors are those of the world without jitter, which would follow from the order of the objects.
    """
    image = draw_objects(objects, random.Random(look), replace(nuisance, noise=(0.0, 0.0), color_jitter=0.0), size)
    return add_noise(image, rng.uniform(*nuisance.noise), rng)


def describe(objects: Sequence[PlacedObject]) -> str:
    """What an image shows, quarter by quarter: place, size and name of each object."""
    words = []
    for item in sorted(objects, key=lambda item: (item.y > 0.5, item.x > 0.5)):
        size = "large " if item.radius > (SMALL_RADIUS[1] + LARGE_RADIUS[0]) / 2 else ""
        place = f"{'above' if item.y < 0.5 else 'below'} {'left' if item.x < 0.5 else 'right'}"
        words.append(f"{size}{item.color} {item.shape} {place}")
    return ", ".join(words)


# ---- sources and edits ----


def _draw_source(split: str, rng: random.Random) -> Objects:
    """Two or three objects that differ, in quarters of their own; one may be large."""
    count = rng.choice((2, 3))
    names = rng.sample(ALL_COMPOSITIONS if split == "ood" else TRAINING_COMPOSITIONS, count)
    cells = rng.sample([(x, y) for x in QUARTERS for y in QUARTERS], count)
    large = rng.randrange(count) if rng.random() < LARGE_SHARE else None
    objects = []
    for number, (name, (x, y)) in enumerate(zip(names, cells, strict=True)):
        radius = rng.uniform(*(LARGE_RADIUS if number == large else SMALL_RADIUS))
        room = (QUARTER_REACH - radius) * 0.6
        objects.append(PlacedObject(*name, x + rng.uniform(-room, room), y + rng.uniform(-room, room), radius))
    return tuple(objects)


def _draw_edit(kind: str, objects: Objects, rng: random.Random) -> Edit:
    """Any edit of a kind that these objects allow."""
    if kind != "add":
        return _edit_of(kind, rng.choice(objects), rng)
    names = {(item.color, item.shape) for item in objects}
    return Edit(kind, *rng.choice([name for name in ALL_COMPOSITIONS if name not in names]))


def _edit_of(kind: str, target: PlacedObject, rng: random.Random) -> Edit:
    """Any edit of a kind that is not `"add"`, of this object."""
    is_large = target.radius >= LARGE_RADIUS[0]
    values = {"size": ("smaller" if is_large else "larger",)}.get(kind, EDITS[kind])
    return Edit(
        kind, str(target.color), str(target.shape), rng.choice([value for value in values if value != target.color])
    )


def _apply(edit: Edit, objects: Objects, rng: random.Random) -> Objects | None:
    """The objects after an edit; None where there is no place for a new one."""
    target = next((item for item in objects if (item.color, item.shape) == edit.name), None)
    others = tuple(item for item in objects if item is not target)
    if edit.kind == "add":
        free = [(x, y) for x in QUARTERS for y in QUARTERS if not any(_is_in(item, x, y) for item in objects)]
        return (*others, PlacedObject(*edit.name, *rng.choice(free), rng.uniform(*SMALL_RADIUS))) if free else None
    if target is None:
        return None
    if edit.kind == "remove":
        return others
    if edit.kind == "color":
        changed = replace(target, color=edit.value)
    elif edit.kind == "size":
        ratio = SIZE_RATIO if edit.value == "larger" else 1 / SIZE_RATIO
        changed = replace(target, radius=target.radius * ratio)
    else:
        x, y = {"left": (-STEP, 0), "right": (STEP, 0), "up": (0, -STEP), "down": (0, STEP)}[str(edit.value)]
        changed = replace(target, x=target.x + x, y=target.y + y)
    return (*others, changed)


def _spoil(category: str, edit: Edit, source: Objects, edited: Objects, rng: random.Random) -> Objects | None:
    """An edit with the fault of a category, or None if there is none."""
    target = next((item for item in source if (item.color, item.shape) == edit.name), None)
    others = [item for item in source if item is not target]
    if category == "quality":
        return edited
    if category == "instruction":
        if target is None or edit.kind == "remove" or rng.random() < 0.5:
            return (*others, target) if target is not None else tuple(others)
        return _apply(_edit_of(edit.kind, target, rng), source, rng)
    if category == "object":
        if edit.kind == "add":
            return _apply(_draw_edit("add", source, rng), source, rng)
        other = rng.choice(others)
        value = edit.value if edit.kind != "size" else _edit_of("size", other, rng).value
        if edit.kind == "color" and other.color == value:
            return None
        return _apply(Edit(edit.kind, str(other.color), str(other.shape), value), source, rng)
    return _apply(_draw_edit(rng.choice(list(EDITS)), edited, rng), edited, rng) if edited else None


def _is_in(item: PlacedObject, x: float, y: float) -> bool:
    return (item.x > 0.5) == (x > 0.5) and (item.y > 0.5) == (y > 0.5)


def _is_drawable(objects: Objects) -> bool:
    """Whether all objects are within the image, each has a name of its own, and no two touch."""
    inside = all(item.radius <= min(item.x, item.y, 1 - item.x, 1 - item.y) for item in objects)
    apart = all(
        max(abs(a.x - b.x), abs(a.y - b.y)) >= a.radius + b.radius + 0.03
        for i, a in enumerate(objects)
        for b in objects[:i]
    )
    return inside and apart and len({(item.color, item.shape) for item in objects}) == len(objects)
