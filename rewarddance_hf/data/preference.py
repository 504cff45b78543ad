"""The one row schema of the package: a prompt, a preferred and a rejected image or clip."""

from collections.abc import Iterable, Mapping
from typing import Any

from ..models.question_rewarddance import Question
from ..models.tasks_rewarddance import check_condition, task_of


REQUIRED_COLUMNS = ("prompt", "chosen", "rejected")
OPTIONAL_COLUMNS = ("task", "condition", "criteria", "rationale", "margin", "tie")

# What public datasets call the same things, for error messages.
COMMON_NAMES = {
    "prompt": ("caption", "text", "instruction", "prompt_text"),
    "chosen": ("image_win", "preferred", "path1", "image1", "jpg_0"),
    "rejected": ("image_lose", "path2", "image2", "jpg_1"),
}


def check_columns(column_names: Iterable[str], name: str = "dataset") -> None:
    """Raise a `ValueError` unless a dataset, called `name` in it, has the columns of a preference row."""
    found = list(column_names)
    missing = [column for column in REQUIRED_COLUMNS if column not in found]
    if not missing:
        return
    renames = {
        other: column
        for column in missing
        for other in COMMON_NAMES[column]
        if other in found and other not in missing
    }
    hint = f", e.g. `dataset.rename_columns({renames})`" if renames else ""
    raise ValueError(
        f"`{name}` lacks the columns {missing}; it has {found}. A preference row needs `prompt` (text), `chosen` and "
        f"`rejected` (images or clips). Rename or add columns{hint}."
    )


def check_row(row: Mapping[str, Any], name: str = "row") -> None:
    """
    Make sure that a row can be used, before any image is decoded.

    Args:
        row (`Mapping`):
            Preference row: `prompt` (`str`), `chosen` and `rejected` (images, or clips: lists of images, tensors,
            animated images or video files), and optionally `task` (`str`), `condition` (image: first frame of image-to-video,
            source image of an edit), `criteria` (`str`), `rationale` (`str` with
            `{chosen}` and `{rejected}` in place of "Image 1" and "Image 2", or "Video 1" and "Video 2", or `{"yes": str, "no": str}` with one
            text for each verdict), `margin` (`float`), `tie` (`bool`).
        name (`str`, *optional*, defaults to `"row"`):
            Name of the row in error messages.

    Raises:
        `ValueError`: If a column is missing or empty.
        `TypeError`: If a value is of the wrong type.
    """
    check_columns(row, name)
    _check_type(row, "prompt", str, name)
    for column in ("task", "criteria"):
        if row.get(column) is not None:
            _check_type(row, column, str, name)
    for column in ("chosen", "rejected"):
        if row[column] is None:
            raise ValueError(f"`{column}` of {name} is None, but must be an image or a clip. Drop the row.")
    check_condition(row.get("task"), row.get("condition"), f"condition of {name}")
    if row.get("rationale") is not None:
        _check_type(row, "rationale", (str, Mapping), name)
        if isinstance(row["rationale"], Mapping) and not {"yes", "no"} <= set(row["rationale"]):
            raise ValueError(
                f"`rationale` of {name} has the keys {sorted(row['rationale'])}, but needs 'yes' and 'no': the text that "
                "follows each verdict."
            )


def _check_type(row: Mapping[str, Any], column: str, wanted: type | tuple[type, ...], name: str) -> None:
    if not isinstance(row[column], wanted):
        names = " or ".join(t.__name__ for t in (wanted if isinstance(wanted, tuple) else (wanted,)))
        raise TypeError(
            f"`{column}` of {name} is {row[column]!r} of type `{type(row[column]).__name__}`, but must be {names}."
        )


def row_question(
    row: Mapping[str, Any], chosen_second: bool = True, uses_reference: bool = True, reasons_first: bool = False
) -> Question:
    """
    Question about a preference row, whose media may be loaded.

    The verdict is "yes" if `chosen_second`: the chosen image is the sample, image 2 of a pairwise question. With
    `uses_reference` the other image is shown too, as image 1.
    """
    sample, reference = ("chosen", "rejected") if chosen_second else ("rejected", "chosen")
    return Question(
        sample=row[sample],
        prompt=row["prompt"],
        reference=row[reference] if uses_reference else None,
        condition=row.get("condition"),
        task=row.get("task"),
        criteria=row.get("criteria"),
        reasons_first=reasons_first,
    )


def rationale_text(row: Mapping[str, Any], chosen_second: bool) -> str | None:
    """Rationale of a row for the order in which its images are shown, or None: `chosen_second` if the chosen one is image 2."""
    rationale = row.get("rationale")
    if isinstance(rationale, Mapping):
        rationale = rationale["yes" if chosen_second else "no"]
    elif rationale is not None:
        noun = "Video" if task_of(row.get("task")).is_video else "Image"
        chosen, rejected = (f"{noun} {number}" for number in ((2, 1) if chosen_second else (1, 2)))
        rationale = rationale.replace("{chosen}", chosen).replace("{rejected}", rejected)
    return rationale or None
