"""
Preference rows whose truth is known: the better image shows strictly more of the caption, or is drawn better.

A judge that only asks "does this image match?" can order a right and a wrong image. Graded rows, where one broken
fact beats two, need both images compared; in quality rows both images show the same and only the drawing differs.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from .captions import canonical_caption, caption_paraphrases
from .drawing import IN_DOMAIN, OUT_OF_DOMAIN, Nuisance, draw_objects, place_objects, render_scene
from .oracle import count_broken
from .rows import ShapesRows, draw_key, preference_row
from .scenes import (
    ALL_COMPOSITIONS,
    COLORS,
    COMPARISONS,
    HELD_OUT_COMPOSITIONS,
    KINDS,
    NUMBERS,
    OPPOSITES,
    POSITIONS,
    SHAPES,
    TRAINING_COMPOSITIONS,
    Scene,
    SceneObject,
    sample_scene,
)


CATEGORIES = ("color", "shape", "count", "relation", "size", "binding", "graded", "quality")

# What rows ask: the chosen image is right and the rejected one wrong, both are wrong, or both are equally right.
QUESTION_SHARES = {"alignment": 0.65, "graded": 0.2, "quality": 0.15}
# Relations are few: the tiny judge does not learn them, and half of its verdicts about them are wrong.
KIND_SHARES = {"single": 0.2, "count": 0.25, "binding": 0.2, "relation": 0.1, "size": 0.25}
# In this share of graded rows the rejected image has the chosen one's mistake and another, else two of its own.
GRADED_SHARED_SHARE = 0.5
# How often a scene is broken in what its kind alone says (number, binding, relation, size), not in a color or shape.
OWN_EDIT_SHARE = 0.5

ALIGNMENT_CRITERIA = "what the picture shows"
QUALITY_CRITERIA = "image quality"
# How the rejected image of a quality row is drawn, by the word that its rationale uses.
DEGRADATIONS: dict[str, dict[str, Any]] = {
    "noisy": {"noise": (0.12, 0.16)},
    "blurred": {"blur": (1.1, 1.3)},
    "coarse": {"resolution": (0.42, 0.48)},
}
SHARP = "clear"

_OWN_EDITS = {"single": (), "count": ("number",), "binding": ("swap",), "relation": ("relation",), "size": ("size",)}
_EDIT_CATEGORIES = {"number": "count", "swap": "binding", "relation": "relation", "size": "size"}


class ShapesPreferences(ShapesRows):
    """
    Preference rows about colored shapes, made when they are asked for; arguments are those of [`ShapesRows`].

    A row holds `prompt` (`str`), `chosen` and `rejected` (`PIL.Image.Image`), `task` (`"text-to-image"`), `criteria`
    (`str`), `rationale` (a `dict` with the texts that follow the verdicts `"yes"` and `"no"`) and `category` (one of
    `CATEGORIES`). The verdict is about the second image, so after `"yes"` the rejected image is image 1 and the chosen one
    image 2.
    """

    name = "preferences"

    def make_row(self, rng: random.Random, index: int) -> dict[str, Any]:
        return make_preference(rng, self.split, self.size)


class ShapesCaptions(ShapesRows):
    """
    Images of true scenes with captions, for teaching a model to see before it judges.

    A row holds `caption` (`str`) and `image` (`PIL.Image.Image`). Only compositions, paraphrases and drawing conditions of
    the training split are used.
    """

    name = "captions"

    def __init__(self, num_rows: int, seed: int = 0, size: int = 32) -> None:
        super().__init__(num_rows, "train", seed, size)

    def make_row(self, rng: random.Random, index: int) -> dict[str, Any]:
        scene = sample_scene(rng, rng.choice(KINDS))
        image = render_scene(scene, rng, IN_DOMAIN, self.size)
        return {"caption": rng.choice(caption_paraphrases(scene)), "image": image}


def make_preference(rng: random.Random, split: str, size: int = 32) -> dict[str, Any]:
    """Make one row of [`ShapesPreferences`], with images of `size` x `size` pixels."""
    nuisance = OUT_OF_DOMAIN if split == "ood" else IN_DOMAIN
    compositions = split_compositions(split)
    scene = sample_split_scene(rng, draw_key(rng, KIND_SHARES), split)
    question = draw_key(rng, QUESTION_SHARES)
    prompt = rng.choice(caption_paraphrases(scene, split))
    if question == "quality":
        return _quality_row(scene, prompt, rng, nuisance, size)
    # Random edits can cancel each other or touch held-out compositions: draw until the counted facts are as wanted.
    while True:
        chosen, rejected, category = _edit_pair(scene, question, rng)
        if not (chosen.compositions | rejected.compositions) <= set(compositions):
            continue
        placed = [place_objects(shown, rng, nuisance) for shown in (chosen, rejected)]
        broken = [count_broken(scene, objects) for objects in placed]
        if broken[0] == (question == "graded") and broken[0] < broken[1] <= broken[0] + (
            2 if category == "binding" else 1
        ):
            break
    images = [draw_objects(objects, rng, nuisance, size) for objects in placed]
    captions = [canonical_caption(shown) for shown in (chosen, rejected)]
    return preference_row(prompt, images, captions, ALIGNMENT_CRITERIA, category)


def _quality_row(scene: Scene, prompt: str, rng: random.Random, nuisance: Nuisance, size: int) -> dict[str, Any]:
    defect = rng.choice(list(DEGRADATIONS))
    images = [
        render_scene(scene, rng, conditions, size)
        for conditions in (nuisance, replace(nuisance, **DEGRADATIONS[defect]))
    ]
    caption = canonical_caption(scene)
    return preference_row(prompt, images, [f"{caption}, {SHARP}", f"{caption}, {defect}"], QUALITY_CRITERIA, "quality")


def split_compositions(split: str) -> tuple[tuple[str, str], ...]:
    """The pairs of color and shape that images of a split may show."""
    return ALL_COMPOSITIONS if split == "ood" else TRAINING_COMPOSITIONS


def sample_split_scene(rng: random.Random, kind: str, split: str) -> Scene:
    """Draw a scene of a kind for a split; one for `"ood"` holds a pair of color and shape that no training scene has."""
    if split != "ood":
        return sample_scene(rng, kind, TRAINING_COMPOSITIONS)
    while True:
        scene = sample_scene(rng, kind, ALL_COMPOSITIONS)
        if scene.compositions & HELD_OUT_COMPOSITIONS:
            return scene


# ---- edits that break facts ----


def break_scene(
    scene: Scene, rng: random.Random, own_edit_share: float = OWN_EDIT_SHARE, split: str = "train"
) -> Scene:
    """
    Change one thing of a scene, or two, within the compositions of a split; `own_edit_share` is how often that is in what the
    scene's kind alone says (number, binding, relation, size).
    """
    while True:
        broken = _apply_edit(scene, _draw_edit(scene, rng, own_edit_share), rng)
        if rng.random() < 0.3:
            broken = _apply_edit(broken, _draw_edit(broken, rng), rng)
        if broken != scene and broken.compositions <= set(split_compositions(split)):
            return broken


def _edit_pair(scene: Scene, question: str, rng: random.Random) -> tuple[Scene, Scene, str]:
    """Scenes of the chosen and the rejected image, and the row's category."""
    edit = _draw_edit(scene, rng)
    edited = _apply_edit(scene, edit, rng)
    if question == "alignment":
        return scene, edited, _EDIT_CATEGORIES.get(edit, edit.split()[0])
    start = edited if rng.random() < GRADED_SHARED_SHARE else _apply_edit(scene, _draw_edit(scene, rng), rng)
    return edited, _apply_edit(start, _draw_edit(scene, rng), rng), "graded"


def _draw_edit(scene: Scene, rng: random.Random, own_edit_share: float = OWN_EDIT_SHARE) -> str:
    own = _OWN_EDITS[scene.kind]
    if own and rng.random() < own_edit_share:
        return rng.choice(own)
    different = len(set(scene.objects))
    return f"{rng.choice(('color', 'shape'))} {rng.randint(1, different)}"


def _apply_edit(scene: Scene, edit: str, rng: random.Random) -> Scene:
    """The scene with one thing changed; unchanged where the change makes no valid scene."""
    objects = list(scene.objects)
    if edit == "number":
        numbers = [number for number in range(1, len(NUMBERS) + 1) if number != len(objects)]
        return replace(scene, objects=(objects[0],) * rng.choice(numbers))
    if edit == "relation":
        others = [position for position in POSITIONS if position != scene.relation]
        return replace(scene, relation=rng.choice([OPPOSITES[scene.relation], rng.choice(others)]))
    if edit == "size":
        if scene.relation in COMPARISONS:
            return replace(scene, relation=OPPOSITES[scene.relation])
        return replace(scene, objects=(replace(objects[0], size=OPPOSITES[objects[0].size]),))
    if edit == "swap":
        first, second = objects
        objects = [replace(first, color=second.color), replace(second, color=first.color)]
    else:
        attribute, number = edit.split()
        changed = _change_attribute(objects[int(number) - 1], attribute, rng)
        objects = [changed] * len(objects) if scene.kind == "count" else objects
        objects[int(number) - 1] = changed
    if scene.kind != "count" and len(set(objects)) < len(objects):
        return scene
    return replace(scene, objects=tuple(objects))


def _change_attribute(item: SceneObject, attribute: str, rng: random.Random) -> SceneObject:
    values = COLORS if attribute == "color" else SHAPES
    current = getattr(item, attribute)
    return replace(item, **{attribute: rng.choice([value for value in values if value != current])})
