"""Data of a run, told by flags: own files and folders, datasets of the Hub, public sets by name."""

import os
from dataclasses import dataclass, field
from typing import Any

from transformers.utils import logging
from trl import ScriptArguments

from ..data.files import hold_out, load_prompts, load_rows
from ..data.tables import NoSplitError


logger = logging.get_logger(__name__)

# What is held out of data that has no split to measure on: this share of the rows, but no more of them than that.
HELD_OUT_SHARE, MOST_HELD_OUT = 0.05, 500


@dataclass
class DataArguments(ScriptArguments):
    """Data of a run."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Data: CSV, TSV, JSON, JSON lines, Parquet (paths relative to the file, or addresses); folder of images with "
            "metadata.csv; folder of `save_to_disk`; dataset of the Hub; or public set by name, e.g. hpdv3.",
            "aliases": ["--data", "--dataset"],
        },
    )
    dataset_test_split: str = field(
        default="test",
        metadata={"help": "Split to measure on. Of data without it rows are held out; see `test_split_size`."},
    )
    test_split_size: float | None = field(
        default=None,
        metadata={
            "help": "Rows to hold out and to measure on, whole prompts together: a share below 1, or a number; 0 for none. "
            f"Defaults to {HELD_OUT_SHARE} (at most {MOST_HELD_OUT} rows) of data that has no `dataset_test_split`."
        },
    )
    columns: str | None = field(
        default=None,
        metadata={
            "help": "Columns by what they are: prompt=caption,chosen=a,rejected=b. Or two samples and what tells the winner: "
            "prompt=caption,image_1=a,image_2=b,label=winner (or votes_1=..,votes_2=.. or score_1=..,score_2=..)."
        },
    )
    label_values: str | None = field(
        default=None, metadata={"help": "Labels of the first sample, of the second, and of a tie: left,right,both."}
    )
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "Whether to leave out rows that cannot be used, with a count."}
    )
    check_rows: bool = field(
        default=True, metadata={"help": "Whether to decode all images before weights are loaded."}
    )
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Only show what would be done: rows, a picture of three of them, tokens, updates, estimated memory and time."
        },
    )


def load_preferences_of(arguments: DataArguments, with_eval: bool, show_progress: bool = True) -> tuple[Any, Any]:
    """Rows to train on, and those to measure on, or None."""
    if arguments.dataset_streaming:
        read = {"streaming": True}
        test = _load(arguments, arguments.dataset_test_split, **read) if with_eval else None
        return _load(arguments, arguments.dataset_train_split, **read), test
    train = _load(arguments, arguments.dataset_train_split, show_progress=show_progress)
    is_local = os.path.exists(str(arguments.dataset_name))
    is_named = arguments.dataset_test_split != DataArguments.dataset_test_split
    if arguments.test_split_size is None and (with_eval or is_local or is_named):
        try:
            return train, _load(arguments, arguments.dataset_test_split, show_progress=show_progress)
        except NoSplitError:
            if is_named:
                raise
    size = arguments.test_split_size
    if size is None:
        size = min(HELD_OUT_SHARE, MOST_HELD_OUT / len(train))
    if not size:
        return train, None
    try:
        train, test = hold_out(train, size)
    except ValueError as error:
        if arguments.test_split_size is not None or with_eval:
            raise
        logger.warning(f"No rows are held out, so the judge will not be measured: {error}")
        return train, None
    logger.info(f"{len(test)} rows are held out, and {len(train)} are trained on.")
    return train, test


def load_prompts_of(arguments: DataArguments, split: str, holds_out: bool) -> Any:
    """
    Prompts of a split. If there is something to be measured on and data has no split for it, prompts are held out of those of the
    training split.
    """
    train, test = arguments.dataset_train_split, arguments.dataset_test_split
    size = arguments.test_split_size
    if size is None and (holds_out or split == test):
        try:
            rows = _load_prompts(arguments, test)
            return rows if split == test else _load_prompts(arguments, split)
        except NoSplitError:
            if test != DataArguments.dataset_test_split:
                raise
    rows = _load_prompts(arguments, train)
    if not size and not holds_out and split == train:
        return rows
    return hold_out(rows, size or min(HELD_OUT_SHARE, MOST_HELD_OUT / len(rows)))[split == test]


def _load_prompts(arguments: DataArguments, split: str) -> Any:
    name, config = str(arguments.dataset_name), arguments.dataset_config
    return load_prompts(name, split, columns=arguments.columns, config=config)


def _load(arguments: DataArguments, split: str, show_progress: bool = False, streaming: bool = False) -> Any:
    labels = arguments.label_values
    return load_rows(
        str(arguments.dataset_name),
        split,
        columns=arguments.columns,
        label_values=labels.split(",") if isinstance(labels, str) else labels,  # of a YAML file it may be a list
        skip_bad_rows=arguments.skip_bad_rows,
        check=arguments.check_rows,
        show_progress=show_progress,
        config=arguments.dataset_config,
        streaming=streaming,
    )
