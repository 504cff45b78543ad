"""Tests of prompts, alignment scores and preference rows for a generator."""

import random
import re

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset

from rewarddance_hf.data.rows import PreferenceRows
from rewarddance_hf.shapes.captions import canonical_caption, parse_caption
from rewarddance_hf.shapes.drawing import render_scene
from rewarddance_hf.shapes.generated import (
    ShapesPrompts,
    alignment_holds,
    alignment_score,
    describe_objects,
    generated_preferences,
    sample_images,
)
from rewarddance_hf.shapes.generator import load_generator
from rewarddance_hf.shapes.oracle import check, detect_objects
from rewarddance_hf.shapes.preferences import ShapesPreferences
from rewarddance_hf.shapes.scenes import HELD_OUT_COMPOSITIONS, KINDS, sample_scene


@pytest.fixture(scope="module")
def pipeline():
    return load_generator()


@pytest.fixture(scope="module")
def rows(pipeline):
    return generated_preferences(pipeline, 24, seed=5, samples_per_prompt=4)


@pytest.fixture(scope="module")
def described(pipeline, rows):
    """Rows whose prompts tell what a sample shows, which come after those of one prompt."""
    more = generated_preferences(pipeline, 24, seed=5, samples_per_prompt=4, with_described=True)
    assert [row["prompt"] for row in more[: len(rows)]] == [row["prompt"] for row in rows]
    return more[len(rows) :]


def rendered(count):
    rng = random.Random(0)
    scenes = [sample_scene(rng, KINDS[index % len(KINDS)]) for index in range(count)]
    return scenes, [render_scene(scene, rng) for scene in scenes]


# ---- prompts ----


def test_no_prompt_is_in_two_splits():
    """A tuned generator is measured on texts that tuning did not see."""
    prompts = {
        split: {row["prompt"] for seed in range(2) for row in ShapesPrompts(1000, split, seed)}
        for split in ("train", "id", "ood")
    }
    assert not prompts["train"] & prompts["id"]
    assert not prompts["train"] & prompts["ood"]
    assert not prompts["id"] & prompts["ood"]
    for split, texts in prompts.items():
        for scene in map(parse_caption, texts):
            assert bool(scene.compositions & HELD_OUT_COMPOSITIONS) == (split == "ood")


def test_prompts_depend_on_split_seed_and_index_only():
    """The same row comes back from a longer dataset; other seeds give others."""
    first, longer = ShapesPrompts(50, seed=1), ShapesPrompts(500, seed=1)
    assert [first[i] for i in range(50)] == [longer[i] for i in range(50)]
    assert first[-1] == first[49]
    assert [first[i] for i in range(50)] != [ShapesPrompts(50, seed=2)[i] for i in range(50)]
    assert {row["kind"] for row in longer} == set(KINDS)
    assert all(parse_caption(row["prompt"]).kind == row["kind"] for row in longer)


# ---- the oracle on generated images ----


def test_scores_are_those_of_the_oracle():
    """Images, arrays and tensors of one content get one score, which falls with each broken fact."""
    scenes, images = rendered(20)
    right = [canonical_caption(scene) for scene in scenes]
    wrong = right[1:] + right[:1]
    arrays = [np.asarray(image) for image in images]
    tensor = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 255
    assert alignment_holds(images, right).mean() > 0.9
    for prompts in (right, wrong):
        expected = [check(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        for form in (images, arrays, tensor, tensor.double().requires_grad_()):
            assert alignment_score(form, prompts).tolist() == [result.share for result in expected]
            assert alignment_holds(form, prompts).tolist() == [result.all_hold for result in expected]


def test_descriptions_are_true_and_name_what_the_prompt_asks_for():
    """A rendered scene is described by its own caption, in the order of the prompt."""
    scenes, images = rendered(100)
    described = [describe_objects(detect_objects(image), scene) for image, scene in zip(images, scenes, strict=True)]
    wanted = [canonical_caption(scene) for scene in scenes]
    assert np.mean([a == b for a, b in zip(described, wanted, strict=True)]) > 0.95


@pytest.mark.parametrize(
    ("shown", "asked", "expected"),
    [
        ("two red circles", "a red circle and a blue square", "two red circles"),
        ("a red circle", "two red circles", "one red circle"),
        ("a red circle", "a small blue square", "a small red circle"),
        ("a blue square and a red circle", "a red circle and a blue square", "a red circle and a blue square"),
        ("a red circle above a blue square", "a blue square above a red circle", "a blue square below a red circle"),
        ("a red circle larger than a blue square", "a red circle smaller than a blue square", None),
    ],
)
def test_descriptions_of_other_scenes(shown, asked, expected):
    """Wrong images are described in the prompt's terms too."""
    objects = detect_objects(render_scene(parse_caption(shown), random.Random(0)))
    assert describe_objects(objects, parse_caption(asked)) == (expected or shown)


def test_images_without_words_are_not_described():
    """Nothing is said of an empty image, or of an object of no known shape."""
    scene = parse_caption("a red circle")
    assert describe_objects((), scene) is None
    bar = np.full((32, 32, 3), 40, dtype=np.uint8)
    bar[14:18, 2:30] = (225, 40, 40)
    assert describe_objects(detect_objects(bar), scene) is None


# ---- preference rows ----


def test_chosen_images_show_more(rows, described):
    """The oracle prefers every chosen image, and the rationales say what it sees."""
    assert len(rows) > 10
    reference = ShapesPreferences(1)[0]
    for row in [*rows, *described]:
        assert {key: type(value) for key, value in row.items()} == {
            key: type(value)
            for key, value in {**reference, "chosen": row["chosen"], "rejected": row["chosen"]}.items()
        }
        assert row["category"] == "generated"
        chosen, rejected = (check(row[name], row["prompt"]) for name in ("chosen", "rejected"))
        assert chosen.broken < rejected.broken
        scene = parse_caption(row["prompt"])
        texts = [describe_objects(result.objects, scene) for result in (rejected, chosen)]
        assert row["rationale"]["yes"] == "Image 1: {}. Image 2: {}.".format(*texts)
        assert row["rationale"]["no"] == "Image 1: {1}. Image 2: {0}.".format(*texts)


def test_described_images_show_their_prompt(described):
    """A sample can be right for another prompt than its own, which no held-out split has."""
    assert len(described) > 48
    held_out = {row["prompt"] for split in ("id", "ood") for row in ShapesPrompts(300, split)}
    for row in described:
        assert alignment_holds([row["chosen"], row["rejected"]], [row["prompt"]] * 2).tolist() == [True, False]
        assert row["prompt"] not in held_out


def test_rows_do_not_depend_on_the_batches(pipeline, rows):
    """Sampling is reproducible from the seed alone, whatever fits in memory."""
    again = generated_preferences(pipeline, 24, seed=5, samples_per_prompt=4, batch_size=33)
    assert [row["prompt"] for row in again] == [row["prompt"] for row in rows]
    for row, other in zip(rows, again, strict=True):
        difference = np.asarray(row["chosen"], dtype=int) - np.asarray(other["chosen"])
        assert np.abs(difference).max() <= 1
    prompts = ["a red circle"] * 2
    assert sample_images(pipeline, prompts)[0].tobytes() != sample_images(pipeline, prompts)[1].tobytes()


def test_pairs_of_a_prompt_use_its_samples_evenly(rows):
    """At most three rows of a prompt, and no sample in all of them while others wait."""
    by_prompt = {}
    for row in rows:
        by_prompt.setdefault(row["prompt"], []).append(row)
    for group in by_prompt.values():
        assert (
            len({row[name].tobytes() for row in group[:2] for name in ("chosen", "rejected")}) >= 3 or len(group) < 2
        )


def test_rows_mix_with_rendered_ones(rows):
    """One training dataset holds both kinds."""
    mixed = PreferenceRows(ConcatDataset([ShapesPreferences(10), rows]), "train_dataset")
    assert len(mixed) == 10 + len(rows)
    assert set(mixed[0]) == set(mixed[len(mixed) - 1])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ShapesPrompts(3, split="test"), ValueError, "`split` is 'test'"),
        (lambda: ShapesPrompts(2.5), TypeError, "`num_rows` is 2.5"),
        (lambda: ShapesPrompts(3)[3], IndexError, "`index` is 3"),
        (lambda: alignment_score(torch.zeros(3, 32, 32), ["a red circle"]), ValueError, re.escape("(3, 32, 32)")),
        (lambda: alignment_score(torch.zeros(2, 3, 32, 32), ["a red circle"]), ValueError, "`images` has 2 images"),
        (lambda: alignment_score(torch.zeros(1, 3, 32, 32), ["a cat"]), ValueError, "`caption` is 'a cat'"),
        (lambda: generated_preferences(None, 3, samples_per_prompt=1), ValueError, "`samples_per_prompt` is 1"),
        (lambda: generated_preferences(None, 3, pairs_per_prompt=0), ValueError, "`pairs_per_prompt` is 0"),
        (lambda: generated_preferences(None, 3, batch_size=0), ValueError, "`batch_size` is 0"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    """An error says which argument is wrong and what it holds, before anything is drawn."""
    with pytest.raises(error, match=message):
        call()


def test_nan_images_are_refused():
    """A diverged generator does not get a score."""
    with pytest.raises(ValueError, match="NaN"):
        alignment_score(torch.full((1, 3, 32, 32), torch.nan), ["a red circle"])


def test_ties_show_the_same_prompt_twice_right(pipeline, rows):
    """Ties are two different images that both show all of their prompt, and other rows stay as they are."""
    more = generated_preferences(pipeline, 24, seed=5, samples_per_prompt=4, with_ties=True)
    assert [{**row, "tie": False} for row in rows] == more[: len(rows)]
    ties = more[len(rows) :]
    assert ties
    assert all(row["tie"] for row in ties)
    for row in ties:
        assert row["chosen"] is not row["rejected"]
        assert alignment_holds([row["chosen"], row["rejected"]], [row["prompt"]] * 2).all()
        shown = canonical_caption(parse_caption(row["prompt"]))
        assert shown in row["rationale"]["yes"]
