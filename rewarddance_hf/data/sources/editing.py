"""Benchmarks of image generation and editing by instruction: Multimodal RewardBench 2, EditReward-Bench."""

import itertools
import os
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from transformers.utils import logging

from .repository import DatasetRepository
from .rows import EDIT_CRITERIA, make_row, rows_from_table


logger = logging.get_logger(__name__)

MMRB2 = "rl-research/multimodal-rewardbench-2"
EDITREWARD_BENCH = "TIGER-Lab/EditReward-Bench"
IMAGE_PLACEHOLDER = re.compile(r"\s*<image_\d+>\s*")


def load_mmrb2(
    split: str = "test",
    streaming: bool = False,
    revision: str | None = None,
    token: str | None = None,
    repo_id: str | os.PathLike = MMRB2,
    config: str = "t2i",
) -> Any:
    """
    Load Multimodal RewardBench 2 ([paper](https://huggingface.co/papers/2512.16899)), for evaluation only (CC BY-NC 4.0).

    Args:
        split (`str`, *optional*, defaults to `"test"`):
            Split, of which there is one.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to read rows as they are needed.
        revision (`str`, *optional*):
            Branch, tag or commit.
        token (`str`, *optional*):
            Token for the Hub.
        repo_id (`str` or `os.PathLike`, *optional*, defaults to `"rl-research/multimodal-rewardbench-2"`):
            Mirror, or local folder, of the same layout.
        config (`str`, *optional*, defaults to `"t2i"`):
            `"t2i"` or `"edit"`. The others are judged by their text too.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: Preference rows, with the source of the prompt as category and the
        image to be edited as `condition`. Rows with several prompt images, or none or several in a response, do not
        fit into a preference row and are left out; a warning names each.

    Raises:
        `ValueError`: If the dataset, the split or a column is not found, or a verdict is neither a nor b.
    """
    if config not in ("t2i", "edit"):
        raise ValueError(
            f"`config` is {config!r}, but must be 't2i' or 'edit': responses of the others are more than an image."
        )
    repository = DatasetRepository(repo_id, revision, token)
    columns = ["pair_id", "prompt_text", "prompt_images", "response_a_images", "response_b_images", "chosen"]
    table = repository.table(config, split, columns, streaming, optional=["prompt_source"])
    return repository.describe(rows_from_table(table, partial(_mmrb2_rows, config=config)), MMRB2)


def _mmrb2_rows(row: Mapping[str, Any], config: str) -> list[dict[str, Any]]:
    verdict = str(row["chosen"]).lower()
    if verdict not in ("a", "b"):
        raise ValueError(f"`chosen` of pair {row['pair_id']!r} is {row['chosen']!r}, but must be 'a' or 'b'.")
    images = [row[column] or [] for column in ("prompt_images", "response_a_images", "response_b_images")]
    counts = [len(part) for part in images]
    if counts not in ([config == "edit", 1, 1], [0, 1, 1]):
        logger.warning(
            f"Pair {row['pair_id']!r} is left out: it has {counts} images in prompt, response a and response b, but a "
            "preference row holds one of each."
        )
        return []
    condition = images[0][0] if images[0] else None
    return [
        make_row(
            IMAGE_PLACEHOLDER.sub(" ", row["prompt_text"]).strip(),
            images[1][0],
            images[2][0],
            float(verdict == "a"),
            condition=condition,
            criteria=EDIT_CRITERIA if condition is not None else None,
            category=row.get("prompt_source"),
        )
    ]


def load_editreward_bench(
    split: str = "train",
    streaming: bool = False,
    revision: str | None = None,
    token: str | None = None,
    repo_id: str | os.PathLike = EDITREWARD_BENCH,
    config: str | None = None,
    subset: str | None = None,
) -> Any:
    """
    Load EditReward-Bench of TIGER-Lab ([paper](https://huggingface.co/papers/2509.26346)): pairs out of rankings such as
    "B>A" or "A=B". `EditScore/EditReward-Bench` is another benchmark.

    Args:
        split (`str`, *optional*, defaults to `"train"`):
            Split, of which there is one.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to read rows as they are needed.
        revision (`str`, *optional*):
            Branch, tag or commit.
        token (`str`, *optional*):
            Token for the Hub.
        repo_id (`str` or `os.PathLike`, *optional*, defaults to `"TIGER-Lab/EditReward-Bench"`):
            Mirror, or local folder, of the same layout.
        config (`str`, *optional*):
            Configuration, where the repository has several.
        subset (`str`, *optional*):
            `"2pair"`, `"3pair"` or `"4pair"`, to keep only rows with this value of `dataset`.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: Preference rows, with the source image as `condition` and the
        subset as category.

    Raises:
        `ValueError`: If the dataset, the split or a column is not found, or a ranking does not fit its candidates.
    """
    repository = DatasetRepository(repo_id, revision, token)
    columns = ["id", "instruction", "dataset", "ranking", "source_image", "candidate_1", "candidate_2"]
    table = repository.table(config, split, columns, streaming, optional=["candidate_3", "candidate_4"])
    return repository.describe(rows_from_table(table, partial(_editreward_rows, subset=subset)), EDITREWARD_BENCH)


def _editreward_rows(row: Mapping[str, Any], subset: str | None) -> list[dict[str, Any]]:
    if subset is not None and row["dataset"] != subset:
        return []
    candidates = [row[f"candidate_{i}"] for i in range(1, 5) if row.get(f"candidate_{i}") is not None]
    # "C>A" is about two candidates, of which A is the first one.
    tiers = [tier.split("=") for tier in re.sub(r"\s", "", row["ranking"]).upper().split(">")]
    letters = sorted(letter for tier in tiers for letter in tier)
    if len(set(letters)) != len(candidates) or len(letters) != len(candidates) or not "".join(letters).isalpha():
        raise ValueError(
            f"`ranking` of {row['id']!r} is {row['ranking']!r} for {len(candidates)} candidates, but must name each once, as "
            "in 'B>A' or 'A=B'."
        )
    places = {letter: place for place, tier in enumerate(tiers) for letter in tier}
    rows = []
    for (a, first), (b, second) in itertools.combinations(zip(letters, candidates, strict=True), 2):
        preference = 0.5 if places[a] == places[b] else float(places[a] < places[b])
        context = {"condition": row["source_image"], "criteria": EDIT_CRITERIA, "category": row["dataset"]}
        rows.append(make_row(row["instruction"], first, second, preference, **context))
    return rows
