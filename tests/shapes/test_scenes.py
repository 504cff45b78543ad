"""Tests of scenes, captions and renderings."""

import hashlib
import random
import subprocess
import sys
import time

import numpy as np
import pytest

from rewarddance_hf.shapes.captions import canonical_caption, caption_paraphrases, caption_words, parse_caption
from rewarddance_hf.shapes.drawing import IN_DOMAIN, OUT_OF_DOMAIN, Nuisance, place_objects, render_scene
from rewarddance_hf.shapes.scenes import (
    ALL_COMPOSITIONS,
    COLORS,
    HELD_OUT_COMPOSITIONS,
    KINDS,
    SHAPES,
    TRAINING_COMPOSITIONS,
    Scene,
    SceneObject,
    sample_scene,
)


DIGEST_CODE = """
import hashlib, random
from rewarddance_hf.shapes.scenes import KINDS, sample_scene
from rewarddance_hf.shapes.drawing import render_scene
rng = random.Random(3)
images = [render_scene(sample_scene(rng, kind), rng).tobytes() for kind in KINDS for _ in range(5)]
print(hashlib.sha256(b"".join(images)).hexdigest())
"""


def scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = random.Random(seed)
    return [sample_scene(rng, KINDS[index % len(KINDS)], ALL_COMPOSITIONS) for index in range(count)]


@pytest.mark.parametrize("split", ["train", "id", "ood"])
def test_every_paraphrase_parses_back_to_its_scene(split):
    """No two scenes share a caption: the oracle reads from the text exactly what was meant."""
    for scene in scenes(2000):
        captions = caption_paraphrases(scene, split)
        assert len(set(captions)) == len(captions) >= 1
        for caption in captions:
            assert parse_caption(caption) == scene
            assert parse_caption(f" {caption.capitalize()}. ") == scene


def test_out_of_domain_paraphrases_are_new_orders_of_known_words():
    """A model that reads words cannot be asked for words that it never saw."""
    known = {word for scene in scenes(2000) for caption in caption_paraphrases(scene) for word in caption.split()}
    for scene in scenes(2000):
        trained, new = caption_paraphrases(scene, "train"), caption_paraphrases(scene, "ood")
        assert not set(trained) & set(new)
        assert {word for caption in new for word in caption.split()} <= known
    assert known == set(caption_words())


def test_held_out_compositions_leave_every_color_and_shape_in_training():
    """Only pairs are unknown out of domain, not their parts."""
    assert len(TRAINING_COMPOSITIONS) + len(HELD_OUT_COMPOSITIONS) == len(ALL_COMPOSITIONS)
    assert {color for color, _ in TRAINING_COMPOSITIONS} == set(COLORS)
    assert {shape for _, shape in TRAINING_COMPOSITIONS} == set(SHAPES)
    rng = random.Random(0)
    for index in range(2000):
        assert not sample_scene(rng, KINDS[index % len(KINDS)]).compositions & HELD_OUT_COMPOSITIONS


def test_out_of_domain_drawing_conditions_do_not_occur_in_domain():
    """Grounds, noise, blur and resolution come from ranges that do not meet."""
    assert OUT_OF_DOMAIN.background[0] > IN_DOMAIN.background[1]
    assert OUT_OF_DOMAIN.noise[0] > IN_DOMAIN.noise[1]
    assert OUT_OF_DOMAIN.blur[0] >= IN_DOMAIN.blur[1]
    assert OUT_OF_DOMAIN.resolution[1] <= IN_DOMAIN.resolution[0]


@pytest.mark.parametrize("size", [24, 32, 48, 64])
def test_render_gives_an_rgb_image_of_the_wanted_size(size):
    """Other resolutions show the same scene."""
    image = render_scene(parse_caption("a red circle"), random.Random(0), Nuisance(noise=(0.0, 0.0)), size)
    assert image.mode == "RGB"
    assert image.size == (size, size)
    red = (np.asarray(image).astype(int) @ [1, -1, 0] > 90).mean()
    assert 0.05 < red < 0.2


def test_objects_do_not_touch_and_stay_inside():
    """Every placement leaves a visible gap, so that pixels decide what is shown."""
    rng = random.Random(0)
    for scene in scenes(2000):
        objects = place_objects(scene, rng, OUT_OF_DOMAIN)
        for item in objects:
            assert item.radius <= min(item.x, item.y, 1 - item.x, 1 - item.y)
        for index, first in enumerate(objects):
            for second in objects[:index]:
                apart = max(abs(first.x - second.x), abs(first.y - second.y))
                assert apart > first.radius + second.radius + 0.025


def test_rendering_is_the_same_in_every_process():
    """Rows are drawn on the fly by several workers, which must agree."""
    rng = random.Random(3)
    images = [render_scene(sample_scene(rng, kind), rng).tobytes() for kind in KINDS for _ in range(5)]
    ours = hashlib.sha256(b"".join(images)).hexdigest()
    for hash_seed in ("1", "2"):
        theirs = subprocess.run(
            [sys.executable, "-c", DIGEST_CODE],
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert theirs.stdout.strip() == ours


def test_rendering_is_fast():
    """Rows are drawn while training: 0.3 ms on an idle core, the bound leaves room for a busy machine."""
    rng = random.Random(0)
    drawn = scenes(300)
    start = time.process_time()
    for scene in drawn:
        render_scene(scene, rng)
    assert (time.process_time() - start) / len(drawn) < 1.5e-3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SceneObject("orange", "circle"), "`color` is 'orange', but must be one of"),
        (lambda: SceneObject("red", "star"), "`shape` is 'star'"),
        (lambda: SceneObject("red", "circle", "huge"), "`size` is 'huge'"),
        (lambda: Scene("pair", (SceneObject("red", "circle"),)), "`kind` is 'pair'"),
        (lambda: Scene("binding", (SceneObject("red", "circle"),)), "`objects` has 1 objects"),
        (lambda: Scene("relation", (SceneObject("red", "circle"),) * 2, "near"), "`relation` is 'near'"),
        (lambda: Scene("single", (SceneObject("red", "circle"),), "above"), "`relation` is 'above'"),
        (lambda: Scene("single", (SceneObject("red", "circle", "small"),)), "`objects` has the sizes"),
        (lambda: Scene("count", (SceneObject("red", "circle"), SceneObject("red", "square"))), "`objects` differ"),
        (lambda: parse_caption("a photo of a cat"), "`caption` is 'a photo of a cat'"),
        (lambda: caption_paraphrases(parse_caption("a red circle"), "test"), "`split` is 'test'"),
        (lambda: sample_scene(random.Random(0), "pair"), "`kind` is 'pair'"),
        (lambda: render_scene(parse_caption("a red circle"), random.Random(0), size=8), "`size` is 8"),
    ],
)
def test_wrong_values_are_named(make, message):
    """An error says which argument is wrong and what it holds."""
    with pytest.raises(ValueError, match=message):
        make()


def test_canonical_captions():
    """The plain words that rationales and captions are made of."""
    for caption in (
        "a red circle",
        "one red circle",
        "four white triangles",
        "a red circle and a blue square",
        "a red circle left of a blue square",
        "a small red circle",
        "a red circle larger than a blue square",
    ):
        assert canonical_caption(parse_caption(caption)) == caption
