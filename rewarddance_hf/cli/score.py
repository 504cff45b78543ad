"""`rewarddance score`: reward of each image."""

import argparse
import math
from typing import Any

from ..import_utils import require_extra
from .shared import (
    COLUMN_OPTIONS,
    CONDITION_HELP,
    CRITERIA_OPTIONS,
    JUDGE_OPTIONS,
    Commands,
    SomeFailed,
    add_shards,
    check_file,
    expand_folders,
    find_shard,
    load_scorer,
    positive_integer,
    unreadable,
    write,
)


def add_to(commands: Commands) -> None:
    parents = [JUDGE_OPTIONS, COLUMN_OPTIONS, CRITERIA_OPTIONS]
    parser = commands.add_parser("score", parents=parents, help="reward of each image")
    samples = parser.add_mutually_exclusive_group(required=True)
    samples.add_argument("--image", nargs="+", help="images, or folders of images")
    help = "table with `image`, `prompt` and optionally `reference`, `condition`: CSV, JSON lines, Parquet, dataset of the Hub, ..."
    samples.add_argument("--data", help=help)
    parser.add_argument("--prompt", nargs="+", help="one prompt for all images, or one each")
    parser.add_argument("--reference", nargs="+", help="one reference for all images, or one each (pairwise judges)")
    parser.add_argument("--condition", nargs="+", help=CONDITION_HELP.format("images"))
    help = "dimensions to score by, each on its own, e.g. alignment motion (a wrong name lists those of the task)"
    parser.add_argument("--dimensions", nargs="+", metavar="NAME", help=help)
    parser.add_argument("--limit", type=positive_integer, help="number of rows of --data (default: all)")
    help = "file of JSON lines that gets scores as they come; a repeated command goes on where it stopped"
    parser.add_argument("--output", metavar="FILE", help=help)
    add_shards(
        parser,
        "score --data, Parquet files of any size, in this many files of the folder --output (then: rewarddance merge)",
    )
    help = "give rows that cannot be scored no score, in place of ending there (with --num-shards; else they are left out)"
    parser.add_argument("--skip-bad-rows", action="store_true", help=help)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    if args.dimensions and (args.criteria or args.output):
        other = "--criteria" if args.criteria else "--output"
        raise argparse.ArgumentTypeError(f"argument --dimensions: not allowed with argument {other}")
    if args.num_shards:
        _score_shards(args)
        return
    find_shard(args)
    if args.output:
        check_file(args.output)
    rows, problems = _rows_of_data(args) if args.data else _rows_of_images(args)
    good = [index for index in range(len(rows)) if index not in problems]
    if not good:
        raise ValueError(problems[0])
    kept = (
        f"Scores are in {args.output}: repeat the command to go on."
        if args.output
        else "No score was kept: use --output."
    )
    args.kept = lambda: kept
    values: list[list[float]] = [[math.nan]] * len(rows)
    scorer = load_scorer(args)
    if args.output:
        asked = [
            {**row, "task": row.get("task") or args.task, "criteria": row.get("criteria") or args.criteria}
            for row in rows
        ]
        scorer.score_dataset(asked, args.output, skip=problems)
        values = _read_scores(args.output, len(rows))
    else:
        scores = scorer.score(
            [rows[index]["image"] for index in good],
            [rows[index]["prompt"] for index in good],
            _column(rows, good, "reference"),
            conditions=_column(rows, good, "condition"),
            task=_column(rows, good, "task", args.task),
            criteria=_column(rows, good, "criteria", args.criteria),
            dimensions=args.dimensions,
            show_progress=True,
        )
        for index, found in zip(good, scores.view(len(good), -1).tolist(), strict=True):
            values[index] = found
    _write(args, rows, values, problems)
    if problems:
        raise SomeFailed(list(problems.values()), len(rows), "scored")


def _score_shards(args: argparse.Namespace) -> None:
    if not args.data or not args.output:
        raise argparse.ArgumentTypeError("argument --num-shards: needs --data and --output")
    for name in ("prompt", "reference", "condition", "dimensions", "limit", "split", "task", "criteria"):
        if getattr(args, name) is not None:
            raise argparse.ArgumentTypeError(f"argument --{name}: not allowed with argument --num-shards")
    require_extra("train", "datasets")
    from ..data.columns import parse_columns
    from ..data.parquet import ParquetRows
    from ..scoring.dataset import COLUMNS
    from ..scoring.shards import score_shards

    columns = {column: name for name, column in parse_columns(args.columns).items()}
    rows = ParquetRows(args.data, columns, [*COLUMNS, "id"])
    shard = find_shard(args)
    args.kept = lambda: f"Finished shards are in {args.output}: repeat the command to go on."
    count = score_shards(
        load_scorer(args), rows, args.output, args.num_shards, shard, skip_bad_rows=args.skip_bad_rows
    )
    line = f"{count} rows scored in {args.output}. When all shards are there: rewarddance merge {args.output}"
    write(args, {"num_scored": count, "output": args.output}, [line])


def _write(
    args: argparse.Namespace, rows: list[dict[str, Any]], values: list[list[float]], problems: dict[int, str]
) -> None:
    documents, lines = [], []
    names = args.dimensions or ["score"]
    if args.dimensions:
        lines.append("\t".join([*args.dimensions, "image"]))
    for index, (row, found) in enumerate(zip(rows, values, strict=True)):
        found = found if index not in problems else [math.nan] * len(names)
        plain: list[float | None] = [None if math.isnan(value) else value for value in found]
        shown = {"dimensions": dict(zip(names, plain, strict=True))} if args.dimensions else {"score": plain[0]}
        error = {"error": problems[index]} if index in problems else {}
        image = _name_of(row["image"])
        reference = row.get("reference")
        documents.append(
            {
                "image": image,
                "prompt": row.get("prompt"),
                "reference": None if reference is None else _name_of(reference),
                **shown,
                **error,
            }
        )
        lines.append("\t".join([*(f"{value:.6f}" for value in found), image]))
    write(args, {"scores": documents}, lines)


def _rows_of_data(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[int, str]]:
    require_extra("train", "datasets")
    from ..data.files import load_samples

    names = ("prompt", "reference", "condition")
    for name in names:
        if len(getattr(args, name) or [""]) > 1:
            raise argparse.ArgumentTypeError(f"argument --{name}: with --data pass one for all rows that have none")
    defaults = {name: getattr(args, name)[0] for name in names if getattr(args, name)}
    return load_samples(
        args.data, args.split, columns=args.columns, limit=args.limit, show_progress=True, defaults=defaults
    )


def _rows_of_images(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[int, str]]:
    if not args.prompt:
        raise argparse.ArgumentTypeError("the following arguments are required: --prompt")
    images = expand_folders(args.image)
    prompts = _one_or_each(args.prompt, len(images), "--prompt")
    references = _one_or_each(args.reference or [None], len(images), "--reference")
    conditions = _one_or_each(args.condition or [None], len(images), "--condition")
    rows = [
        dict(zip(("image", "prompt", "reference", "condition"), values, strict=True))
        for values in zip(images, prompts, references, conditions, strict=True)
    ]
    return rows, unreadable(rows)


def _column(rows: list[dict[str, Any]], good: list[int], name: str, default: Any = None) -> list[Any] | None:
    """Values of rows, or None if none has one."""
    values = [rows[index].get(name) or default for index in good]
    return None if all(value is None for value in values) else values


def _read_scores(file: str, count: int) -> list[list[float]]:
    import json

    values = [[math.nan] for _ in range(count)]
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            result = json.loads(line)
            values[result["row"]] = [result["score"]]
    return values


def _name_of(media: Any) -> str:
    if isinstance(media, dict):
        return str(media.get("path") or "bytes")
    return media if isinstance(media, str) else f"{len(media)} frames"


def _one_or_each(values: list[Any], count: int, name: str) -> list[Any]:
    if len(values) not in (1, count):
        raise argparse.ArgumentTypeError(
            f"argument {name}: {len(values)} values for {count} images, pass one for all, or one each"
        )
    return values * count if len(values) == 1 else values
