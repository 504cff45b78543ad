"""Scores of large datasets, written as they come, so that an interrupted run goes on where it stopped."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from ..models.question_rewarddance import Example
from ..rewards import NonFiniteScoreError
from .results import Judgement


def score_into_file(
    stream: Callable[..., Iterator[tuple[torch.Tensor, torch.Tensor]]],
    is_pairwise: bool,
    examples_of: Callable[[str], tuple[Example, ...]],
    rows: Sequence[Mapping[str, Any]],
    output_file: str | os.PathLike,
    save_every: int = 256,
    show_progress: bool = True,
) -> int:
    """
    Score the rows that are not in a file yet, and append them to it.

    Args:
        stream (`Callable`):
            Function that judges an iterable of judgements, tells a function of the progress, and yields log-odds and
            scores of the next ones.
        is_pairwise (`bool`):
            Whether rows need a reference.
        examples_of (`Callable`):
            Function that gives the examples that rows of a task are shown, always the same ones for the same task.
        rows (`datasets.Dataset` or `list[dict]`):
            Rows, as in [`RewardDanceScorer.score_dataset`].
        output_file (`str` or `os.PathLike`):
            File of JSON lines.
        save_every (`int`, *optional*, defaults to `256`):
            Number of rows between two writes.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        `int`: Number of rows that were scored.

    Raises:
        `ValueError`: If the file belongs to other rows, or a row cannot be scored.
    """
    if save_every < 1:
        raise ValueError(f"`save_every` is {save_every}, but must be a positive number of rows. Pass 1 or more.")
    known = read_scores(output_file)
    beyond = sorted(row for row in known if not 0 <= row < len(rows))
    if beyond:
        raise ValueError(
            f"`output_file` {os.fspath(output_file)!r} has scores of the rows {beyond[:3]}, but `rows` has {len(rows)} rows "
            "only. Choose another file for another dataset."
        )
    todo = [row for row in range(len(rows)) if row not in known]
    if not todo:
        return 0
    judgements = (_judgement(rows[row], row, is_pairwise, examples_of) for row in todo)
    done = 0
    with (
        open(output_file, "a", encoding="utf-8") as file,
        tqdm(total=len(rows), initial=len(known), desc="Scoring", unit="row", disable=not show_progress) as progress,
        torch.no_grad(),
    ):
        try:
            for _, scores in stream(judgements, progress.update, window=save_every):
                pairs = zip(todo[done : done + len(scores)], scores.tolist(), strict=True)
                file.write("".join(json.dumps({"row": row, "score": score}) + "\n" for row, score in pairs))
                file.flush()
                os.fsync(file.fileno())
                done += len(scores)
        except NonFiniteScoreError as error:
            bad = [todo[row] for row in error.rows]
            raise ValueError(
                f"Scores of the rows {bad} are NaN or infinite, but must be finite. Check the weights for NaN, or load them "
                f"in another type (`dtype=torch.float32`). The {done} rows before are in the file."
            ) from error
    return done


def read_scores(output_file: str | os.PathLike) -> dict[int, float]:
    """
    Read a file of scores, and remove a last line that was cut off.

    Args:
        output_file (`str` or `os.PathLike`):
            File of JSON lines, which need not exist.

    Returns:
        `dict[int, float]`: Score by row.

    Raises:
        `ValueError`: If a line is none of ours, or a row is there twice.
    """
    if not os.path.exists(output_file):
        return {}
    with open(output_file, "rb") as file:
        content = file.read()
    end = content.rfind(b"\n") + 1
    scores: dict[int, float] = {}
    for number, line in enumerate(content[:end].splitlines(), 1):
        try:
            entry = json.loads(line)
            row, score = entry["row"], float(entry["score"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"Line {number} of `output_file` {os.fspath(output_file)!r} is no score ({error}), but all must be. Repair "
                "or remove it, or choose another file."
            ) from error
        if row in scores:
            raise ValueError(
                f"Line {number} of `output_file` {os.fspath(output_file)!r} is a second score of row {row}, but each has "
                "one. Were two runs writing to it? Remove it, or choose another file."
            )
        scores[row] = score
    if end < len(content):
        with open(output_file, "r+b") as file:
            file.truncate(end)
    return scores


def _judgement(
    row: Mapping[str, Any], index: int, is_pairwise: bool, examples_of: Callable[[str], tuple[Example, ...]]
) -> Judgement:
    """Question about one row."""
    wanted = ["image", "prompt", *(["reference"] if is_pairwise else [])]
    missing = [name for name in wanted if row.get(name) is None]
    if missing:
        raise ValueError(
            f"Row {index} has no {missing}, but {'a pairwise' if is_pairwise else 'this'} judge needs {wanted}. Add them, or "
            "rename columns."
        )
    if not isinstance(row["prompt"], str):
        raise TypeError(f"`prompt` of row {index} is of type `{type(row['prompt']).__name__}`, but must be a string.")
    task = row.get("task") or "text-to-image"
    return Judgement(
        row["image"],
        row["prompt"],
        reference=row["reference"] if is_pairwise else None,
        condition=row.get("condition"),
        task=task,
        criteria=row.get("criteria"),
        examples=examples_of(task),
    )
