"""Tests of the exact oracle, measured on many renderings."""

import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from rewarddance_hf.shapes.captions import caption_paraphrases, parse_caption
from rewarddance_hf.shapes.drawing import IN_DOMAIN, OUT_OF_DOMAIN, Nuisance, render_scene
from rewarddance_hf.shapes.oracle import check, check_facts, detect_objects, relation_holds
from rewarddance_hf.shapes.scenes import (
    ALL_COMPOSITIONS,
    COLORS,
    KINDS,
    NUMBERS,
    OPPOSITES,
    SHAPES,
    PlacedObject,
    Scene,
    sample_scene,
)


# Shares are measured on fewer images in `make test`.
SWEEP = [pytest.param(0.1, id="some"), pytest.param(1.0, id="all", marks=pytest.mark.slow)]


def accepted_share(count: int, nuisance: Nuisance, split: str = "train", wrong: bool = False, size: int = 32) -> float:
    """Share of renderings accepted for their own caption, or for one that is wrong in a single thing."""
    rng = random.Random(11)
    accepted = 0
    for index in range(count):
        scene = sample_scene(rng, KINDS[index % len(KINDS)], ALL_COMPOSITIONS)
        wanted = minimally_wrong(scene, rng) if wrong else scene
        image = render_scene(scene, rng, nuisance, size)
        accepted += check(image, rng.choice(caption_paraphrases(wanted, split))).all_hold
    return accepted / count


def minimally_wrong(scene: Scene, rng: random.Random) -> Scene:
    """Change one color, one shape, the number, the size or the relation, apart from the package's own edits."""
    if scene.kind == "count" and rng.random() < 0.5:
        numbers = [number for number in range(1, len(NUMBERS) + 1) if abs(number - len(scene.objects)) == 1]
        return replace(scene, objects=scene.objects[:1] * rng.choice(numbers))
    if scene.relation is not None and rng.random() < 0.5:
        return replace(scene, relation=OPPOSITES[scene.relation])
    index = rng.randrange(len(scene.objects))
    item = scene.objects[index]
    if item.size is not None and rng.random() < 0.5:
        changed = replace(item, size=OPPOSITES[item.size])
    elif rng.random() < 0.5:
        changed = replace(item, color=rng.choice([color for color in COLORS if color != item.color]))
    else:
        changed = replace(item, shape=rng.choice([shape for shape in SHAPES if shape != item.shape]))
    if scene.kind == "count":
        return replace(scene, objects=(changed,) * len(scene.objects))
    return replace(scene, objects=scene.objects[:index] + (changed,) + scene.objects[index + 1 :])


@pytest.mark.parametrize("part", SWEEP)
def test_true_renderings_are_accepted(part):
    """99 % of 2,000 in-domain images of every kind."""
    assert accepted_share(int(2000 * part), IN_DOMAIN) >= 0.99


@pytest.mark.parametrize("part", SWEEP)
def test_minimally_wrong_captions_are_refused(part):
    """At most 1 % of 2,000 captions with one wrong fact are accepted."""
    assert accepted_share(int(2000 * part), IN_DOMAIN, wrong=True) <= 0.01


@pytest.mark.parametrize("part", SWEEP)
def test_out_of_domain_images_and_paraphrases_are_read(part):
    """The split that training never sees is judged as exactly."""
    assert accepted_share(int(600 * part), OUT_OF_DOMAIN, split="ood") >= 0.98
    assert accepted_share(int(600 * part), OUT_OF_DOMAIN, split="ood", wrong=True) <= 0.02


@pytest.mark.parametrize("part", SWEEP)
@pytest.mark.parametrize(
    ("changes", "least"),
    [
        ({"noise": (0.03, 0.03)}, 0.99),
        ({"noise": (0.06, 0.06)}, 0.99),
        ({"noise": (0.1, 0.1)}, 0.98),
        ({"blur": (0.6, 0.6)}, 0.99),
        ({"blur": (1.0, 1.0)}, 0.97),
        ({"resolution": (0.5, 0.5)}, 0.97),
    ],
)
def test_mild_defects_do_not_change_the_verdict(changes, least, part):
    """Images from a small generator are noisy and soft: a judge of facts must not mind."""
    assert accepted_share(int(300 * part), replace(IN_DOMAIN, **changes)) >= least
    assert accepted_share(int(300 * part), replace(IN_DOMAIN, **changes), wrong=True) <= 0.02


@pytest.mark.parametrize("size", [48, 64])
def test_larger_images_are_read(size):
    """The oracle works at one resolution and reduces others to it."""
    assert accepted_share(100, IN_DOMAIN, size=size) >= 0.99
    assert accepted_share(100, IN_DOMAIN, wrong=True, size=size) <= 0.01


def test_facts_are_named_and_counted():
    """An image with two mistakes holds fewer facts than one with a single mistake."""
    caption = "a red circle left of a blue square"
    results = [
        check(render_scene(parse_caption(shown), random.Random(1)), caption)
        for shown in (caption, "a red circle right of a blue square", "a red triangle right of a blue square")
    ]
    assert list(results[0].facts) == ["number", "color 1", "shape 1", "color 2", "shape 2", "relation"]
    assert [result.broken for result in results] == [0, 1, 2]
    assert results[0].all_hold
    assert [result.share for result in results] == pytest.approx([1, 5 / 6, 4 / 6])
    assert [name for name, holds in results[2].facts.items() if not holds] == ["shape 1", "relation"]


def test_objects_are_matched_for_the_most_facts():
    """Which of two objects is the one that a caption means is decided in the image's favor."""
    scene = parse_caption("a red circle and a blue square")
    objects = [PlacedObject("blue", "square", 0.2, 0.5, 0.1), PlacedObject("red", "triangle", 0.8, 0.5, 0.1)]
    facts = check_facts(scene, objects)
    assert [name for name, holds in facts.items() if not holds] == ["shape 1"]
    assert sum(check_facts(scene, objects[:1]).values()) == 2
    assert not any(check_facts(scene, []).values())


def test_missing_and_additional_objects_break_the_number():
    """A crowd is not a single object."""
    crowd = render_scene(parse_caption("four red circles"), random.Random(0))
    assert [name for name, holds in check(crowd, "a red circle").facts.items() if not holds] == ["number"]
    empty = Image.new("RGB", (32, 32), (40, 40, 40))
    assert detect_objects(empty) == ()
    assert check(empty, "a red circle").share == 0


@pytest.mark.parametrize("figure", ["bar", "cross", "crescent", "half", "lobes", "filled"])
def test_unknown_shapes_are_no_guess(figure):
    """What is none of this world is reported as such, not as its nearest neighbor: neither blobs nor a filled image."""
    y, x = np.mgrid[:32, :32] - 15.5
    angle, radius = np.arctan2(y, x), np.hypot(x, y)
    mask = {
        "bar": (abs(y) < 2) & (abs(x) < 12),
        "cross": ((abs(y) < 2.5) | (abs(x) < 2.5)) & (np.maximum(abs(x), abs(y)) < 8),
        "crescent": (radius < 8) & (np.hypot(x - 4, y) > 7),
        "half": (radius < 8) & (y < 0),
        "lobes": radius < 7 + 2.5 * np.cos(5 * angle),
        "filled": np.maximum(abs(x), abs(y)) < 14,
    }[figure]
    image = np.full((32, 32, 3), 40, dtype=np.uint8)
    image[mask] = COLORS["red"]
    assert [(item.color, item.shape) for item in detect_objects(image)] == [("red", None)]


def test_arrays_and_images_agree():
    """Float arrays in [0, 1], integer arrays and images give one verdict."""
    image = render_scene(parse_caption("two blue squares"), random.Random(0))
    array = np.asarray(image)
    assert detect_objects(image) == detect_objects(array) == detect_objects(array.astype(np.float32) / 255)


def test_relations_hold_along_their_own_axis():
    """Mostly above is not left of."""
    first, second = PlacedObject("red", "circle", 0.2, 0.2, 0.1), PlacedObject("red", "circle", 0.8, 0.4, 0.2)
    assert relation_holds("left of", first, second)
    assert relation_holds("right of", second, first)
    assert not relation_holds("above", first, second)
    assert relation_holds("smaller than", first, second)
    assert not relation_holds("larger than", first, second)


def test_wrong_arguments_are_named():
    """Errors say what was given and what to do."""
    with pytest.raises(ValueError, match="only captions of the shapes world"):
        check(Image.new("RGB", (32, 32)), "a cat")
    with pytest.raises(ValueError, match=r"`image` has shape \(3, 32, 32\)"):
        detect_objects(np.zeros((3, 32, 32)))
