"""Tests of edits of shapes: instructions, the oracle for edits, and rows whose rejected edit has one fault."""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import yaml

from rewarddance_hf.data.collator import DataCollatorForRewardDance
from rewarddance_hf.data.preference import check_row
from rewarddance_hf.shapes.drawing import IN_DOMAIN, draw_objects
from rewarddance_hf.shapes.edit_instructions import EDITS, Edit, instruction_paraphrases, parse_instruction
from rewarddance_hf.shapes.edit_oracle import check_edit
from rewarddance_hf.shapes.edits import BROKEN_FACTS, CATEGORY_SHARES, EDIT_TEXTS, ShapesEdits
from rewarddance_hf.shapes.models import judge_processor
from rewarddance_hf.shapes.oracle import detect_objects
from rewarddance_hf.shapes.scenes import HELD_OUT_COMPOSITIONS, PlacedObject


RED = PlacedObject("red", "circle", 0.26, 0.26, 0.15)
BLUE = PlacedObject("blue", "square", 0.74, 0.26, 0.15)
GREEN = PlacedObject("green", "circle", 0.26, 0.74, 0.15)
SOURCE = (RED, BLUE)


def image_of(*objects, size=32, seed=0):
    return draw_objects(objects, random.Random(seed), IN_DOMAIN, size)


@pytest.fixture(scope="module")
def rows():
    """Rows in and out of domain."""
    return {split: list(ShapesEdits(120, split)) for split in ("id", "ood")}


# ---- instructions ----


def edits():
    for kind, values in EDITS.items():
        for value in values:
            yield Edit(kind, "purple", "circle", value if value != "purple" else "red")


def test_instructions_are_read_back():
    """Every instruction of either split means what it was written for, and splits share none."""
    for edit in edits():
        seen, unseen = instruction_paraphrases(edit), instruction_paraphrases(edit, "ood")
        assert not set(seen) & set(unseen)
        assert len(seen) + len(unseen) == 5
        for instruction in seen + unseen:
            assert parse_instruction(f" {instruction.upper()}. ") == edit


def test_canonical_instructions():
    """The plainest words of each kind."""
    want = {
        "make the purple circle red",
        "remove the purple circle",
        "add a purple circle",
        "move the purple circle to the left",
        "make the purple circle larger",
    }
    assert want <= {instruction_paraphrases(edit)[0] for edit in edits()}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: parse_instruction("a red circle"), "`instruction` is 'a red circle'.*instruction_paraphrases"),
        (lambda: Edit("turn", "red", "circle"), "`kind` is 'turn'"),
        (lambda: Edit("color", "red", "circle", "large"), "`value` is 'large'"),
        (lambda: Edit("color", "red", "circle", "red"), "`value` is 'red', which the object is already"),
        (lambda: Edit("remove", "red", "circle", "left"), "`value` is 'left'"),
        (
            lambda: check_edit(image_of(BLUE), "remove the red circle", image_of(BLUE)),
            "source image shows 0, but there",
        ),
        (lambda: check_edit(image_of(RED), "add a red circle", image_of(RED)), "shows 1, but there must be no such"),
        (lambda: ShapesEdits(1, "test"), "`split` is 'test'"),
    ],
)
def test_invalid_arguments(make, message):
    """What is not of this world is refused by name."""
    with pytest.raises(ValueError, match=message):
        make()


# ---- the oracle ----


RECOLORED = replace(RED, color="yellow")
MOVED = replace(RED, y=0.74)
LARGER = replace(RED, radius=0.21)
ADDED = replace(GREEN, x=0.74, y=0.74)


@pytest.mark.parametrize(
    ("instruction", "result", "broken"),
    [
        ("make the red circle yellow", (RECOLORED, BLUE), set()),
        ("make the red circle yellow", (RED, BLUE), {"instruction"}),
        ("make the red circle yellow", (replace(RED, color="purple"), BLUE), {"instruction"}),
        ("make the red circle yellow", (RED, replace(BLUE, color="yellow")), {"instruction", "others"}),
        ("make the red circle yellow", (replace(MOVED, color="yellow"), BLUE), {"target"}),
        ("make the red circle yellow", (replace(LARGER, color="yellow"), BLUE), {"target"}),
        ("make the red circle yellow", (replace(RECOLORED, shape="square"), BLUE), {"target"}),
        ("make the red circle yellow", (RECOLORED, replace(BLUE, y=0.74)), {"others"}),
        ("make the red circle yellow", (RECOLORED, replace(BLUE, radius=0.21)), {"others"}),
        ("make the red circle yellow", (RECOLORED, BLUE, ADDED), {"others"}),
        ("make the red circle yellow", (RECOLORED,), {"others"}),
        ("make the red circle yellow", (BLUE,), {"instruction", "target"}),
        ("make the red circle yellow", (), {"instruction", "target", "others"}),
        ("remove the red circle", (BLUE,), set()),
        ("remove the red circle", (RED, BLUE), {"instruction"}),
        ("remove the red circle", (RED,), {"instruction", "others"}),
        ("remove the red circle", (RECOLORED, BLUE), {"instruction"}),
        ("remove the red circle", (BLUE, ADDED), {"others"}),
        ("add a green circle", (RED, BLUE, ADDED), set()),
        ("add a green circle", (RED, BLUE, GREEN), set()),
        ("add a green circle", (RED, BLUE), {"instruction"}),
        ("add a green circle", (RED, BLUE, replace(ADDED, shape="square")), {"instruction", "others"}),
        ("add a green circle", (RED, BLUE, GREEN, ADDED), {"others"}),
        ("add a green circle", (RED, ADDED), {"others"}),
        ("move the red circle down", (MOVED, BLUE), set()),
        ("move the red circle down", (RED, BLUE), {"instruction"}),
        ("move the red circle up", (MOVED, BLUE), {"instruction"}),
        ("move the red circle down", (replace(MOVED, x=0.74), BLUE), {"instruction"}),
        ("move the red circle down", (replace(MOVED, radius=0.21), BLUE), {"target"}),
        ("move the red circle down", (RED, replace(BLUE, y=0.74)), {"instruction", "others"}),
        ("make the red circle larger", (LARGER, BLUE), set()),
        ("make the red circle larger", (RED, BLUE), {"instruction"}),
        ("make the red circle smaller", (LARGER, BLUE), {"instruction"}),
        ("make the red circle larger", (replace(LARGER, y=0.7), BLUE), {"target"}),
        ("make the red circle larger", (RED, replace(BLUE, radius=0.21)), {"instruction", "others"}),
    ],
)
def test_oracle(instruction, result, broken):
    """The oracle names the facts that an edit breaks, and no others."""
    facts = check_edit(image_of(*SOURCE), instruction, image_of(*result, seed=1)).facts
    assert {name for name, holds in facts.items() if not holds} == broken


def test_oracle_needs_no_certain_size():
    """Source and result may differ in size, and be arrays of floats."""
    found = check_edit(
        np.asarray(image_of(*SOURCE, size=96)) / 255, "make the red circle yellow", image_of(RECOLORED, BLUE, size=64)
    )
    assert found.all_hold
    assert {(item.color, item.shape) for item in found.objects} == {("yellow", "circle"), ("blue", "square")}


# ---- rows ----


def test_rows_are_true(rows):
    """By pixels, the chosen edit holds in all, and the rejected one breaks the facts of its category, and no others."""
    for split, cases in rows.items():
        for row in cases:
            check_row(row)
            assert row["task"] == "image-editing"
            assert row["prompt"] in instruction_paraphrases(parse_instruction(row["prompt"]), split)
            assert parse_instruction(row["prompt"]).kind == row["edit"]
            assert check_edit(row["condition"], row["prompt"], row["chosen"]).all_hold, row["prompt"]
            if row["category"] != "quality":  # which may be drawn too badly to be read
                facts = check_edit(row["condition"], row["prompt"], row["rejected"]).facts
                broken = {name for name, holds in facts.items() if not holds}
                assert broken in BROKEN_FACTS[row["category"]], (row["prompt"], row["category"])
        counts = Counter((row["category"], row["edit"]) for row in cases)
        assert {category for category, _ in counts} == set(CATEGORY_SHARES)
        assert {edit for _, edit in counts} == set(EDITS)


def test_images_of_a_row_look_alike(rows):
    """Ground and objects that stay have their color in all images of a row, so that only what was edited differs."""
    for row in rows["id"]:
        images = [np.asarray(row[name], dtype=int) for name in ("condition", "chosen", "rejected")]
        grounds = [np.median(image.reshape(-1, 3), axis=0) for image in images]
        assert np.abs(grounds[1] - grounds[0]).max() <= 6
        assert np.abs(grounds[2] - grounds[0]).max() <= 6 + 12 * (row["category"] == "quality")
        if row["category"] == "instruction":
            assert np.abs(images[1] - images[2]).max() > 40


def test_splits_and_seeds():
    """Rows depend on seed, split and index only; out of domain each row has a composition that training never shows."""
    first, again = (ShapesEdits(6, "train", seed=3) for _ in range(2))
    for index in range(6):
        one, other = first[index], again[index]
        assert one["prompt"] == other["prompt"]
        for name in ("condition", "chosen", "rejected"):
            assert one[name].tobytes() == other[name].tobytes()
    others = [ShapesEdits(6, "id", seed=3)[0], ShapesEdits(6, "train", seed=4)[0], first[2]]
    assert len({row["condition"].tobytes() for row in (first[0], *others)}) == 4

    def compositions(row):
        images = [row[name] for name in ("condition", "chosen", "rejected")]
        return {(item.color, item.shape) for image in images for item in detect_objects(image)}

    for index in range(6):
        assert not compositions(first[index]) & HELD_OUT_COMPOSITIONS
        assert compositions(ShapesEdits(6, "ood", seed=3)[index]) & HELD_OUT_COMPOSITIONS


def test_rationales_say_what_each_edit_shows(rows):
    """Each text tells what both edits show, quarter by quarter, as found in their pixels."""
    for row in rows["id"]:
        if row["category"] == "quality":
            assert row["rationale"]["yes"].endswith(", clear.")
            continue
        first, second = row["rationale"]["yes"].removeprefix("Image 1: ").removesuffix(".").split(". Image 2: ")
        assert row["rationale"]["no"] == f"Image 1: {second}. Image 2: {first}."
        for text, image in ((first, row["rejected"]), (second, row["chosen"])):
            found = sorted(detect_objects(image), key=lambda item: (item.y > 0.5, item.x > 0.5))
            shown = [
                f"{'large ' * (item.radius > 0.178)}{item.color} {item.shape} "
                f"{'above' if item.y < 0.5 else 'below'} {'left' if item.x < 0.5 else 'right'}"
                for item in found
            ]
            assert text == ", ".join(shown)


def test_the_tiny_judge_is_asked_in_words_that_it_knows(rows):
    """The recipe has the wording of the package, and a question shows the source first."""
    with open("examples/configs/shapes_edits.yaml", encoding="utf-8") as file:
        assert yaml.safe_load(file)["processor_kwargs"]["prompt_texts"] == EDIT_TEXTS
    processor = judge_processor(prompt_texts=EDIT_TEXTS)
    row = rows["id"][0]
    batch = DataCollatorForRewardDance(processor, "pointwise")([row])
    text = processor.tokenizer.decode(batch["input_ids"][0])
    assert f'Prompt: "{row["prompt"]}".' in text
    assert text.count("Image: <img><IMG_CONTEXT>") == 2
    assert text.count("<IMG_CONTEXT>") == 2 * 4
