"""GenAI-Bench of TIGER-Lab: images, edits and videos, with ties and pairs of which both are bad."""

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

from .repository import DatasetRepository
from .rows import EDIT_CRITERIA, make_row, rows_from_table
from .videos import CLIP_FEATURES, VideoFiles, fetch_clips


GENAI_BENCH = "TIGER-Lab/GenAI-Bench"
CONFIGS = {
    "image_generation": ["prompt", "left_image", "right_image", "vote_type"],
    "image_edition": ["instruct_prompt", "source_image", "left_output_image", "right_output_image", "vote_type"],
    "video_generation": ["prompt", "left_video", "right_video", "vote_type"],
}
# Share of votes for the left sample.
VOTES = {"leftvote": 1.0, "rightvote": 0.0, "tievote": 0.5, "bothbad_vote": 0.5}


def load_genai_bench(
    split: str = "test_v1",
    streaming: bool = False,
    revision: str | None = None,
    token: str | None = None,
    repo_id: str | os.PathLike = GENAI_BENCH,
    config: str = "image_generation",
    both_bad: str = "tie",
) -> Any:
    """
    Load GenAI-Bench of TIGER-Lab ([paper](https://huggingface.co/papers/2406.04485)). `BaiqiL/GenAI-Bench` is another
    dataset.

    Args:
        split (`str`, *optional*, defaults to `"test_v1"`):
            `test` or `test_v1`.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to read rows as they are needed.
        revision (`str`, *optional*):
            Branch, tag or commit.
        token (`str`, *optional*):
            Token for the Hub.
        repo_id (`str` or `os.PathLike`, *optional*, defaults to `"TIGER-Lab/GenAI-Bench"`):
            Mirror, or local folder, of the same layout.
        config (`str`, *optional*, defaults to `"image_generation"`):
            `"image_generation"`, `"image_edition"` (rows have the source image as `condition`) or `"video_generation"`.
        both_bad (`str`, *optional*, defaults to `"tie"`):
            What votes of "both bad" become: `"tie"`, or `"drop"` to leave these rows out (41 % of the edits).

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: Preference rows. Videos are fetched when a row is read.

    Raises:
        `ValueError`: If the dataset, the split or a column is not found, or a vote is none of the four.
    """
    if config not in CONFIGS:
        raise ValueError(f"`config` is {config!r}, but GenAI-Bench has {sorted(CONFIGS)}. Choose one of them.")
    if both_bad not in ("tie", "drop"):
        raise ValueError(f"`both_bad` is {both_bad!r}, but must be 'tie' or 'drop'.")
    repository = DatasetRepository(repo_id, revision, token)
    table = repository.table(config, split, CONFIGS[config], streaming)
    convert = partial(_genai_rows, config=config, both_bad=both_bad)
    if config == "video_generation":
        rows = rows_from_table(table, convert, CLIP_FEATURES)
        return repository.describe(fetch_clips(rows, VideoFiles(repository, streaming)), GENAI_BENCH)
    return repository.describe(rows_from_table(table, convert), GENAI_BENCH)


def _genai_rows(row: Mapping[str, Any], config: str, both_bad: str) -> list[dict[str, Any]]:
    vote = row["vote_type"]
    if vote not in VOTES:
        raise ValueError(f"`vote_type` is {vote!r}, but GenAI-Bench has {sorted(VOTES)}. Its schema has moved.")
    if vote == "bothbad_vote" and both_bad == "drop":
        return []
    prompt, *condition, left, right, _ = (row[column] for column in CONFIGS[config])
    context: dict[str, Any] = {}
    if config == "image_edition":
        context = {"condition": condition[0], "criteria": EDIT_CRITERIA}
    elif config == "video_generation":
        context = {"task": "text-to-video"}
    return [make_row(prompt, left, right, VOTES[vote], **context)]
