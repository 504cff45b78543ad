"""Preference rows out of what public datasets record: votes, labels, rankings."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import datasets


VideoFinder = Callable[[str], Any]  # a video by the name that the annotations have for it

# Vote shares beyond this count as this much: the margin of a unanimous vote is finite, log(0.99 / 0.01) = 4.6.
LARGEST_SHARE = 0.99
ROWS_PER_SHARD = 1000
# Number of rows whose images are in memory at once.
MAP_BATCH_SIZE = 32

# Criteria of what annotators were asked, where that is not the overall preference.
DIMENSION_CRITERIA = {
    "preference": None,
    "coherence": "coherence: which has fewer errors, such as wrong anatomy, broken objects and impossible structure",
    "alignment": "alignment: which shows the prompt better: every object, attribute, count and relation",
    "aesthetics": "aesthetics: composition, light, color, detail and finish",
}

FEATURES = datasets.Features(
    {
        "prompt": datasets.Value("string"),
        "chosen": datasets.Image(),
        "rejected": datasets.Image(),
        "task": datasets.Value("string"),
        "condition": datasets.Image(),
        "margin": datasets.Value("float32"),
        "tie": datasets.Value("bool"),
        "criteria": datasets.Value("string"),
        "category": datasets.Value("string"),
    }
)
# A clip is known by the name that the annotations have for it, until it is fetched.
CLIP_FEATURES = datasets.Features(
    {**FEATURES, "chosen": datasets.Value("string"), "rejected": datasets.Value("string")}
)


def vote_margin(share: float) -> float:
    """
    Margin of a share of votes in `[0, 1]` for the chosen sample: its log-odds, with shares clipped to `[0.5, 0.99]`, so
    between 0 and 4.6. The sigmoid of a margin is the (clipped) share again.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"`share` is {share}, but must be in `[0, 1]`. Divide the votes by their sum.")
    share = min(max(share, 0.5), LARGEST_SHARE)
    return math.log(share / (1 - share))


def make_row(
    prompt: str, first: Any, second: Any, preference: float, is_soft: bool = False, **context: Any
) -> dict[str, Any]:
    """
    Row with all columns, out of two samples and the share of votes for the first one.

    Above 0.5 it is chosen, below 0.5 the second one is, 0.5 is a tie, which keeps their order. A share that `is_soft`, more
    than a label, becomes a margin. `context` holds other columns: `task`, `condition`, `margin`, `criteria`, `category`.
    """
    chosen, rejected = (first, second) if preference >= 0.5 else (second, first)
    row = dict.fromkeys(FEATURES) | {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    row |= {"task": "text-to-image", "tie": preference == 0.5}
    if is_soft:
        row["margin"] = vote_margin(max(preference, 1 - preference))
    return row | context


def share_of_votes(first: float | None, second: float | None, name: str) -> float:
    """Share of (weighted) votes for the first of two samples, 0.5 without any. `name` is that of the row in the error."""
    if first is None or second is None or not min(first, second) >= 0:  # NaN fails too
        raise ValueError(f"Votes of {name} are {first} and {second}, but must be numbers from 0 on. Drop the row.")
    return 0.5 if first + second == 0 else first / (first + second)


def ranked_pairs(samples: Sequence[Any], ranks: Sequence[int]) -> Iterator[tuple[Any, Any, float]]:
    """All pairs of samples, with the preference for the first: 1, 0, or 0.5 where ranks are equal. The smallest rank is the best."""
    for (first, a), (second, b) in itertools.combinations(zip(samples, ranks, strict=True), 2):
        yield first, second, 0.5 if a == b else float(a < b)


def check_schema(found: Iterable[str] | None, wanted: Sequence[str], name: str) -> None:
    """Raise a `ValueError` unless the columns that are found in a file (`name`) hold those that are read."""
    found = sorted(found or ())
    missing = [column for column in wanted if column not in found]
    if missing:
        raise ValueError(
            f"{name} lacks the columns {missing}; it has {found}, and {list(wanted)} are read. Its schema has moved, or it is "
            "another dataset of that name. Pass `revision=` of an older version, or rename columns yourself."
        )


def rows_from_table(
    table: Any, convert: Callable[[Mapping[str, Any]], Iterable[dict[str, Any]]], videos: VideoFinder | None = None
) -> Any:
    """
    Convert a table whose images are not decoded to rows of the same kind (`Dataset` or `IterableDataset`). `convert` gives
    the preference rows of one row of the table. Where these name `videos`, each is fetched when its row is read.
    """
    features = FEATURES if videos is None else CLIP_FEATURES
    arguments = {"batched": True, "batch_size": MAP_BATCH_SIZE, "remove_columns": table.column_names}
    convert_batch = partial(_convert_batch, convert=convert)
    if isinstance(table, datasets.IterableDataset):
        # Given to `map`, the features would be taken for applied, and images never be decoded.
        rows = table.map(convert_batch, **arguments).cast(features)
    else:
        rows = table.map(convert_batch, features=features, **arguments)
    return _fetch_videos(rows, videos)


def _convert_batch(batch: Mapping[str, list[Any]], convert: Callable[..., Any]) -> dict[str, list[Any]]:
    rows = [
        row for values in zip(*batch.values(), strict=True) for row in convert(dict(zip(batch, values, strict=True)))
    ]
    return {column: [row[column] for row in rows] for column in FEATURES}


def rows_from_records(
    records: Sequence[Any],
    convert: Callable[[Any], Iterable[dict[str, Any]]],
    streaming: bool,
    videos: VideoFinder | None = None,
) -> Any:
    """Convert records of a JSON or CSV file, as in [`rows_from_table`]; if `streaming`, each when it is read."""
    features = FEATURES if videos is None else CLIP_FEATURES
    if streaming:
        # A list among the arguments makes shards, which workers of a data loader share.
        shards = [tuple(records[i : i + ROWS_PER_SHARD]) for i in range(0, len(records), ROWS_PER_SHARD)]
        rows = datasets.IterableDataset.from_generator(
            _convert_shards, features=features, gen_kwargs={"shards": shards, "convert": convert}
        )
    else:
        rows = datasets.Dataset.from_list([row for record in records for row in convert(record)], features=features)
    return _fetch_videos(rows, videos)


def _convert_shards(shards: list[tuple[Any, ...]], convert: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    for shard in shards:
        for record in shard:
            yield from convert(record)


def _fetch_videos(rows: Any, videos: VideoFinder | None) -> Any:
    if videos is None:
        return rows
    fetch = partial(_fetch_columns, videos=videos)
    if isinstance(rows, datasets.IterableDataset):
        return rows.map(fetch, batched=True, batch_size=1)
    return rows.with_transform(fetch)


def _fetch_columns(batch: dict[str, list[Any]], videos: VideoFinder) -> dict[str, list[Any]]:
    columns = [column for column in ("chosen", "rejected") if column in batch]
    return {**batch, **{column: [videos(name) for name in batch[column]] for column in columns}}
