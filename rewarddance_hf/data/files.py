"""Own data as preference rows, or as samples to be scored: read, converted, and checked to the last row before use."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import datasets
from transformers.utils import logging

from .checks import check_media, fetch_media
from .columns import (
    EXTRA,
    MEDIA,
    PAIR_COLUMNS,
    PROMPT_COLUMNS,
    REQUIRED_COLUMNS,
    SAMPLE_COLUMNS,
    SAMPLES,
    Verdict,
    WinnerReader,
    check_pair_columns,
    find_columns,
    parse_columns,
)
from .preference import check_row
from .rows import keep_images_encoded
from .tables import Table, read_table


logger = logging.get_logger(__name__)

TRUE, FALSE = ("true", "yes", "1"), ("false", "no", "0")


def load_rows(
    data: str | os.PathLike,
    split: str | None = None,
    columns: str | Mapping[str, str] | None = None,
    label_values: Sequence[str] | None = None,
    skip_bad_rows: bool = False,
    check: bool = True,
    limit: int | None = None,
    show_progress: bool = False,
    **source: Any,
) -> Any:
    """
    Load own data as preference rows.

    The preferred sample is named by the columns `chosen` and `rejected`, or `image_1` and `image_2` are two samples, and a
    `label` says which is better ("1", "a", "left", the name of its column, ...; "2", "b", ...; or "tie"), or votes (`votes_1`,
    `votes_2`, which become a margin), or scores (`score_1`, `score_2`).

    Args:
        data (`str` or `os.PathLike`):
            CSV, TSV, JSON, JSON lines or Parquet; folder of images with `metadata.csv` or another table; folder of `save_to_disk`;
            dataset of the Hub; or public set by name, e.g. `"hpdv3"`. Paths are relative to the table, or addresses on the web.
        split (`str`, *optional*):
            Split, or part of one as in `"train[:5%]"`. Needed if there are several.
        columns (`str` or `dict[str, str]`, *optional*):
            Columns by what they are, e.g. `"prompt=caption,chosen=a,rejected=b"`. Those that are left out have the names above.
        label_values (`list[str]`, *optional*):
            Labels of the first sample, of the second, and of a tie.
        skip_bad_rows (`bool`, *optional*, defaults to `False`):
            Whether to leave out rows that cannot be used, with a warning that counts them, instead of raising an error.
        check (`bool`, *optional*, defaults to `True`):
            Whether to decode the images of all rows now.
        limit (`int`, *optional*):
            Number of rows to read at most.
        show_progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.
        source:
            `config`, `data_files`, `revision` and `streaming` of a dataset of the Hub. Streamed rows are checked when they are
            read.

    Returns:
        `datasets.Dataset`, or `datasets.IterableDataset` if `streaming`: Preference rows, as in
        [`~rewarddance_hf.data.preference.check_row`]. `info.description` says what was read.

    Raises:
        `ValueError`: If there is no such data, a column is missing, labels have two readings, or rows cannot be used: the
            first of them are named with their file and line.

    Example:

    ```python
    rows = load_rows("my_images/pairs.csv", columns="prompt=caption,image_1=a,image_2=b,label=winner")
    ```
    """
    table, roles, given = _open(data, split, columns, PAIR_COLUMNS, limit, source)
    check_pair_columns(roles, given, table.columns, table.name)
    verdict = None
    if not {"chosen", "rejected"} <= roles.keys():
        verdict = WinnerReader(roles, given, label_values)
    elif label_values:
        raise ValueError("`label_values` was given, but no column is a label. Name it: --columns label=NAME")
    if isinstance(table.rows, datasets.IterableDataset):
        return _stream(table, roles, verdict, limit)
    rows, verdicts, problems = _convert(table, roles, verdict)
    if check:
        for index, problem in check_media(rows, ("chosen", "rejected", "condition"), show_progress).items():
            problems.setdefault(index, f"{table.place(index)}: {problem}")
    return _finish(table, rows, problems, skip_bad_rows, _describe(table, roles, verdicts))


def load_samples(
    data: str | os.PathLike,
    split: str | None = None,
    columns: str | Mapping[str, str] | None = None,
    limit: int | None = None,
    show_progress: bool = False,
    defaults: Mapping[str, str] | None = None,
    **source: Any,
) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """
    Load own data as samples to be scored: rows with `image`, `prompt`, and optional `reference`, `condition`, `task` and `criteria`.

    Arguments are those of [`load_rows`]. `defaults` are values of columns that the data does not have. Returned are the rows,
    and by index what is wrong with those that cannot be scored.
    """
    table, roles, _ = _open(data, split, columns, SAMPLE_COLUMNS, limit, source)
    missing = [name for name in ("image", "prompt") if name not in roles and name not in (defaults or {})]
    if missing:
        raise ValueError(
            f"{table.name} lacks the columns {missing}; it has {table.columns}. Say which is which: --columns "
            f"{','.join(f'{name}=NAME' for name in missing)}{', or pass --prompt' * ('prompt' in missing)}"
        )
    rows, problems = fetch_media(_renamed(table, roles), table.folder, table.place)
    rows = [{**(defaults or {}), **row} for row in rows]
    problems = {**table_problems(table), **problems}
    for index, row in enumerate(rows):
        for name in ("image", "prompt"):
            if not row.get(name):
                problems.setdefault(index, f"{table.place(index)}: `{name}` is empty")
    for index, problem in check_media(rows, ("image", "reference", "condition"), show_progress).items():
        problems.setdefault(index, f"{table.place(index)}: {problem}")
    return rows, problems


def load_prompts(
    data: str | os.PathLike, split: str | None = None, columns: str | Mapping[str, str] | None = None, **source: Any
) -> Any:
    """
    Load prompts that a generator is tuned on: a text file with a prompt a line, or anything that [`load_rows`] takes, whose
    `prompt`, `references`, `task`, `criteria` and `condition` are kept. Arguments and errors are those of [`load_rows`].
    """
    table, roles, _ = _open(data, split, columns, PROMPT_COLUMNS, None, source)
    if "prompt" not in roles:
        raise ValueError(
            f"{table.name} lacks the column 'prompt'; it has {table.columns}. Say which it is: --columns prompt=NAME"
        )
    rows, problems = fetch_media(_renamed(table, roles), table.folder, table.place)
    problems = {**problems, **table_problems(table)}
    for index, row in enumerate(rows if isinstance(rows, list) else _without_media(rows)):
        if not isinstance(row["prompt"], str) or not row["prompt"].strip():
            problems.setdefault(index, f"{table.place(index)}: `prompt` is {row['prompt']!r}, but must be a text")
    if isinstance(rows, list) and not problems:
        rows = datasets.Dataset.from_list(rows)
    return _finish(table, rows, problems, False, _describe(table, roles, ()))


def hold_out(rows: Any, size: float, seed: int = 0) -> tuple[Any, Any]:
    """
    Split rows into those to train on and those to measure on, whole prompts together: which prompts are held out depends on
    `seed` and their text only. `size` is a share below 1, or a number of rows.
    """
    prompts = list(rows["prompt"])
    wanted = size * len(prompts) if size < 1 else size
    counts = Counter(prompts)
    order = sorted(counts, key=lambda prompt: hashlib.blake2b(f"{seed}:{prompt}".encode()).digest())
    held: set[str] = set()
    total = 0
    for prompt in order:
        if total >= wanted:
            break
        held.add(prompt)
        total += counts[prompt]
    if len(held) == len(counts):
        raise ValueError(
            f"{wanted:g} of {len(prompts)} rows are to be held out, but that is all {len(counts)} prompts. Hold out fewer, or "
            "pass other rows to measure on."
        )
    train = [index for index, prompt in enumerate(prompts) if prompt not in held]
    test = [index for index, prompt in enumerate(prompts) if prompt in held]
    return rows.select(train), rows.select(test)


def table_problems(table: Table) -> dict[int, str]:
    """Rows that could not be read from the file, with their places."""
    return {index: f"{table.place(index)}: {problem}" for index, problem in table.problems.items()}


def _open(
    data: Any, split: str | None, columns: Any, allowed: Sequence[str], limit: int | None, source: Mapping[str, Any]
) -> tuple[Table, dict[str, str], dict[str, str]]:
    """Table, its columns by what they are, and those that were named by the user."""
    given = parse_columns(columns)
    table = read_table(data, split, **source)
    is_stream = isinstance(table.rows, datasets.IterableDataset)
    if not is_stream and len(table.rows) == 0:
        raise ValueError(f"{table.name} has no rows, but must have at least one. Check its split.")
    if limit is not None and not is_stream:
        table = table.select(range(min(limit, len(table.rows))))
    return table, find_columns(table.columns, given, allowed, table.name), given


def _renamed(table: Table, roles: Mapping[str, str]) -> Any:
    """Rows with columns under the names of what they are."""
    if isinstance(table.rows, list):
        return [{name: row.get(column) for name, column in roles.items()} for row in table.rows]
    rows = table.rows.select_columns(list(dict.fromkeys(roles.values())))
    return keep_images_encoded(rows.rename_columns({column: name for name, column in roles.items() if column != name}))


def _convert(
    table: Table, roles: Mapping[str, str], reader: WinnerReader | None
) -> tuple[Any, list[Verdict], dict[int, str]]:
    """Preference rows, which of them are ties by their winner, and what is wrong with those that cannot be used."""
    problems = table_problems(table)
    verdicts: list[Verdict] = []
    if reader is not None:
        told = table.rows if isinstance(table.rows, list) else table.rows.select_columns(list(set(reader.columns)))
        reader.check(row.get(reader.columns[0]) for index, row in enumerate(told) if index not in problems)
        for index, row in enumerate(told):
            try:
                verdicts.append(reader(row))
            except ValueError as error:
                verdicts.append(Verdict(True))
                problems.setdefault(index, f"{table.place(index)}: {error}")
    kept = {name: column for name, column in roles.items() if name in (*REQUIRED_COLUMNS, *EXTRA, *SAMPLES)}
    if reader is None:
        kept = {name: column for name, column in kept.items() if name not in SAMPLES}
    rows, unfetched = fetch_media(_renamed(table, kept), table.folder, table.place)
    problems = {**unfetched, **problems}
    if verdicts:
        rows = _by_verdict(rows, verdicts)
    unread = [] if isinstance(rows, list) else [name for name in rows.column_names if name in MEDIA]
    for index, row in enumerate(rows if isinstance(rows, list) else _without_media(rows)):
        try:
            if isinstance(rows, list):
                rows[index] = row = _typed(row)
            if index not in problems:
                _check_texts(row, table.place(index), unread)
        except (ValueError, TypeError) as error:
            problems[index] = str(error) if table.place(index) in str(error) else f"{table.place(index)}: {error}"
    if isinstance(rows, list):
        good = [row for index, row in enumerate(rows) if index not in problems]
        # What cannot be used has no types; it is dropped, or an error, and must not break the others.
        blank = good[0] if good else {}
        filled = [blank if index in problems else row for index, row in enumerate(rows)]
        rows = datasets.Dataset.from_list(filled) if good else datasets.Dataset.from_list([{}] * len(rows))
    return rows, verdicts, problems


def _without_media(rows: datasets.Dataset) -> Iterable[dict[str, Any]]:
    return rows.select_columns([name for name in rows.column_names if name not in MEDIA])


def _check_texts(row: Mapping[str, Any], place: str, unread: Sequence[str] = ()) -> None:
    """Check a row whose images may be in columns that were not read: whether one is missing there is seen when they are."""
    media = {name: row[name] if name in row else "" for name in ("chosen", "rejected")}
    check_row({**dict.fromkeys(unread, ""), **row, **media}, place)
    if not row["prompt"].strip():
        raise ValueError(f"`prompt` of {place} is empty")


def _typed(row: dict[str, Any]) -> dict[str, Any]:
    """Row of a text file with `tie` and `margin` as what they are."""
    if (tie := row.get("tie")) is not None and not isinstance(tie, bool):
        text = str(tie).strip().lower()
        if text not in TRUE + FALSE:
            raise ValueError(f"`tie` is {tie!r}, but must be true or false")
        row = {**row, "tie": text in TRUE}
    if (margin := row.get("margin")) is not None:
        try:
            row = {**row, "margin": float(margin)}
        except (TypeError, ValueError) as error:
            raise ValueError(f"`margin` is {margin!r}, but must be a number") from error
    return row


def _by_verdict(rows: Any, verdicts: Sequence[Verdict]) -> Any:
    """Rows with `chosen` and `rejected` in place of two samples and what is said of them."""
    if isinstance(rows, list):
        return [_decided(row, verdict) for row, verdict in zip(rows, verdicts, strict=True)]

    def convert(batch: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        records = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
        decided = [_decided(row, verdicts[index]) for row, index in zip(records, indices, strict=True)]
        return {name: [row[name] for row in decided] for name in decided[0]}

    kept = {name: feature for name, feature in rows.features.items() if name not in SAMPLES}
    features = {
        **kept,
        **dict.fromkeys(("chosen", "rejected"), rows.features[SAMPLES[0]]),
        "tie": datasets.Value("bool"),
        "margin": datasets.Value("float32"),
    }
    return rows.map(
        convert, with_indices=True, batched=True, batch_size=32, remove_columns=list(SAMPLES),
        features=datasets.Features(features),
    )  # fmt: skip


def _decided(row: Mapping[str, Any], verdict: Verdict) -> dict[str, Any]:
    first, second = SAMPLES if verdict.first_wins else SAMPLES[::-1]
    others = {name: value for name, value in row.items() if name not in SAMPLES}
    decided = {"chosen": row[first], "rejected": row[second], "tie": verdict.tie}
    return {**others, **decided, "margin": verdict.margin if row.get("margin") is None else row["margin"]}


def _stream(table: Table, roles: Mapping[str, str], reader: WinnerReader | None, limit: int | None) -> Any:
    """Rows that are read when they are needed."""
    rows = table.rows if limit is None else table.rows.take(limit)
    if reader is not None:
        raise ValueError(
            f"{table.name} is streamed, but a winner by {list(reader.group)} has to be read beforehand. Leave streaming out, "
            "or name the columns `chosen` and `rejected`."
        )
    kept = {column: name for name, column in roles.items() if name in (*REQUIRED_COLUMNS, *EXTRA)}
    rows = rows.select_columns(list(kept))
    return rows.rename_columns({column: name for column, name in kept.items() if column != name})


def _finish(
    table: Table, rows: Any, problems: Mapping[int, str], skip: bool, describe: Callable[[list[int]], str]
) -> Any:
    """Rows that can be used, with what is known of their origin."""
    good = [index for index in range(len(rows)) if index not in problems]
    if problems:
        shown = "; ".join([problems[index] for index in sorted(problems)][:3])
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        count = f"{len(problems)} of {max(len(rows), len(problems))} rows of {table.name} cannot be used"
        if not skip or not good:
            fix = (
                "Correct them, or leave them out (--skip-bad-rows where the command has it)."
                if good
                else "Correct them."
            )
            raise ValueError(f"{count}. {shown}{more}. {fix}")
        logger.warning(f"{count} and are left out. {shown}{more}.")
        rows = rows.select(good)
    rows.info.description = describe(good)
    if table.homepage or table.license:
        rows.info.license, rows.info.homepage = table.license, table.homepage
    else:
        rows.info.dataset_name = os.path.basename(os.path.normpath(table.name))
    return rows


def _describe(table: Table, roles: Mapping[str, str], verdicts: Sequence[Verdict]) -> Callable[[list[int]], str]:
    """What was read, for people."""
    used = ", ".join(f"{name}={column}" for name, column in roles.items())
    unused = [column for column in table.columns if column not in roles.values()]

    def describe(good: list[int]) -> str:
        ties = sum(verdicts[index].tie for index in good) if verdicts else 0
        text = f"{table.name}: {len(good)} rows; columns {used}"
        text += f"; {ties} ties" * bool(ties) + f"; not used: {', '.join(unused)}" * bool(unused)
        return text + f"; license {table.license}" * bool(table.license)

    return describe
