"""Tests of preference rows: true by construction, and no leak between the splits."""

import hashlib
import re
import subprocess
import sys

import pytest

from rewarddance_hf.shapes.captions import caption_paraphrases, parse_caption
from rewarddance_hf.shapes.oracle import check
from rewarddance_hf.shapes.preferences import (
    CATEGORIES,
    DEGRADATIONS,
    QUALITY_CRITERIA,
    ShapesCaptions,
    ShapesPreferences,
)
from rewarddance_hf.shapes.rows import SPLITS
from rewarddance_hf.shapes.scenes import COLORS, HELD_OUT_COMPOSITIONS, SHAPES


NUM_ROWS = 2000
DIGEST_CODE = """
import hashlib
from rewarddance_hf.shapes.preferences import ShapesPreferences
row = ShapesPreferences(100, split="id", seed=4)[37]
text = row["prompt"] + row["category"] + row["rationale"]["yes"]
print(hashlib.sha256(row["chosen"].tobytes() + row["rejected"].tobytes() + text.encode()).hexdigest())
"""


@pytest.fixture(scope="module")
def rows():
    """Rows of each split, made once."""
    return {split: list(ShapesPreferences(NUM_ROWS, split=split)) for split in SPLITS}


def shown_scenes(row):
    """Scenes of the rejected and the chosen image, read from the rationale of "yes"."""
    texts = re.fullmatch(r"Image 1: (.+)\. Image 2: (.+)\.", row["rationale"]["yes"]).groups()
    return [parse_caption(text.split(",")[0]) for text in texts]


@pytest.mark.parametrize("split", SPLITS)
def test_rows_have_the_schema(rows, split):
    """Every row has every key, and the two rationales describe the two orders of one pair."""
    for row in rows[split]:
        assert set(row) == {"prompt", "chosen", "rejected", "task", "criteria", "rationale", "category"}
        assert row["task"] == "text-to-image"
        assert row["category"] in CATEGORIES
        assert row["chosen"].size == row["rejected"].size == (32, 32)
        pattern = r"Image 1: (.+)\. Image 2: (.+)\."
        first, second = re.fullmatch(pattern, row["rationale"]["yes"]).groups()
        assert re.fullmatch(pattern, row["rationale"]["no"]).groups() == (second, first)


@pytest.mark.parametrize(("split", "least"), [("train", 0.99), ("id", 0.99), ("ood", 0.97)])
def test_oracle_agrees_with_rows(rows, split, least):
    """The chosen image holds more facts than the rejected one, or as many in quality rows."""
    agreed = 0
    for row in rows[split][:800]:
        chosen, rejected = (check(row[name], row["prompt"]) for name in ("chosen", "rejected"))
        if row["category"] == "quality":
            agreed += chosen.all_hold and rejected.all_hold
        else:
            agreed += chosen.all_hold == (row["category"] != "graded") and chosen.broken < rejected.broken
    assert agreed >= least * 800


def test_rationales_tell_what_images_show(rows):
    """What the rationale says of an image is read from its pixels too."""
    agreed = 0
    for row in rows["train"][:300]:
        texts = re.fullmatch(r"Image 1: (.+)\. Image 2: (.+)\.", row["rationale"]["yes"]).groups()
        pairs = zip(texts, (row["rejected"], row["chosen"]), strict=True)
        agreed += all(check(image, text.split(",")[0]).all_hold for text, image in pairs)
    assert agreed >= 294


@pytest.mark.parametrize("split", SPLITS)
def test_every_category_is_asked(rows, split):
    """Breakdowns by category rest on enough rows, and graded and quality rows stay a minority."""
    counts = {category: sum(row["category"] == category for row in rows[split]) / NUM_ROWS for category in CATEGORIES}
    assert min(counts.values()) > 0.02
    assert 0.1 < counts["graded"] < 0.3
    assert 0.1 < counts["quality"] < 0.2


def test_quality_rows_name_the_defect_and_ask_for_quality(rows):
    """Only these rows differ in drawing, and their criteria say so."""
    for row in rows["train"]:
        quality = row["category"] == "quality"
        assert (row["criteria"] == QUALITY_CRITERIA) == quality
        if quality:
            first, second = row["rationale"]["yes"][:-1].split(". Image 2: ")
            assert first.split(", ")[1] in DEGRADATIONS
            assert second.split(", ")[1] == "clear"


@pytest.mark.parametrize("split", ["train", "id"])
def test_held_out_compositions_do_not_leak(rows, split):
    """Neither captions nor images, right or wrong, show a pair of color and shape that is held out."""
    for row in rows[split]:
        prompt = parse_caption(row["prompt"])
        assert row["prompt"] in caption_paraphrases(prompt, "train")
        for scene in (prompt, *shown_scenes(row)):
            assert not scene.compositions & HELD_OUT_COMPOSITIONS
    for row in rows[split][:200]:
        for name in ("chosen", "rejected"):
            if row["category"] != "quality":
                found = {(item.color, item.shape) for item in check(row[name], row["prompt"]).objects}
                assert not found & HELD_OUT_COMPOSITIONS


def test_captions_do_not_leak():
    """The rows for pre-training keep to the training compositions and paraphrases, and are true."""
    agreed = 0
    for row in ShapesCaptions(1000):
        scene = parse_caption(row["caption"])
        assert row["caption"] in caption_paraphrases(scene, "train")
        assert not scene.compositions & HELD_OUT_COMPOSITIONS
        agreed += check(row["image"], row["caption"]).all_hold
    assert agreed >= 990


def test_out_of_domain_rows_are_new_in_every_way(rows):
    """Each prompt names a held-out pair, in a paraphrase that training never uses."""
    for row in rows["ood"]:
        scene = parse_caption(row["prompt"])
        assert scene.compositions & HELD_OUT_COMPOSITIONS
        assert row["prompt"] in caption_paraphrases(scene, "ood")


def test_captions_and_images_give_no_hint_of_the_answer(rows):
    """Chosen and rejected images show each color, shape and number about as often: the prompt is needed."""
    shown = {"rejected": [], "chosen": []}
    for row in rows["train"]:
        if row["category"] != "quality":
            for name, scene in zip(shown, shown_scenes(row), strict=True):
                shown[name].append(scene)
    for color in COLORS:
        shares = [sum(color in str(scene) for scene in scenes) / len(scenes) for scenes in shown.values()]
        assert abs(shares[0] - shares[1]) < 0.06
    for shape in SHAPES:
        shares = [sum(shape in str(scene) for scene in scenes) / len(scenes) for scenes in shown.values()]
        assert abs(shares[0] - shares[1]) < 0.06


def test_rows_depend_on_split_seed_and_index_only():
    """The same row comes back whatever was asked before; other splits, seeds and indices give others."""
    row = ShapesPreferences(10)[3]
    again = ShapesPreferences(40_000)[3]
    assert row["chosen"].tobytes() == again["chosen"].tobytes()
    assert row["rationale"] == again["rationale"]
    others = [ShapesPreferences(10)[4], ShapesPreferences(10, seed=1)[3], ShapesPreferences(10, split="id")[3]]
    assert all(row["chosen"].tobytes() != other["chosen"].tobytes() for other in others)
    assert ShapesPreferences(10)[-1]["prompt"] == ShapesPreferences(10)[9]["prompt"]


def test_rows_are_the_same_in_every_process():
    """Loader workers and later runs see one dataset."""
    row = ShapesPreferences(100, split="id", seed=4)[37]
    text = row["prompt"] + row["category"] + row["rationale"]["yes"]
    ours = hashlib.sha256(row["chosen"].tobytes() + row["rejected"].tobytes() + text.encode()).hexdigest()
    theirs = subprocess.run(
        [sys.executable, "-c", DIGEST_CODE],
        env={"PYTHONHASHSEED": "5", "PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert theirs.stdout.strip() == ours


def test_other_sizes():
    """Rows at another resolution."""
    row = ShapesPreferences(4, size=48)[0]
    assert row["chosen"].size == row["rejected"].size == (48, 48)
    assert ShapesCaptions(4, size=48)[0]["image"].size == (48, 48)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ShapesPreferences(10, split="test"), ValueError, "`split` is 'test'"),
        (lambda: ShapesPreferences(-1), ValueError, "`num_rows` is -1"),
        (lambda: ShapesPreferences(10, seed=-1), ValueError, "`seed` is -1"),
        (lambda: ShapesPreferences(10, size=8), ValueError, "`size` is 8"),
        (lambda: ShapesPreferences("10"), TypeError, "`num_rows` is '10'"),
        (lambda: ShapesCaptions(10, seed=0.5), TypeError, "`seed` is 0.5"),
        (lambda: ShapesPreferences(10)[10], IndexError, "`index` is 10"),
    ],
)
def test_wrong_arguments_are_named(make, error, message):
    """An error says which argument is wrong and what it holds."""
    with pytest.raises(error, match=message):
        make()
