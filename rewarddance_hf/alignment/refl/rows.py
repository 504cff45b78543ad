"""Prompts that a generator is tuned on: their rows, their order and their seeds."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ...import_utils import require_extra


require_extra("train", "datasets")

import datasets  # noqa: E402
import pyarrow.compute as pc  # noqa: E402


def seed_of(*parts: Any) -> int:
    """Seed that depends only on the given values: every split into batches and processes draws the same."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


class PromptRows(torch.utils.data.Dataset):
    """
    Rows with `prompt` (`str`), optional `references` (list of images, or of clips as lists of images), and any other columns
    that rewards take, such as `condition`, `task` and `criteria`. They are checked before any image is decoded.
    """

    def __init__(self, dataset: Any, name: str = "train_dataset", needs_references: bool = False) -> None:
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise TypeError(
                f"`{name}` is a `{type(dataset).__name__}`, but must have a length and rows that can be picked by index, "
                "as a `datasets.Dataset` or a list of dictionaries. Load it without streaming."
            )
        if len(dataset) == 0:
            raise ValueError(f"`{name}` is empty, but must have at least one row with a `prompt`. Check its filters.")
        self.dataset = dataset
        self.name = name
        self.needs_references = needs_references
        if isinstance(dataset, datasets.Dataset):
            self._check_columns(dataset)
        else:
            # A generic dataset may make its rows when they are asked for, so that only the first are looked at.
            for index in range(len(dataset) if isinstance(dataset, Sequence) else min(2, len(dataset))):
                self._check_row(index, dataset[index])

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def has_conditions(self) -> bool:
        """Whether the rows have a `condition`, as far as the first one tells."""
        return self.dataset[0].get("condition") is not None

    def prompts(self) -> list[str]:
        """Prompts of all rows. The images of a `datasets.Dataset` are not decoded."""
        if isinstance(self.dataset, datasets.Dataset):
            return list(self.dataset.select_columns(["prompt"]).with_format(None)["prompt"])
        return [self.dataset[index]["prompt"] for index in range(len(self.dataset))]

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        """Row, with the number of its draw if the index is a pair as [`DrawSampler`] gives it."""
        row, draw = index if isinstance(index, tuple) else (index, 0)
        values = dict(self.dataset[row])
        self._check_row(row, values)
        return {**values, "draw": draw}

    def _check_columns(self, dataset: datasets.Dataset) -> None:
        columns = dataset.column_names
        if "prompt" not in columns:
            raise ValueError(
                f"`{self.name}` lacks the column `prompt`; it has {columns}. Rename the one with the text."
            )
        if self.needs_references and "references" not in columns:
            raise ValueError(f"`{self.name}` lacks the column `references`; it has {columns}. {WHY_REFERENCES}")
        names = ["prompt", "references"] if self.needs_references else ["prompt"]
        if self.needs_references and not isinstance(
            dataset.features["references"], (datasets.List, datasets.LargeList)
        ):
            raise TypeError(
                f"`references` of `{self.name}` is a column of `{dataset.features['references']}`, but must hold lists of "
                "images, or of clips as lists of images. Map it to lists."
            )
        index = 0
        # In the Arrow format images are counted, and neither read nor decoded.
        for batch in dataset.select_columns(names).with_format("arrow").iter(1000):
            for prompt in batch["prompt"].to_pylist():
                self._check_prompt(index, prompt)
                index += 1
            if self.needs_references:
                counts = pc.list_value_length(batch["references"]).to_pylist()
                for position, count in enumerate(counts, start=index - len(counts)):
                    if not count:
                        self._missing_reference(position)

    def _check_row(self, index: int, row: Mapping[str, Any]) -> None:
        if "prompt" not in row:
            raise ValueError(
                f"`{self.name}[{index}]` lacks `prompt`; it has {sorted(row)}. Rename the one with the text."
            )
        self._check_prompt(index, row["prompt"])
        references = row.get("references")
        if references is not None and not isinstance(references, (list, tuple)):
            raise TypeError(
                f"`references` of `{self.name}[{index}]` is a `{type(references).__name__}`, but must be a list of "
                "images, or of clips as lists of images. Put it into a list."
            )
        if self.needs_references and (not references or any(reference is None for reference in references)):
            self._missing_reference(index)

    def _check_prompt(self, index: int, prompt: Any) -> None:
        if not isinstance(prompt, str):
            raise TypeError(
                f"`prompt` of `{self.name}[{index}]` is a `{type(prompt).__name__}`, but must be a string. Drop the row."
            )

    def _missing_reference(self, index: int) -> None:
        raise ValueError(f"`references` of `{self.name}[{index}]` is missing or empty. {WHY_REFERENCES}")


WHY_REFERENCES = (
    "A pairwise reward compares each sample with at least one image of the same prompt. Make Best-of-N references with "
    "the un-tuned pipeline, drop the row, or pass a pointwise reward."
)


class DrawSampler(torch.utils.data.Sampler[tuple[int, int]]):
    """
    Order of an epoch as pairs of row and number of the draw, a function of seed and epoch only.

    Every epoch is filled up to whole updates of `batch_size` rows (over all processes and accumulation steps) with rows from
    its beginning, so that the rows of an update do not depend on how it is split. A row that comes again has another number.
    """

    def __init__(self, num_rows: int, batch_size: int, seed: int) -> None:
        self.num_rows = num_rows
        self.seed = seed
        self.epoch = 0
        self.length = math.ceil(num_rows / batch_size) * batch_size

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, "order", self.epoch))
        order = torch.randperm(self.num_rows, generator=generator).tolist()
        for position in range(self.length):
            yield order[position % self.num_rows], self.epoch * self.length + position


def context_of(columns: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Columns that rewards may take: not the trainer's own, and none by the name of another argument of rewards."""
    return {name: values for name, values in columns.items() if name not in ("prompt", "draw", "images", "prompts")}


def collate_rows(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Turn rows into columns. Values stay as they are."""
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    return {name: values for name, values in columns.items() if any(value is not None for value in values)}
