"""Tests of clips of shapes: captions, the oracle for clips, and rows whose difference is in no single frame."""

import random
from collections import Counter

import numpy as np
import pytest

from rewarddance_hf.data.preference import check_row
from rewarddance_hf.shapes.clip_oracle import check_clip
from rewarddance_hf.shapes.clip_scenes import MANNERS, ClipScene, clip_paraphrases, parse_clip_caption
from rewarddance_hf.shapes.clips import (
    CATEGORY_SHARES,
    NUM_FRAMES,
    ORDERED_CATEGORIES,
    ShapesClipPreferences,
)
from rewarddance_hf.shapes.drawing import draw_objects
from rewarddance_hf.shapes.loading import load_shapes
from rewarddance_hf.shapes.oracle import detect_objects
from rewarddance_hf.shapes.preferences import ShapesPreferences
from rewarddance_hf.shapes.scenes import HELD_OUT_COMPOSITIONS, PlacedObject


RED = ("red", "circle")
# The fact that is broken in the rejected clip.
BROKEN = {
    "direction": "direction",
    "turn": "turn",
    "pace": "pace",
    "order": "order",
    "swap": "steady",
    "flicker": "steady",
    "first frame": "first frame",
}


def clip_of(path, names=(RED,) * 4, seed=0):
    """Draw one object at these places, once per frame."""
    return [
        draw_objects([PlacedObject(*name, x, y, 0.18)], random.Random(seed))
        for (x, y), name in zip(path, names, strict=True)
    ]


RIGHT = [(0.26, 0.26), (0.42, 0.26), (0.58, 0.26), (0.74, 0.26)]
CLOCKWISE = [(0.26, 0.26), (0.74, 0.26), (0.74, 0.74), (0.26, 0.74)]
SLOW = [CLOCKWISE[0], CLOCKWISE[0], CLOCKWISE[1], CLOCKWISE[1]]
BLUE = ("blue", "circle")


@pytest.fixture(scope="module")
def rows():
    """Rows of both tasks in and out of domain."""
    return {
        (task, split): [ShapesClipPreferences(40, split, task)[i] for i in range(40)]
        for task in CATEGORY_SHARES
        for split in ("id", "ood")
    }


# ---- captions ----


def scenes():
    for name in ((RED), (None, "circle"), ("red", None)):
        for kind, manners in MANNERS.items():
            for manner in manners:
                yield ClipScene(kind, (name, ("blue", "square")) if kind == "order" else (name,), manner)


def test_captions_are_read_back():
    """Every caption of either split means what it was written for, and splits share none."""
    for scene in scenes():
        seen, unseen = clip_paraphrases(scene), clip_paraphrases(scene, "ood")
        assert not set(seen) & set(unseen)
        for caption in seen + unseen:
            assert parse_clip_caption(f" {caption.upper()}. ") == scene


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: parse_clip_caption("a red circle"), "`caption` is 'a red circle'.*clip_paraphrases"),
        (lambda: ClipScene("fly", (RED,)), "`kind` is 'fly'"),
        (lambda: ClipScene("move", (RED,), "fast"), "`manner` is 'fast'"),
        (lambda: ClipScene("order", (RED,)), "`objects` has 1 entries, but a 'order' scene has 2"),
        (lambda: ClipScene("stay", ((None, None),)), "neither color nor shape"),
        (lambda: ShapesClipPreferences(1, "test"), "`split` is 'test'"),
        (lambda: ShapesClipPreferences(1, task="text-to-image"), "`task` is 'text-to-image'"),
        (lambda: load_shapes("video-test", 1), "`split` is 'test'"),
        (lambda: check_clip(clip_of(RIGHT)[:1], "a red circle stays"), "`frames` has 1 entries"),
    ],
)
def test_invalid_arguments(make, message):
    """What is not of this world is refused by name."""
    with pytest.raises(ValueError, match=message):
        make()


# ---- the oracle ----


@pytest.mark.parametrize(
    ("clip", "caption", "broken"),
    [
        (clip_of(RIGHT), "a red circle moves to the right", set()),
        (clip_of(RIGHT), "a red one moves to the right", set()),
        (clip_of(RIGHT), "a red circle moves to the left", {"direction"}),
        (clip_of(RIGHT), "a red circle moves down", {"direction"}),
        (clip_of(RIGHT), "a red circle turns right", set()),  # along one side is a slow quarter turn as well
        (clip_of(RIGHT[::-1]), "a red circle moves to the right", {"direction"}),
        (clip_of([RIGHT[0], RIGHT[2], RIGHT[1], RIGHT[3]]), "a red circle moves to the right", {"direction"}),
        (clip_of(RIGHT), "a blue circle moves to the right", {"color"}),
        (clip_of(RIGHT), "a red square moves to the right", {"shape"}),
        (clip_of(CLOCKWISE), "a red circle turns right", set()),
        (clip_of(CLOCKWISE), "a red circle turns left", {"turn"}),
        (clip_of(CLOCKWISE[2:] + CLOCKWISE[:2]), "a red circle turns right", set()),
        (clip_of([CLOCKWISE[0], CLOCKWISE[2]] * 2), "a red circle turns right", {"turn"}),
        (clip_of(CLOCKWISE), "a red circle turns fast", set()),
        (clip_of(SLOW), "a red circle turns slow", set()),
        (clip_of(SLOW), "a red circle turns fast", {"pace"}),
        (clip_of([CLOCKWISE[0]] * 4), "a red circle turns slow", {"pace"}),
        (clip_of([CLOCKWISE[0]] * 4), "a red circle stays", set()),
        (clip_of(RIGHT), "a red circle stays", {"stay"}),
        (clip_of([CLOCKWISE[0]] * 4, [RED, RED, BLUE, BLUE]), "a red circle, then a blue circle", set()),
        (clip_of([CLOCKWISE[0]] * 4, [BLUE, BLUE, RED, RED]), "a red circle, then a blue circle", {"order"}),
        (clip_of([CLOCKWISE[0]] * 4, [RED, BLUE, RED, BLUE]), "a red circle, then a blue circle", {"order"}),
        (clip_of([CLOCKWISE[0]] * 4, [RED] * 4), "a red circle, then a blue circle", {"color", "order"}),
        (clip_of(CLOCKWISE, [RED, RED, BLUE, BLUE]), "a circle turns right", {"steady"}),
        (clip_of(CLOCKWISE, [RED, BLUE, RED, BLUE]), "a circle turns right", {"steady"}),
        (clip_of(CLOCKWISE, [RED, RED, BLUE, RED]), "a red circle turns right", {"color", "steady"}),
    ],
)
def test_oracle(clip, caption, broken):
    """The oracle names the facts that a clip breaks, and no others."""
    facts = check_clip(clip, caption).facts
    assert {name for name, holds in facts.items() if not holds} == broken


def test_oracle_sees_missing_objects_and_other_beginnings():
    """A frame without the object breaks its motion; a first frame with another object or place is not the given one."""
    clip = clip_of(CLOCKWISE)
    empty = draw_objects([], random.Random(0))
    result = check_clip([*clip[:2], empty, clip[3]], "a red circle turns right")
    assert (result.facts["number"], result.facts["turn"]) == (False, False)
    assert [len(objects) for objects in result.frames] == [1, 1, 0, 1]
    assert check_clip([empty] * 4, "a red circle turns right").broken == 5
    for condition, kept in (
        (clip[0], True),
        (clip[1], False),
        (clip_of(CLOCKWISE, [BLUE] * 4)[0], False),
        (empty, False),
    ):
        assert check_clip(clip, "a circle turns right", condition).facts["first frame"] == kept


def test_oracle_needs_no_certain_size():
    """Larger frames, and arrays of floats, are read alike."""
    row = ShapesClipPreferences(5, "id", "image-to-video", size=96)[1]
    for clip, right in ((row["chosen"], True), (row["rejected"], False)):
        arrays = [np.asarray(frame) / 255 for frame in clip]
        assert check_clip(clip, row["prompt"], row["condition"]).all_hold == right
        assert check_clip(arrays, row["prompt"], row["condition"]).all_hold == right


# ---- rows ----


def test_rows_are_true(rows):
    """By pixels, the chosen clip shows all of the prompt, and the rejected one breaks the very fact of its category."""
    for (task, _), cases in rows.items():
        for row in cases:
            check_row(row)
            assert row["task"] == task
            assert len(row["chosen"]) == len(row["rejected"]) == NUM_FRAMES
            condition = row.get("condition")
            assert (condition is not None) == (task == "image-to-video")
            assert check_clip(row["chosen"], row["prompt"], condition).all_hold
            facts = check_clip(row["rejected"], row["prompt"], condition).facts
            broken = [name for name, holds in facts.items() if not holds]
            expected = BROKEN.get(row["category"]) or ("turn" if "turn" in row["prompt"] else "stay")
            assert broken == [expected], row["prompt"]
        assert set(Counter(row["category"] for row in cases)) == set(CATEGORY_SHARES[task])


def test_no_single_frame_decides(rows):
    """Each frame of either clip, taken alone, shows what the prompt says of color and shape, and one object."""
    for cases in rows.values():
        for row in cases:
            scene = parse_clip_caption(row["prompt"])
            for frame in row["chosen"] + row["rejected"]:
                (item,) = detect_objects(frame)
                assert any(c in (item.color, None) and s in (item.shape, None) for c, s in scene.objects)


def test_ordered_rows_have_the_same_frames_in_another_order(rows):
    """Whoever sees the frames without their order can only guess."""

    def states(clip, scene):
        objects = [item for frame in clip for item in detect_objects(frame)]
        if scene.kind == "order":
            return sorted((item.color, item.shape) for item in objects)
        if scene.kind == "turn":
            return sorted((item.x > 0.5, item.y > 0.5) for item in objects)
        along = [item.x if scene.manner in ("left", "right") else item.y for item in objects]
        return sorted(round(5 * value) for value in along)

    seen = Counter()
    for cases in rows.values():
        for row in cases:
            if row["category"] in ORDERED_CATEGORIES:
                scene = parse_clip_caption(row["prompt"])
                assert states(row["chosen"], scene) == states(row["rejected"], scene)
                seen[row["category"]] += 1
    assert set(seen) == set(ORDERED_CATEGORIES)


def test_shuffled_rows_cannot_be_decided():
    """By the oracle the rejected clip is right as often as the chosen one."""
    right = Counter()
    for task in CATEGORY_SHARES:
        rows = [ShapesClipPreferences(60, "id", task, shuffled=True)[i] for i in range(60)]
        assert {row["category"] for row in rows} == set(ORDERED_CATEGORIES) & set(CATEGORY_SHARES[task])
        for row in rows:
            check_row(row)
            for name in ("chosen", "rejected"):
                right[name] += check_clip(row[name], row["prompt"]).all_hold
    assert abs(right["chosen"] - right["rejected"]) < 4 * (right["chosen"] + right["rejected"]) ** 0.5
    assert 0 < right["chosen"] < 120


def test_frames_of_a_clip_look_alike(rows):
    """Ground and noise stay as they are, so that only what moves differs."""
    for row in rows["text-to-video", "id"][:10]:
        corners = np.stack([np.asarray(frame, dtype=int)[:2, :2] for frame in row["chosen"]])
        assert np.abs(corners - corners[0]).max() <= 1


def test_given_frame_is_that_of_both_clips(rows):
    """Both clips go on from the given image, but for those whose fault is that they do not."""
    for row in rows["image-to-video", "id"]:
        assert row["condition"].tobytes() == row["chosen"][0].tobytes()
        kept = row["rejected"][0].tobytes() == row["condition"].tobytes()
        assert kept == (row["category"] != "first frame")


def test_splits_and_seeds():
    """Rows depend on seed, split and index only; out of domain each row has a composition that training never shows."""
    first, again = (ShapesClipPreferences(8, "train", seed=3) for _ in range(2))
    assert [row["task"] for row in first] == ["text-to-video", "image-to-video"] * 4
    for index in range(8):
        one, other = first[index], again[index]
        assert one["prompt"] == other["prompt"]
        assert [frame.tobytes() for frame in one["chosen"]] == [frame.tobytes() for frame in other["chosen"]]
    others = [ShapesClipPreferences(8, "id", seed=3)[0], ShapesClipPreferences(8, "train", seed=4)[0], first[2]]
    pixels = [row["chosen"][0].tobytes() for row in (first[0], *others)]
    assert len(set(pixels)) == 4

    def compositions(row):
        frames = [*row["chosen"], *row["rejected"]]
        return {(item.color, item.shape) for frame in frames for item in detect_objects(frame)}

    for index in range(8):
        assert not compositions(first[index]) & HELD_OUT_COMPOSITIONS
        assert compositions(ShapesClipPreferences(8, "ood", seed=3)[index]) & HELD_OUT_COMPOSITIONS


def test_rationales_say_what_each_clip_shows(rows):
    """Each text tells what the frames of both clips show, as found in their pixels."""
    for row in rows["text-to-video", "id"]:
        first, second = row["rationale"]["yes"].removeprefix("Image 1: ").removesuffix(".").split(". Image 2: ")
        assert row["rationale"]["no"] == f"Image 1: {second}. Image 2: {first}."
        for text, clip in ((first, row["rejected"]), (second, row["chosen"])):
            shown = []
            for (item,) in map(detect_objects, clip):
                place = f"{'above' if item.y < 0.5 else 'below'} {'left' if item.x < 0.5 else 'right'}"
                shown.append((f"{item.color} {item.shape}", place))
            # The object is named where it is another than in the frame before.
            words = [
                place if i and name == shown[i - 1][0] else f"{name} {place}" for i, (name, place) in enumerate(shown)
            ]
            assert text == ", ".join(words)


def test_rows_by_name():
    """Names of the command line: images, clips of both tasks, clips of one."""
    assert isinstance(load_shapes("id", 3), ShapesPreferences)
    assert {row["task"] for row in load_shapes("edit-ood", 2)} == {"image-editing"}
    assert [row["task"] for row in load_shapes("video-id", 2)] == ["text-to-video", "image-to-video"]
    assert [row["task"] for row in load_shapes("t2v-ood", 2)] == ["text-to-video"] * 2
    assert load_shapes("i2v-train", 2, seed=5)[0]["condition"].size == (32, 32)
    shuffled, straight = (load_shapes(name, 40, seed=5) for name in ("t2v-id-shuffled", "t2v-id"))
    rows = [(shuffled[i], straight[i]) for i in range(40) if straight[i]["category"] in ORDERED_CATEGORIES]
    frames = [[[frame.tobytes() for frame in row["chosen"]] for row in pair] for pair in rows]
    assert all(sorted(one) == sorted(other) for one, other in frames)
    assert any(one != other for one, other in frames)
