"""Tests of the check of rationales: it accepts what is true, in other words too, and nothing else."""

import pytest

from rewarddance_hf.shapes.captions import parse_caption
from rewarddance_hf.shapes.preferences import ShapesPreferences
from rewarddance_hf.shapes.rationales import RationaleCheck, broken_facts, check_rationale, summarize_checks


def row_about(prompt, chosen, rejected):
    """A row with nothing but its texts."""
    rationale = {"yes": f"Image 1: {rejected}. Image 2: {chosen}.", "no": f"Image 1: {chosen}. Image 2: {rejected}."}
    return {"prompt": prompt, "rationale": rationale}


@pytest.mark.parametrize("split", ["id", "ood"])
def test_true_rationales_pass_and_exchanged_ones_fail(split):
    """The rationale of a row names its fault in both orders; that of the other order never does."""
    for row in ShapesPreferences(80, split):
        for key, is_second in (("yes", True), ("no", False)):
            assert check_rationale(row["rationale"][key], row, is_second) == RationaleCheck(True, True, True, True)
            exchanged = check_rationale(row["rationale"][key], row, not is_second)
            assert exchanged == RationaleCheck(True, False, False, False)


@pytest.mark.parametrize(
    ("row", "written", "described", "named"),
    [
        # Another wrong color breaks the same fact, a wrong shape another one, and two wrong things more.
        (("a red circle", "a red circle", "a blue circle"), "a green circle", False, True),
        (("a red circle", "a red circle", "a blue circle"), "a red square", False, False),
        (("a red circle", "a red circle", "a blue circle"), "a blue square", False, False),
        (("a red circle", "a red circle", "a blue circle"), "a red circle", False, False),
        # Two objects may come in either order, and a relation may be told from either side.
        (
            ("a red circle and a blue square", "a red circle and a blue square", "a blue circle and a red square"),
            "a red square and a blue circle",
            True,
            True,
        ),
        (
            (
                "a red circle above a blue square",
                "a red circle above a blue square",
                "a red circle below a blue square",
            ),
            "a blue square above a red circle",
            True,
            True,
        ),
        # What is wrong with a relation is not told by leaving it out.
        (
            (
                "a red circle above a blue square",
                "a red circle above a blue square",
                "a red circle below a blue square",
            ),
            "a red circle and a blue square",
            False,
            False,
        ),
        (("two red circles", "two red circles", "three red circles"), "four red circles", False, True),
        (("a red circle", "a red circle, clear", "a red circle, noisy"), "a red circle, noisy", True, True),
        (("a red circle", "a red circle, clear", "a red circle, noisy"), "a red circle, coarse", False, False),
        (("a red circle", "a red circle, clear", "a red circle, noisy"), "a blue circle, noisy", False, True),
    ],
)
def test_check(row, written, described, named):
    """What is said of the rejected image is held against what it shows, and against the prompt."""
    row = row_about(*row)
    chosen = row["rationale"]["no"].removeprefix("Image 1: ").split(".")[0]
    check = check_rationale(f"Image 1: {written}. Image 2: {chosen}.", row, chosen_is_second=True)
    assert check == RationaleCheck(True, True, described, named)


@pytest.mark.parametrize(
    "rationale",
    [
        "",
        "because it is red",
        "Image 1: a red circle.",
        "Image 1: a red cat. Image 2: a red circle.",
        "Image 1: . Image 2: .",
    ],
)
def test_unreadable_rationales_count_as_wrong(rationale):
    """What is not of the grammar is never right."""
    row = row_about("a red circle", "a red circle", "a blue circle")
    assert check_rationale(rationale, row, True) == RationaleCheck(False, False, False, False)


def test_rows_without_scenes_are_refused():
    """A row whose own rationale cannot be read has no truth to hold against."""
    with pytest.raises(ValueError, match=r"`row\['rationale'\]` is .*ShapesPreferences"):
        check_rationale("Image 1: a red circle. Image 2: a blue circle.", row_about("a", "b", "c"), True)


def test_unsaid_facts():
    """Where the written scene leaves a wanted relation open, this is named, whatever its random layout shows."""
    wanted = parse_caption("a red circle left of a blue square")
    assert broken_facts(wanted, parse_caption("a red circle and a blue square")) == {"relation", "unsaid"}
    assert broken_facts(wanted, parse_caption("a red circle right of a blue square")) == {"relation"}
    assert broken_facts(wanted, wanted) == frozenset()


def test_summary():
    """Shares are means over the checks."""
    checks = [RationaleCheck(True, True, False, True), RationaleCheck(False, False, False, False)]
    assert summarize_checks(checks) == {
        "readable": 0.5,
        "chosen_described": 0.5,
        "rejected_described": 0.0,
        "fault_named": 0.5,
        "num_rows": 2,
    }
    with pytest.raises(ValueError, match="`checks` is empty"):
        summarize_checks([])
