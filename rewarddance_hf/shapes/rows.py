"""What all rows of the shapes world have in common: each depends on its seed, split and index, and on nothing else."""

import random
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from torch.utils.data import Dataset

from .scenes import require_member


SPLITS = ("train", "id", "ood")


class ShapesRows(Dataset):
    """
    Rows that are made when they are asked for. A subclass names them and makes one out of a source of choices.

    Args:
        num_rows (`int`):
            Number of rows.
        split (`str`, *optional*, defaults to `"train"`):
            `"train"`; `"id"` for other rows of the same kind; `"ood"` for pairs of color and shape, paraphrases and
            drawing conditions that no training row has.
        seed (`int`, *optional*, defaults to `0`):
            Rows depend on it, on the split and on their index, and on nothing else.
        size (`int`, *optional*, defaults to `32`):
            Side of the images in pixels.

    Raises:
        `TypeError`: If a number is not an integer.
        `ValueError`: If a number is out of range or the split is unknown.
    """

    name: ClassVar[str]
    splits: ClassVar[tuple[str, ...]] = SPLITS
    rows_per_draw: ClassVar[int] = 1  # rows in a row that share their choices

    def __init__(self, num_rows: int, split: str = "train", seed: int = 0, size: int = 32) -> None:
        for name, value, least in (("num_rows", num_rows, 0), ("seed", seed, 0), ("size", size, 16)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"`{name}` is {value!r}, but must be an integer. Pass an `int`.")
            if value < least:
                raise ValueError(f"`{name}` is {value}, but must be {least} or more. Pass a larger number.")
        require_member("split", split, self.splits)
        self.num_rows = num_rows
        self.split = split
        self.seed = seed
        self.size = size

    def make_row(self, rng: random.Random, index: int) -> dict[str, Any]:
        """Make the row of this index; every choice comes from `rng`."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self.num_rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(self.num_rows))

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -self.num_rows <= index < self.num_rows:
            raise IndexError(
                f"`index` is {index}, but the dataset has {self.num_rows} rows. Pass an index in their range."
            )
        index = int(index) % self.num_rows
        return self.make_row(row_rng(self.name, self.seed, self.split, index // self.rows_per_draw), index)


def row_rng(name: str, seed: int, split: str, index: int) -> random.Random:
    """Source of every choice of a row."""
    # A string seed is hashed by SHA-512: the same in every process, and unrelated for neighboring rows.
    return random.Random(f"{name}/{split}/{seed}/{index}")


def draw_key(rng: random.Random, shares: dict[str, float]) -> str:
    """Draw one of several keys, each as often as its share."""
    return rng.choices(list(shares), list(shares.values()))[0]


def preference_row(
    prompt: str,
    samples: Sequence[Any],
    captions: Sequence[str],
    criteria: str,
    category: str,
    task: str = "text-to-image",
) -> dict[str, Any]:
    """
    Preference row of a chosen and a rejected sample, with a rationale after either verdict about the second image.

    `captions` say what each sample shows, `category` what is wrong with the rejected one.
    """
    chosen, rejected = captions
    return {
        "prompt": prompt,
        "chosen": samples[0],
        "rejected": samples[1],
        "task": task,
        "criteria": criteria,
        "rationale": {
            "yes": f"Image 1: {rejected}. Image 2: {chosen}.",
            "no": f"Image 1: {chosen}. Image 2: {rejected}.",
        },
        "category": category,
    }
