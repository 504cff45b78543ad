"""Rows: what is accepted, and what is refused with which words."""

import io

import datasets
import pytest
from PIL import Image
from tiny_vlms import random_image

from rewarddance_hf.data.preference import check_columns, check_row, rationale_text
from rewarddance_hf.data.rows import PreferenceRows


def row(**changes):
    return {"prompt": "a red circle", "chosen": random_image(0), "rejected": random_image(1), **changes}


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def test_missing_column_names_what_was_found_and_how_to_rename():
    """A dataset with other column names is refused with the call that mends it."""
    with pytest.raises(
        ValueError, match=r"lacks the columns \['chosen', 'rejected'\].*it has .*'path1'.*rename_columns"
    ):
        check_columns(["prompt", "path1", "path2"], "train_dataset")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"prompt": 3}, TypeError, "`prompt` of row 7 is 3 of type `int`, but must be str"),
        ({"prompt": None}, TypeError, "`prompt` of row 7 is None"),
        ({"criteria": 1.5}, TypeError, "`criteria` of row 7"),
        ({"chosen": None}, ValueError, "`chosen` of row 7 is None"),
        ({"rationale": {"yes": "because"}}, ValueError, "needs 'yes' and 'no'"),
        ({"rationale": 4}, TypeError, "`rationale` of row 7 is 4"),
    ],
)
def test_bad_values_are_refused(changes, error, message):
    """Every wrong value is named with its row before any image is decoded."""
    with pytest.raises(error, match=message):
        check_row(row(**changes), "row 7")


def test_optional_columns_may_be_missing_or_none():
    """Columns that a dataset does not use cost nothing."""
    check_row(row())
    check_row(row(task=None, criteria=None, rationale=None, margin=None, tie=None, condition=None))


def test_rationale_follows_the_order_of_the_images():
    """A rationale with placeholders names the right image in both orders; one for each verdict is picked by verdict."""
    text = row(rationale="{chosen} shows a circle, {rejected} a square.")
    assert rationale_text(text, chosen_second=True) == "Image 2 shows a circle, Image 1 a square."
    assert rationale_text(text, chosen_second=False) == "Image 1 shows a circle, Image 2 a square."
    both = row(rationale={"yes": "second", "no": "first"})
    assert (rationale_text(both, True), rationale_text(both, False)) == ("second", "first")
    assert rationale_text(row(), True) is None


def test_datasets_stay_encoded_and_lose_unused_columns():
    """Images are not decoded, and columns that training does not read are not loaded."""
    image = png(random_image(0))
    features = datasets.Features(
        prompt=datasets.Value("string"),
        chosen=datasets.Image(),
        rejected=datasets.List(datasets.Image()),
        preview=datasets.Image(),
    )
    images = {"bytes": image, "path": None}
    rows = [{"prompt": "p", "chosen": images, "rejected": [images, images], "preview": images}]
    view = PreferenceRows(datasets.Dataset.from_list(rows, features=features), "train_dataset")
    assert view[0]["chosen"]["bytes"] == image
    assert [frame["bytes"] for frame in view[0]["rejected"]] == [image, image]
    assert "preview" not in view[0]
    assert view[0]["row"] == "train_dataset[0]"


def test_empty_dataset_is_refused():
    """An empty split is noticed before a model is trained on nothing."""
    dataset = datasets.Dataset.from_dict({"prompt": [], "chosen": [], "rejected": []})
    with pytest.raises(ValueError, match="`train_dataset` is empty"):
        PreferenceRows(dataset, "train_dataset")
