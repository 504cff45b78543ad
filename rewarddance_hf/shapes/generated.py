"""
Prompts for a generator of shapes, how well its images match them, and preference rows out of its own samples.

A judge that has only seen clean renderings reads generated images less well: pairs of a generator's samples, labelled
by the oracle, belong to its training data.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Any

import numpy as np
import torch
from PIL import Image

from .captions import canonical_caption, caption_paraphrases, parse_caption
from .drawing import LARGE_RADIUS
from .generator import SAMPLING
from .oracle import OracleResult, check, count_broken, relation_holds
from .preferences import ALIGNMENT_CRITERIA, KIND_SHARES
from .rows import ShapesRows, draw_key, preference_row, row_rng
from .scenes import (
    ALL_COMPOSITIONS,
    COMPARISONS,
    HELD_OUT_COMPOSITIONS,
    NUMBERS,
    POSITIONS,
    TRAINING_COMPOSITIONS,
    PlacedObject,
    Scene,
    SceneObject,
    sample_scene,
)


GENERATED = "generated"
# This share of the training texts is kept for the in-domain split.
HELD_OUT_SHARE = 0.25
SAMPLING_BATCH_SIZE = 64
SAMPLES_PER_PROMPT = 6
# An image whose prompt tells what it shows is compared with the one of so many that misses least.
NUM_COMPARED = 12


class ShapesPrompts(ShapesRows):
    """
    Prompts of the shapes world, drawn when they are asked for: rows of `prompt` and `kind` (one of `KINDS`). No text is in two
    splits; `"ood"` has pairs of color and shape, and paraphrases, that no training prompt has.
    """

    name = "prompts"

    def make_row(self, rng: random.Random, index: int) -> dict[str, str]:
        kind = draw_key(rng, KIND_SHARES)
        compositions = ALL_COMPOSITIONS if self.split == "ood" else TRAINING_COMPOSITIONS
        while True:
            scene = sample_scene(rng, kind, compositions)
            prompt = rng.choice(caption_paraphrases(scene, self.split))
            if self._has(scene, prompt):
                return {"prompt": prompt, "kind": kind}

    def _has(self, scene: Scene, prompt: str) -> bool:
        if self.split == "ood":
            return bool(scene.compositions & HELD_OUT_COMPOSITIONS)
        return is_held_out(prompt) == (self.split == "id")


def is_held_out(prompt: str) -> bool:
    """Whether a prompt that is not out of domain belongs to the split `"id"`."""
    return hashlib.sha256(prompt.encode()).digest()[0] < 256 * HELD_OUT_SHARE


# ---- the oracle's view of generated images ----


def alignment_score(images: torch.Tensor | Sequence[Any], prompts: Sequence[str]) -> np.ndarray:
    """
    Share of each prompt's facts that its image shows, by the oracle: an array `(batch_size,)` of numbers from 0 to 1.

    Images are as a pipeline gives them: a tensor `(batch_size, 3, height, width)` in [0, 1], or a list of PIL images or of
    arrays with the channels last.
    """
    return np.array([result.share for result in check_images(images, prompts)])


def alignment_holds(images: torch.Tensor | Sequence[Any], prompts: Sequence[str]) -> np.ndarray:
    """Whether each image shows all that its prompt says, by the oracle; arguments as in [`alignment_score`]."""
    return np.array([result.all_hold for result in check_images(images, prompts)])


def check_images(images: torch.Tensor | Sequence[Any], prompts: Sequence[str]) -> list[OracleResult]:
    """Facts and objects of each image, by the oracle; arguments as in [`alignment_score`]."""
    if isinstance(images, torch.Tensor):
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"`images` has shape {tuple(images.shape)}, but a batch of RGB images of shape (batch_size, 3, height, "
                "width) is required. Stack the images."
            )
        if not images.isfinite().all():
            raise ValueError("`images` holds NaN or infinite pixels. Check the generator, which may have diverged.")
        images = list(images.detach().float().cpu().permute(0, 2, 3, 1).numpy())
    if len(images) != len(prompts):
        raise ValueError(
            f"`images` has {len(images)} images, but `prompts` has {len(prompts)} texts. Pass one prompt for each image."
        )
    return [check(image, prompt) for image, prompt in zip(images, prompts, strict=True)]


def describe_objects(objects: Sequence[PlacedObject], scene: Scene) -> str | None:
    """
    A caption of what an image shows, in the terms in which a prompt for `scene` asks for it (whether sizes or positions are
    named), or None where this world has no words for it: nothing, too many objects, or an unknown color or shape.
    """
    if not 0 < len(objects) <= len(NUMBERS) or any(item.color is None or item.shape is None for item in objects):
        return None
    shown = [SceneObject(item.color, item.shape) for item in objects]  # type: ignore[arg-type]
    if len(set(shown)) == 1 and len(shown) > 1:
        return canonical_caption(Scene("count", tuple(shown)))
    if len(shown) == 1:
        if scene.objects[0].size is None:
            return canonical_caption(Scene("count" if scene.kind == "count" else "single", tuple(shown)))
        size = "large" if objects[0].radius > LARGE_RADIUS else "small"
        return canonical_caption(Scene("size", (SceneObject(shown[0].color, shown[0].shape, size),)))
    if len(shown) > 2:
        return " and ".join(canonical_caption(Scene("single", (item,))) for item in shown)
    order = max(permutations(range(2)), key=lambda order: _count_named_in_place(scene, [shown[i] for i in order]))
    first, second = (objects[i] for i in order)
    named = tuple(shown[i] for i in order)
    if scene.relation is None:
        return canonical_caption(Scene("binding", named))
    relations: tuple[str, ...] = POSITIONS if scene.kind == "relation" else COMPARISONS
    relation = next((relation for relation in relations if relation_holds(relation, first, second)), None)
    if relation is None:
        return canonical_caption(Scene("binding", named))
    return canonical_caption(Scene(scene.kind, named, relation))


def _count_named_in_place(scene: Scene, shown: Sequence[SceneObject]) -> int:
    """Colors and shapes that stand where the prompt names them."""
    pairs = list(zip(scene.objects, shown, strict=False))
    return sum((wanted.color == item.color) + (wanted.shape == item.shape) for wanted, item in pairs)


# ---- preference rows out of a generator's samples ----


def sample_images(
    pipeline: Any,
    prompts: Sequence[str],
    seed: int = 0,
    batch_size: int = SAMPLING_BATCH_SIZE,
    places: Sequence[int] | None = None,
    on_progress: Callable[[int], Any] = lambda count: None,
    **sampling: Any,
) -> list[Image.Image]:
    """
    Draw one image for each prompt; `sampling` takes the place of `SAMPLING`. The noise of an image depends on the seed and its
    place only, by default that in `prompts`, and not on the batches. `on_progress` is told how many there are.
    """
    images: list[Image.Image] = []
    places = range(len(prompts)) if places is None else places
    for start in range(0, len(prompts), batch_size):
        texts = list(prompts[start : start + batch_size])
        seeds = [
            random.Random(f"noise/{seed}/{place}").getrandbits(63) for place in places[start : start + batch_size]
        ]
        generators = [torch.Generator().manual_seed(value) for value in seeds]
        images += pipeline(texts, generator=generators, **{**SAMPLING, **sampling}).images
        on_progress(len(images))
    return images


def generated_preferences(
    pipeline: Any,
    num_prompts: int,
    split: str = "train",
    seed: int = 0,
    samples_per_prompt: int = SAMPLES_PER_PROMPT,
    pairs_per_prompt: int = 3,
    batch_size: int = SAMPLING_BATCH_SIZE,
    with_described: bool = False,
    with_ties: bool = False,
) -> list[dict[str, Any]]:
    """
    Make preference rows out of a generator's samples: of two images, the chosen one shows more facts of the prompt.

    Rows are as in [`ShapesPreferences`], with the category `"generated"`; the rationale tells what the oracle sees in
    each image. First come up to `pairs_per_prompt` pairs of samples of one prompt. An image is in as few of them as possible;
    prompts for which all samples are equally right give none. With `with_described`, pairs of any samples follow: the prompt
    tells what the chosen one shows, and the rejected one misses little of it. With `with_ties`, rows have a column `tie`, and
    prompts that several samples meet give a pair of those: a judge that is tuned against must know that neither is better. So
    the number of rows is not known before.
    """
    for name, value, least in (
        ("samples_per_prompt", samples_per_prompt, 2),
        ("pairs_per_prompt", pairs_per_prompt, 1),
        ("batch_size", batch_size, 1),
    ):
        if value < least:
            raise ValueError(f"`{name}` is {value}, but must be {least} or more. Pass a larger number.")
    dataset = ShapesPrompts(num_prompts, split, seed)
    repeated = [row["prompt"] for row in dataset for _ in range(samples_per_prompt)]
    images = sample_images(pipeline, repeated, sampling_seed(split, seed), batch_size)
    return pair_samples(dataset, images, check_images(images, repeated), pairs_per_prompt, with_described, with_ties)


def sampling_seed(split: str, seed: int = 0) -> int:
    """Seed of the noise of [`generated_preferences`]."""
    return random.Random(f"{GENERATED}/{split}/{seed}").getrandbits(63)


def pair_samples(
    dataset: ShapesPrompts,
    images: Sequence[Image.Image],
    results: Sequence[OracleResult],
    pairs_per_prompt: int = 3,
    with_described: bool = False,
    with_ties: bool = False,
) -> list[dict[str, Any]]:
    """Rows of [`generated_preferences`] out of samples, of which each prompt has as many, and what the oracle sees in them."""
    prompts = [row["prompt"] for row in dataset]
    count = len(images) // len(prompts)
    split, seed = dataset.split, dataset.seed
    parts = [slice(index * count, (index + 1) * count) for index in range(len(prompts))]
    rows = []
    for index, (prompt, part) in enumerate(zip(prompts, parts, strict=True)):
        rng = row_rng(GENERATED, seed, split, index)
        rows += _pair_samples(prompt, images[part], results[part], pairs_per_prompt, rng)
    if with_described:
        for index in range(len(images)):
            rng = row_rng(f"{GENERATED}/described", seed, split, index)
            row = _pair_described(index, parse_caption(prompts[index // count]), images, results, dataset, rng)
            rows += [] if row is None else [row]
    if with_ties:
        rows = [{**row, "tie": False} for row in rows]
        for index, (prompt, part) in enumerate(zip(prompts, parts, strict=True)):
            rng = row_rng(f"{GENERATED}/ties", seed, split, index)
            rows += _pair_right_samples(prompt, images[part], results[part], rng)
    return rows


def _pair_samples(
    prompt: str,
    images: Sequence[Image.Image],
    results: Sequence[OracleResult],
    most_pairs: int,
    rng: random.Random,
) -> list[dict[str, Any]]:
    """Rows out of the samples of one prompt, first those of samples that are in no row yet."""
    scene = parse_caption(prompt)
    captions = {}
    for index, result in enumerate(results):
        caption = describe_objects(result.objects, scene)
        if caption is not None:
            captions[index] = caption
    pairs = [pair for pair in permutations(captions, 2) if results[pair[0]].broken < results[pair[1]].broken]
    rng.shuffle(pairs)
    rows: list[dict[str, Any]] = []
    uses = dict.fromkeys(captions, 0)
    while pairs and len(rows) < most_pairs:
        pair = min(pairs, key=lambda pair: uses[pair[0]] + uses[pair[1]])
        pairs.remove(pair)
        for index in pair:
            uses[index] += 1
        shown, texts = [images[index] for index in pair], [captions[index] for index in pair]
        rows.append(preference_row(prompt, shown, texts, ALIGNMENT_CRITERIA, GENERATED))
    return rows


def _pair_right_samples(
    prompt: str, images: Sequence[Image.Image], results: Sequence[OracleResult], rng: random.Random
) -> list[dict[str, Any]]:
    """A tie of two samples that show all of the prompt, if there are two."""
    right = [image for image, result in zip(images, results, strict=True) if result.all_hold]
    if len(right) < 2:
        return []
    shown = canonical_caption(parse_caption(prompt))
    row = preference_row(prompt, rng.sample(right, 2), [shown, shown], ALIGNMENT_CRITERIA, GENERATED)
    return [{**row, "tie": True}]


def _pair_described(
    index: int,
    asked: Scene,
    images: Sequence[Image.Image],
    results: Sequence[OracleResult],
    prompts: ShapesPrompts,
    rng: random.Random,
) -> dict[str, Any] | None:
    """A row whose prompt tells what an image shows, in the terms of `asked`, beside one that misses as little as possible."""
    objects = results[index].objects
    caption = describe_objects(objects, asked)
    if caption is None or (len(objects) > 2 and len({(item.color, item.shape) for item in objects}) > 1):
        return None  # no prompt of this world names three different objects
    scene = parse_caption(caption)
    prompt = rng.choice(caption_paraphrases(scene, prompts.split))
    if not prompts._has(scene, prompt) or count_broken(scene, objects):
        return None
    others = []
    for other in rng.sample(range(len(images)), min(NUM_COMPARED, len(images))):
        broken = count_broken(scene, results[other].objects)
        text = describe_objects(results[other].objects, scene) if broken else None
        if text is not None:
            others.append((broken, other, text))
    if not others:
        return None
    _, other, text = min(others)
    return preference_row(prompt, [images[index], images[other]], [caption, text], ALIGNMENT_CRITERIA, GENERATED)
