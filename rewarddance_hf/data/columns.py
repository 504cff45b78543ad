"""Which column of a table is which, and which of two samples a row prefers."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .preference import COMMON_NAMES, OPTIONAL_COLUMNS, REQUIRED_COLUMNS
from .sources.rows import share_of_votes, vote_margin


SAMPLES = ("image_1", "image_2")
# What says which of two samples is the better one.
WINNERS = (("label",), ("votes_1", "votes_2"), ("score_1", "score_2"))
EXTRA = (*OPTIONAL_COLUMNS, "category")
PAIR_COLUMNS = (*REQUIRED_COLUMNS, *EXTRA, *SAMPLES, *(name for names in WINNERS for name in names))
SAMPLE_COLUMNS = ("image", "prompt", "reference", "condition", "task", "criteria")
PROMPT_COLUMNS = ("prompt", "references", "task", "criteria", "condition")
MEDIA = ("chosen", "rejected", "condition", "image", "reference", "references", *SAMPLES)

FIRST = ("1", "a", "first", "left", "image_1", "image1", "image_a")
SECOND = ("2", "b", "second", "right", "image_2", "image2", "image_b")
TIE = ("tie", "tied", "draw", "equal", "same", "both", "neither")


def parse_columns(columns: str | Mapping[str, str] | None) -> dict[str, str]:
    """Columns by what they are, of `prompt=caption,chosen=a,rejected=b`."""
    if columns is None or isinstance(columns, Mapping):
        return dict(columns or {})
    parts = [part.partition("=") for part in columns.split(",") if part.strip()]
    if not all(equals and name.strip() and column.strip() for name, equals, column in parts):
        raise ValueError(
            f"`columns` is {columns!r}, but must be like prompt=caption,chosen=a,rejected=b: what a column is, then its name."
        )
    return {name.strip(): column.strip() for name, _, column in parts}


def find_columns(
    found: Sequence[str], columns: Mapping[str, str], allowed: Sequence[str], table: str
) -> dict[str, str]:
    """Column of `found` for each of `allowed` names that is given in `columns` or is there under that name."""
    unknown = sorted(set(columns) - set(allowed))
    if unknown:
        raise ValueError(f"`columns` names {unknown}, but a column can be one of {list(allowed)}. Correct the names.")
    missing = sorted(set(columns.values()) - set(found))
    if missing:
        raise ValueError(f"{table} lacks the columns {missing} of `columns`; it has {list(found)}. Correct the names.")
    roles = dict(columns)
    for name in allowed:
        # `chosen_file_name` is how `datasets` calls a path that becomes the image `chosen`.
        for column in (name, f"{name}_file_name", *(("file_name",) if name == "image" else ())):
            if name not in roles and column in found and column not in columns.values():
                roles[name] = column
    return roles


def check_pair_columns(roles: Mapping[str, str], given: Mapping[str, str], found: Sequence[str], table: str) -> None:
    """Raise a `ValueError` unless these columns make a preference row, and only in one way."""
    by_winner = {"chosen", "rejected"}
    is_direct = by_winner <= roles.keys()
    if is_direct and (unused := sorted({"label", *SAMPLES} & given.keys())):
        raise ValueError(
            f"`columns` gives both {sorted(by_winner)} and {unused}, but the preferred sample is either named by a column or "
            "told by a winner. Leave one out."
        )
    groups = [set(group) for group in WINNERS if set(group) <= roles.keys()]
    if not is_direct and set(SAMPLES) <= roles.keys() and not groups:
        raise ValueError(
            f"{table} has two samples, but nothing says which is better; it has {list(found)}. Say which column does: "
            f"--columns label=NAME, or votes_1=NAME,votes_2=NAME, or score_1=NAME,score_2=NAME."
        )
    if not is_direct and len(groups) > 1 and not any(group & given.keys() for group in groups):
        raise ValueError(
            f"{table} tells the winner in several ways, {[sorted(group) for group in groups]}. Say by which: --columns "
            f"{sorted(groups[0])[0]}={roles[sorted(groups[0])[0]]}"
        )
    wanted = ["prompt"] if not is_direct and set(SAMPLES) <= roles.keys() else list(REQUIRED_COLUMNS)
    missing = [name for name in wanted if name not in roles]
    if missing:
        likely = {
            name: next((other for other in COMMON_NAMES[name] if other in found), f"<column of {name}>")
            for name in missing
        }
        raise ValueError(
            f"{table} lacks the columns {missing}; it has {list(found)}. Say which is which: --columns "
            f"{','.join(f'{name}={column}' for name, column in likely.items())}; or, where a column names the winner, --columns "
            "prompt=...,image_1=...,image_2=...,label=..."
        )


@dataclass(frozen=True)
class Verdict:
    """Which of two samples of a row is better."""

    first_wins: bool
    tie: bool = False
    margin: float | None = None


class WinnerReader:
    """
    Reads which sample of a row is better: by its label, by votes, which become a margin, or by scores, of which the higher
    one wins. `label_values` are the labels of the first sample, of the second, and of a tie, where they are not the usual ones.
    """

    def __init__(self, roles: Mapping[str, str], given: Mapping[str, str], label_values: Sequence[str] | None) -> None:
        groups = [group for group in WINNERS if set(group) <= roles.keys()]
        self.group = next((group for group in groups if set(group) & given.keys()), groups[0])
        self.columns = [roles[name] for name in self.group]
        self.labels: dict[str, str] = {}
        self.is_told = bool(label_values)
        if label_values:
            kinds = ("first", "second", "tie")
            self.labels = {plain_label(value): kind for value, kind in zip(label_values, kinds, strict=False)}
            if not 2 <= len(label_values) <= 3 or len(self.labels) < len(label_values):
                raise ValueError(
                    f"`label_values` is {list(label_values)}, but must be the labels of the first sample, of the second, and "
                    "optionally of a tie, e.g. 0,1 or left,right,both."
                )
        else:
            for names, kind in ((FIRST, "first"), (SECOND, "second"), (TIE, "tie")):
                self.labels |= dict.fromkeys(names, kind)
            samples = {plain_label(roles[name]): kind for name, kind in zip(SAMPLES, ("first", "second"), strict=True)}
            self.labels |= samples

    def check(self, labels: Iterable[Any]) -> None:
        """Raise a `ValueError` where labels have two readings."""
        if self.group == ("label",) and "0" not in self.labels:
            values = {plain_label(label) for label in labels if label is not None}
            if values and values <= {"0", "1", "0.5"}:
                raise ValueError(
                    f"The labels of {self.columns[0]!r} are {sorted(values)}, which may be the index of the better sample, or "
                    "whether the first one is better. Say which label is that of the first sample: --label-values 0,1 or "
                    "--label-values 1,0 (a third value is a tie)."
                )

    def __call__(self, row: Mapping[str, Any]) -> Verdict:
        """Verdict of a row. Raises a `ValueError` that says what is wrong with it, without its place."""
        values = [row.get(column) for column in self.columns]
        if self.group == ("label",):
            kind = self.labels.get(plain_label(values[0]))
            if kind is None:
                usual = "1 or 2, a or b, left or right, first or second, the name of a sample's column, or tie"
                known = ", ".join(self.labels) if self.is_told else usual
                raise ValueError(
                    f"the label {self.columns[0]!r} is {values[0]!r}, but must be {known} (other labels are named by --label-values)"
                )
            return Verdict(kind != "second", kind == "tie")
        first, second = (_number(value, column) for value, column in zip(values, self.columns, strict=True))
        if self.group[0] == "votes_1":
            share = share_of_votes(first, second, "the row")
            return Verdict(share >= 0.5, share == 0.5, vote_margin(max(share, 1 - share)))
        return Verdict(first >= second, first == second)


def plain_label(value: Any) -> str:
    """A label as text: 1, 1.0 and "1 " are the same."""
    text = str(value).strip().lower()
    try:
        number = float(text)
    except ValueError:
        return text
    return str(int(number)) if number.is_integer() else str(number)


def _number(value: Any, column: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number):
        raise ValueError(f"{column!r} is {value!r}, but must be a number")
    return number
