"""Scores of large datasets, written as they are computed, so that an interrupted run resumes where it stopped."""

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from tqdm.auto import tqdm

from ..checks import check_integers
from ..models.question_rewarddance import Example, Question
from ..parallel import Processes
from ..resumable import RowFile, content_of, digest_of
from ..rewards import NonFiniteScoreError
from .judge import non_finite_error
from .questions import Examples


MEDIA = ("image", "reference", "condition")
COLUMNS = (*MEDIA, "prompt", "task", "criteria")


class DatasetScoring:
    """Judges, here or elsewhere, whose scores of a dataset go into a file."""

    stream: Any

    def stream_windows(
        self,
        windows: Iterator[list[Question]],
        on_progress: Callable[[int], Any] = lambda count: None,
        session: Any = None,
        apart: bool = False,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Log-odds and scores of each list of questions, one list after the other."""
        for questions in windows:
            logits, scores = zip(*self.stream(questions, on_progress, session, len(questions)), strict=True)
            yield torch.cat(logits), torch.cat(scores)

    def score_dataset(
        self,
        rows: Sequence[Mapping[str, Any]],
        output_file: str | os.PathLike,
        save_every: int = 256,
        show_progress: bool = True,
        examples: Examples = None,
        skip: Collection[int] = (),
    ) -> int:
        r"""
        Score a dataset into a file of JSON lines, `{"row": 0, "score": 0.5}`.

        An interrupted call resumes where it stopped when it is repeated: rows that are in the file are not scored
        again, and a last line that was cut off is removed first. A file of another judge, other rows or other examples
        is refused; `FILE.fingerprint.json` remembers what made it. Under several processes each scores its share, and
        the file is whole at the end. References that occur several times are computed once if their rows are close
        together.

        Args:
            rows (`datasets.Dataset` or `list[dict]`):
                Rows with `image` (image, or list of frames) and `prompt`, with `reference` for a pairwise judge, and
                optional `condition`, `task` and `criteria`, as in [`~RewardDanceScorer.score`].
            output_file (`str` or `os.PathLike`):
                File to write to, or to go on with.
            save_every (`int`, *optional*, defaults to `256`):
                Number of rows that are scored between two writes.
            show_progress (`bool`, *optional*, defaults to `True`):
                As in [`~RewardDanceScorer.score`].
            examples (`list[dict]`, *optional*):
                Questions with known verdicts, as in [`~RewardDanceScorer.score`]. Those without a `task` get that of
                the row.
            skip (`set[int]`, *optional*):
                Indices of rows that are not scored, e.g. of images that cannot be read.

        Returns:
            `int`: Number of rows that were scored by this call, by all processes.

        Raises:
            `ValueError`: If the file belongs to another judge or other rows, an example lacks something, or a row cannot be
                scored. What is in the file is kept.
        """
        check_integers(save_every=save_every)

        run = RowScoring(self, rows, examples)
        file = RowFile(output_file, run.fingerprint(), len(rows), f"`output_file` {os.fspath(output_file)!r}")
        processes = file.processes
        run.check_processes(processes)
        group = processes.patient_group()
        wanted = [row for row in range(len(rows)) if row not in skip]
        left = [row for row in wanted if row not in file.rows]
        todo = [left[index] for index in processes.rows(len(left))]
        questions = (run.question(row, rows[row]) for row in todo)
        done = 0
        error: Exception | None = None
        done_before = (len(wanted) - len(left)) // processes.count
        with (
            tqdm(
                total=done_before + len(todo),
                initial=done_before,
                desc="Scoring",
                unit="row",
                disable=not show_progress,
            ) as progress,
            torch.no_grad(),
        ):
            try:
                for _, scores in self.stream(questions, progress.update, window=save_every) if todo else ():
                    results = zip(todo[done : done + len(scores)], scores.tolist(), strict=True)
                    file.append([{"row": row, "score": score} for row, score in results])
                    done += len(scores)
            except NonFiniteScoreError as non_finite:
                bad = [todo[row] for row in non_finite.rows]
                error = non_finite_error(bad, non_finite.scores, f"The {done} rows before are in the file.")
                error.__cause__ = non_finite
            except Exception as other:
                error = other
        processes.raise_together(error, group)
        file.merge()
        return sum(processes.gather([done]))


class RowScoring:
    """Questions about the rows of a dataset, and what their scores depend on."""

    def __init__(self, judge: Any, rows: Sequence[Mapping[str, Any]], examples: Examples) -> None:
        self.judge = judge
        self.rows = rows
        self._examples = cache(lambda task: judge.read_examples(examples, task))

    def fingerprint(self) -> dict[str, Any]:
        """What these scores depend on: the fingerprint of their file."""
        return {
            **self.judge.fingerprint(),
            "examples": [_digest_of_example(example) for example in self._examples(None)],
            "rows": getattr(self.rows, "digest", None) or _describe_rows(self.rows),
        }

    def check_processes(self, processes: Processes) -> None:
        """Refuse a judge that several processes hold together, as each works on rows of its own."""
        if processes.count > 1 and self.judge.is_sharded:
            raise ValueError(
                f"The weights of the judge are sharded over {processes.count} processes, but each scores rows of its own. Load "
                "the whole judge on each, or score in one process."
            )

    def question(self, index: int, row: Mapping[str, Any]) -> Question:
        """Question about a row. A `ValueError` says what it lacks."""
        is_pairwise = self.judge.is_pairwise
        wanted = ["image", "prompt", *(["reference"] if is_pairwise else [])]
        missing = [name for name in wanted if row.get(name) is None]
        if missing:
            raise ValueError(
                f"Row {index} has no {missing}, but {'a pairwise' if is_pairwise else 'this'} judge needs {wanted}. Add them, "
                "or rename columns."
            )
        task = row.get("task") or None
        return Question(
            row["image"],
            row["prompt"],
            reference=row["reference"] if is_pairwise else None,
            condition=row.get("condition"),
            task=task,
            criteria=row.get("criteria"),
            examples=self._examples(task),
            row=index,
        )


def _describe_rows(rows: Any) -> str:
    """Digest of the texts and paths of all rows, and of the images of 16 of them."""
    count = min(16, len(rows))
    looked_at = [len(rows) * i // count for i in range(count)]
    parts: list[str] = [str(len(rows))]
    if hasattr(rows, "select_columns"):  # a dataset, of which not all images are to be decoded
        texts = [name for name in COLUMNS if getattr(rows.features.get(name), "dtype", None) == "string"]
        parts += [digest_of(row) for row in (rows.select_columns(texts) if texts else ())]
        parts += [_digest_of_media(rows[i]) for i in looked_at]
    else:
        for i, row in enumerate(rows):
            parts.append(digest_of({name: _describe(row.get(name)) for name in COLUMNS}))
            if i in looked_at:
                parts.append(_digest_of_media(row))
    return digest_of(*parts)


def _digest_of_media(row: Mapping[str, Any]) -> str:
    return digest_of([content_of(row.get(name)) for name in MEDIA])


def _describe(value: Any) -> Any:
    """What stands for a value in a digest, without its pixels: the same in every process."""
    if isinstance(value, (list, tuple)):
        return [_describe(part) for part in value]
    if isinstance(value, Mapping):
        return {name: _describe(part) for name, part in value.items()}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value if value is None or isinstance(value, (str, int, float)) else type(value).__name__


def _digest_of_example(example: Example) -> str:
    question = example.question
    return digest_of(question.prompt, question.task, question.criteria, example.verdict, question.images)
