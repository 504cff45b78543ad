"""Scores of millions of rows in shards, which workers make in any order and which are merged at the end."""

import json
import logging
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..checks import check_integers
from ..import_utils import require_extra
from ..models.question_rewarddance import Question
from ..parallel import Processes
from ..resumable import check_fingerprint, differing_keys, write_atomically
from ..rewards import NonFiniteScoreError
from .dataset import RowScoring
from .judge import Judge, non_finite_error
from .questions import Examples


logger = logging.getLogger(__name__)

Rows = dict[int, Mapping[str, Any]]  # by their numbers

MANIFEST = "manifest.json"
KEY = b"rewarddance"  # of the manifest in the metadata of a shard
ROWS_A_SHARD = 4096  # if no number of shards is asked for
ROWS_A_GROUP = 1 << 16  # of the merged file


def score_shards(
    judge: "Judge | Any",
    rows: Sequence[Mapping[str, Any]],
    folder: str | os.PathLike,
    num_shards: int | None = None,
    shard: int | None = None,
    window: int = 256,
    examples: Examples = None,
    skip_bad_rows: bool = False,
    show_progress: bool = True,
) -> int:
    """
    Score a large dataset in shards, by one or many workers; [`merge_shards`] joins them.

    A shard is written whole or not at all. Workers do not need to know of each other, and may be stopped at any moment
    and started again: finished shards are not scored again. A score depends on the rows of its window, never on the
    number of shards or workers.

    Args:
        judge ([`RewardDanceScorer`] or [`RemoteReward`]):
            Judge that scores.
        rows ([`ParquetRows`], `datasets.Dataset` or `list[dict]`):
            Rows as in [`RewardDanceScorer.score_dataset`], with an optional `id`.
        folder (`str` or `os.PathLike`):
            Folder of the scores, which all workers see.
        num_shards (`int`, *optional*):
            Number of shards, the same for all workers. Defaults to one for each 4,096 rows.
        shard (`int`, *optional*):
            Shard to score, from 0. Without it a single process scores all, and the processes of `accelerate launch` each
            their share.
        window (`int`, *optional*, defaults to 256):
            Number of rows that are planned together. A shard has whole windows.
        examples (`list[dict]`, *optional*):
            As in [`RewardDanceScorer.score_dataset`].
        skip_bad_rows (`bool`, *optional*, defaults to `False`):
            Whether rows that cannot be scored get a null and the reason in `error`, in place of an error.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        `int`: Number of rows that this call scored.

    Raises:
        `ValueError`: If the folder belongs to another judge, other rows or arguments, or a row cannot be scored. Finished
            shards stay.

    Example:

    ```python
    from rewarddance_hf import ParquetRows, RewardDanceScorer, merge_shards, score_shards

    scorer = RewardDanceScorer.from_pretrained("org/my-judge")
    rows = ParquetRows("hf://datasets/org/images/data/*.parquet", columns={"image": "image", "caption": "prompt"})
    score_shards(scorer, rows, "scores", num_shards=512, shard=7)  # on each worker
    merge_shards("scores")  # once, when all are done
    ```
    """
    require_extra("train", "pyarrow")
    check_integers(window=window)
    num_shards = max(1, -(-len(rows) // ROWS_A_SHARD)) if num_shards is None else num_shards
    if num_shards < 1 or not 0 <= (shard or 0) < num_shards:
        raise ValueError(
            f"`shard` is {shard} and `num_shards` {num_shards}, but shards count from 0 to `num_shards - 1`. Correct one of them."
        )
    processes = Processes.current()
    run = RowScoring(judge, rows, examples)
    run.check_processes(processes)
    manifest = {
        **run.fingerprint(),
        **(_describe(judge) if isinstance(judge, Judge) else {"engine": "remote"}),
        "num_rows": len(rows),
        "num_shards": num_shards,
        "window": window,
        "skip_bad_rows": skip_bad_rows,
    }
    place = Path(folder)
    (place / "shards").mkdir(parents=True, exist_ok=True)
    check_fingerprint(place / MANIFEST, manifest, f"`folder` {os.fspath(folder)!r}")
    todo = {}
    for number in processes.rows(num_shards) if shard is None else [shard]:
        path = _path(place, number, num_shards)
        if path.exists():
            _check_manifest(path, manifest)
        else:
            todo[path] = _rows_of(number, num_shards, len(rows), window)
    count = sum(map(len, todo.values()))
    with tqdm(total=count, desc="Scoring", unit="row", disable=not show_progress or not count) as progress:
        for path, mine in todo.items():
            columns = _score(run, mine, window, skip_bad_rows, progress)
            _write(path, columns, manifest)
            bad = [(row, error) for row, error in zip(mine, columns["error"], strict=True) if error]
            if bad:
                logger.warning(
                    f"{len(bad)} of the {len(mine)} rows in {path.name} have no score. The first is row {bad[0][0]}: {bad[0][1]}"
                )
    return count


def merge_shards(folder: str | os.PathLike, output_file: str | os.PathLike | None = None) -> Path:
    """
    Join the shards of [`score_shards`] into one parquet file, in the order of rows.

    The file is the same, byte by byte, whatever the number of shards and workers was.

    Args:
        folder (`str` or `os.PathLike`):
            Folder of the scores.
        output_file (`str` or `os.PathLike`, *optional*):
            File to write, by default `scores.parquet` in the folder. Columns: `row` (`int64`), `id` if the rows have one,
            `score` (`float32`, null where a bad row was skipped) and `error` (why it was).

    Returns:
        `Path`: The file.

    Raises:
        `FileNotFoundError`: If there are no shards, or some are missing.
        `ValueError`: If shards were made by other judges, rows or arguments than the manifest says, or a row is missing or
            there twice.
    """
    require_extra("train", "pyarrow")
    import pyarrow as pa
    import pyarrow.parquet as pq

    place = Path(folder)
    if not (place / MANIFEST).is_file():
        raise FileNotFoundError(
            f"{os.fspath(folder)!r} has no `{MANIFEST}`, so it holds no scores of `rewarddance score --num-shards`. Check the path."
        )
    manifest = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
    num_shards, num_rows, window = (manifest[name] for name in ("num_shards", "num_rows", "window"))
    expected = [_path(place, number, num_shards) for number in range(num_shards)]
    foreign = sorted({*(place / "shards").glob("*.parquet")} - {*expected})
    if foreign:
        raise ValueError(
            f"{os.fspath(folder)!r} has {foreign[0].name}, which is none of the {num_shards} shards of its manifest. Remove "
            "what belongs to another run."
        )
    missing = [number for number, path in enumerate(expected) if not path.exists()]
    if missing:
        shown = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        raise FileNotFoundError(
            f"{len(missing)} of {num_shards} shards are missing in {os.fspath(folder)!r}: {shown}. Score them first; finished "
            "ones are not scored again."
        )
    tables = []
    for number, path in enumerate(expected):
        _check_manifest(path, manifest)
        table = pq.read_table(path)
        mine = _rows_of(number, num_shards, num_rows, window)
        if table["row"].to_pylist() != list(mine):
            raise ValueError(
                f"{path.name} holds {len(table)} rows, but must hold the rows {mine.start} to {mine.stop - 1}, once each. "
                "Remove it, and score the shard again."
            )
        tables.append(table.replace_schema_metadata(None))
    merged = pa.concat_tables(tables).combine_chunks()
    kept = {key: value for key, value in manifest.items() if key != "num_shards"}
    merged = merged.replace_schema_metadata({KEY: json.dumps(kept, sort_keys=True)})
    path = Path(output_file) if output_file is not None else place / "scores.parquet"
    write_atomically(path, lambda stream: pq.write_table(merged, stream, row_group_size=ROWS_A_GROUP))
    return path


def _describe(judge: Judge) -> dict[str, Any]:
    """Where a judge comes from, and what its engine shares."""
    engine, name = judge._engine, judge.model.name_or_path
    return {
        "engine": "plain" if engine is None else "shared" if engine.share_prefixes else "features",
        "judge": None if os.path.isdir(name) else name,
        "revision": getattr(judge.model.config, "_commit_hash", None),
    }


def _path(folder: Path, number: int, num_shards: int) -> Path:
    return folder / "shards" / f"shard-{number:05d}-of-{num_shards:05d}.parquet"


def _rows_of(number: int, num_shards: int, num_rows: int, window: int) -> range:
    """Rows of a shard: whole windows, which are scored on their own, so that no score depends on the shards."""
    windows = -(-num_rows // window)
    first, last = (windows * k // num_shards * window for k in (number, number + 1))
    return range(min(first, num_rows), min(last, num_rows))


def _check_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    import pyarrow.parquet as pq

    different = differing_keys(json.loads((pq.read_schema(path).metadata or {}).get(KEY, b"{}")), manifest)
    if different:
        raise ValueError(
            f"{path.name} was made with other {different} than {MANIFEST} says, but scores of both would be mixed. Remove it, "
            "and score the shard again."
        )


def _score(run: RowScoring, mine: range, window: int, skip_bad_rows: bool, progress: tqdm) -> dict[str, list[Any]]:
    """Columns of a shard. Each window is scored on its own."""
    has_ids = "id" in (getattr(run.rows, "column_names", None) or run.rows[0])
    columns: dict[str, list[Any]] = {"row": list(mine), **({"id": []} if has_ids else {}), "score": [], "error": []}
    parts = [range(start, min(start + window, mine.stop)) for start in range(mine.start, mine.stop, window)]
    for rows, scores, bad in _answers(run, parts, skip_bad_rows):
        if has_ids:
            columns["id"] += [None if row.get("id") is None else str(row["id"]) for row in rows.values()]
        columns["score"] += [scores.get(row) for row in rows]
        columns["error"] += [bad.get(row) for row in rows]
        progress.update(len(rows))
    if mine and not any(score is not None for score in columns["score"]):
        raise ValueError(
            f"None of the rows {mine.start} to {mine.stop - 1} can be scored, but some must be. The first error: "
            f"{columns['error'][0]}"
        )
    return columns


def _answers(
    run: RowScoring, parts: Sequence[range], skip_bad_rows: bool
) -> Iterator[tuple[Rows, dict[int, float], dict[int, str]]]:
    """Rows of each window, their scores, and why some have none. Images of a window are prepared while the last one is judged."""
    done = 0
    begun: deque[Rows] = deque()

    def windows(left: Sequence[range]) -> Iterator[list[Question]]:
        for part in left:
            begun.append({row: run.rows[row] for row in part})
            yield [run.question(number, row) for number, row in begun[-1].items()]

    while done < len(parts):
        begun.clear()
        try:
            with torch.no_grad():
                for _, scores in run.judge.stream_windows(windows(parts[done:]), apart=True):
                    rows = begun.popleft()
                    done += 1
                    yield rows, dict(zip(rows, scores.tolist(), strict=True)), {}
        except (ValueError, TypeError):
            if not begun:
                raise
            rows = begun.popleft()  # the bad row is here or in the next window
            done += 1
            yield rows, *(_ask_in_halves(run, rows) if skip_bad_rows else (_ask(run, rows), {}))


def _ask(run: RowScoring, rows: Rows) -> dict[int, float]:
    """Scores of rows, by their numbers."""
    numbers = list(rows)
    questions = (run.question(number, row) for number, row in rows.items())
    try:
        with torch.no_grad():
            answers = list(run.judge.stream(questions, window=len(rows)))
    except NonFiniteScoreError as error:
        bad = [numbers[index] for index in error.rows]
        raise non_finite_error(bad, error.scores, "Finished shards stay.") from error
    return dict(zip(numbers, torch.cat([scores for _, scores in answers]).tolist(), strict=True))


def _ask_in_halves(run: RowScoring, rows: Rows) -> tuple[dict[int, float], dict[int, str]]:
    """Scores of the rows that have one, and why the others have none."""
    try:
        return _ask(run, rows), {}
    except (ValueError, TypeError) as error:
        if len(rows) == 1:
            return {}, dict.fromkeys(rows, " ".join(str(error).split()))
    numbers = list(rows)
    halves = numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]
    (scores, bad), (others, also_bad) = (_ask_in_halves(run, {row: rows[row] for row in half}) for half in halves)
    return scores | others, bad | also_bad


def _write(path: Path, columns: dict[str, list[Any]], manifest: Mapping[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {"row": pa.int64(), "id": pa.string(), "score": pa.float32(), "error": pa.string()}
    table = pa.table({name: pa.array(values, types[name]) for name, values in columns.items()})
    table = table.replace_schema_metadata({KEY: json.dumps(manifest, sort_keys=True)})
    write_atomically(path, lambda stream: pq.write_table(table, stream))
