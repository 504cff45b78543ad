"""Tests of pairs whose label depends on the criteria."""

from collections import Counter

import pytest

from rewarddance_hf.data.preference import check_row
from rewarddance_hf.shapes.captions import parse_caption
from rewarddance_hf.shapes.opposing import ShapesOpposingCriteria
from rewarddance_hf.shapes.preferences import ALIGNMENT_CRITERIA, DEGRADATIONS, QUALITY_CRITERIA, SHARP
from rewarddance_hf.shapes.rationales import broken_facts


@pytest.fixture(scope="module")
def pairs():
    rows = list(ShapesOpposingCriteria(160, "id"))
    return list(zip(rows[::2], rows[1::2], strict=True))


def test_pairs_have_opposite_labels(pairs):
    """Both rows show the same images for the same prompt; the other one is chosen under the other criteria."""
    for alignment, quality in pairs:
        check_row(alignment)
        check_row(quality)
        assert alignment["prompt"] == quality["prompt"]
        assert alignment["chosen"].tobytes() == quality["rejected"].tobytes()
        assert alignment["rejected"].tobytes() == quality["chosen"].tobytes()
        assert (alignment["criteria"], quality["criteria"]) == (ALIGNMENT_CRITERIA, QUALITY_CRITERIA)
        assert (alignment["category"], quality["category"]) == ("alignment", "quality")


def test_labels_are_true(pairs):
    """The image that is right is drawn worse: by the texts, one breaks facts of the prompt and the other is degraded."""
    defects = Counter()
    for alignment, quality in pairs:
        wrong, right = alignment["rationale"]["yes"].removeprefix("Image 1: ").removesuffix(".").split(". Image 2: ")
        wanted = parse_caption(alignment["prompt"])
        assert not broken_facts(wanted, parse_caption(right))
        assert broken_facts(wanted, parse_caption(wrong))
        worse, better = quality["rationale"]["yes"].removeprefix("Image 1: ").removesuffix(".").split(". Image 2: ")
        assert better == f"{wrong}, {SHARP}"
        defect = worse.removeprefix(f"{right}, ")
        defects[defect] += 1
    assert set(defects) == set(DEGRADATIONS)


def test_rows_depend_on_seed_and_split_only():
    """The same seed gives the same pixels, another seed or split others."""
    rows = [
        ShapesOpposingCriteria(4, split, seed)[-1] for split, seed in (("id", 0), ("id", 0), ("id", 1), ("train", 0))
    ]
    pixels = [row["chosen"].tobytes() for row in rows]
    assert pixels[0] == pixels[1]
    assert len(set(pixels)) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((3,), "`num_rows` is 3, but each pair has two rows"), ((2, "ood"), "`split` is 'ood'")],
)
def test_invalid_arguments(arguments, message):
    """Half a pair, and splits that do not exist, are refused."""
    with pytest.raises(ValueError, match=message):
        ShapesOpposingCriteria(*arguments)
