"""Datasets of preference rows, as a data loader reads them."""

from collections.abc import Iterator
from typing import Any

import datasets
import torch

from .preference import OPTIONAL_COLUMNS, REQUIRED_COLUMNS, check_columns, check_row


def prepare_rows(dataset: Any, name: str) -> Any:
    """
    Make a dataset ready for a data loader: its rows then know their name. Raises a `ValueError` if it is empty or lacks a
    column.
    """
    if dataset is None or isinstance(dataset, PreferenceRows | StreamedRows):
        return dataset
    if isinstance(dataset, datasets.IterableDataset):
        if dataset.column_names is not None:
            check_columns(dataset.column_names, name)
            dataset = dataset.select_columns(_used_columns(dataset.column_names))
        return StreamedRows(keep_images_encoded(dataset).map(lambda _, i: {"row": f"{name}[{i}]"}, with_indices=True))
    if hasattr(dataset, "__getitem__"):
        return PreferenceRows(dataset, name)
    return dataset  # a torch `IterableDataset`; the collator checks its rows


def _used_columns(column_names: list[str]) -> list[str]:
    return [column for column in column_names if column in REQUIRED_COLUMNS + OPTIONAL_COLUMNS]


class PreferenceRows(torch.utils.data.Dataset):
    """
    Map-style view of a preference dataset for a data loader: every row knows its index, unused columns are not read,
    and images of a [`~datasets.Dataset`] stay encoded until the collator, which can name the row of a corrupt one.
    """

    def __init__(self, dataset: Any, name: str = "dataset") -> None:
        if len(dataset) == 0:
            raise ValueError(f"`{name}` is empty, but must have at least one row. Check its split and filters.")
        if isinstance(dataset, datasets.Dataset):
            check_columns(dataset.column_names, name)
            dataset = keep_images_encoded(dataset.select_columns(_used_columns(dataset.column_names)))
        else:
            check_row(dataset[0], f"{name}[0]")
        self.dataset = dataset
        self.name = name

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[int(index)], "row": f"{self.name}[{index}]"}


class StreamedRows(torch.utils.data.IterableDataset):
    """
    Streamed rows, which every process reads to take its share. accelerate would give each process of `datasets.IterableDataset`
    some of the files: rows of short ones would be seen more often, and rows of different files would have one name.
    """

    def __init__(self, dataset: datasets.IterableDataset) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)


def keep_images_encoded(dataset: Any) -> Any:
    """Turn off the decoding of image and video columns: rows hold `{"bytes": ..., "path": ...}` in their place."""
    encoded = datasets.Image(decode=False)
    for column, feature in (dataset.features or {}).items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(column, encoded)
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            dataset = dataset.cast_column(column, datasets.List(encoded))
        elif isinstance(feature, datasets.Video):
            dataset = dataset.cast_column(column, datasets.Video(decode=False))
    return dataset
