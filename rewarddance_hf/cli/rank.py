"""`rewarddance rank`: order of images of one prompt."""

import argparse
import math
import sys
from typing import TYPE_CHECKING, Any

from ..import_utils import require_extra
from .shared import (
    COLUMN_OPTIONS,
    CRITERIA_OPTIONS,
    JUDGE_OPTIONS,
    Commands,
    SomeFailed,
    expand_folders,
    load_scorer,
    positive_integer,
    unreadable,
    write,
)


if TYPE_CHECKING:
    from ..scoring.scorer import RewardDanceScorer


def add_to(commands: Commands) -> None:
    help = "order of images of one prompt"
    parser = commands.add_parser("rank", parents=[JUDGE_OPTIONS, COLUMN_OPTIONS, CRITERIA_OPTIONS], help=help)
    parser.add_argument("--prompt", help="prompt that all images were generated from")
    parser.add_argument("--condition", help="image that they were made from: source image of an edit, or first frame")
    parser.add_argument("--top-k", type=positive_integer, help="number of best images to list (default: all)")
    methods, help = ("round_robin", "swiss", "halving"), "which images are compared (default: all with all)"
    parser.add_argument("--ranking-method", choices=methods, default="round_robin", help=help)
    help = (
        "table with `image`, `prompt` and optionally `condition`, whose prompts (for edits: prompts of one source image) are ranked "
        "one by one: CSV, JSON lines, Parquet, dataset of the Hub, ..."
    )
    parser.add_argument("--data", help=help)
    parser.add_argument("images", nargs="*", metavar="image", help="two or more images, or a folder of images")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    if bool(args.images) == bool(args.data):
        raise argparse.ArgumentTypeError("pass images, a folder of images, or --data")
    if args.images:
        if args.prompt is None:
            raise argparse.ArgumentTypeError("the following arguments are required: --prompt")
        rows: list[dict[str, Any]] = [
            {"image": image, "prompt": args.prompt, "condition": args.condition}
            for image in expand_folders(args.images)
        ]
        problems = unreadable(rows)
    else:
        require_extra("train", "datasets")
        from ..data.files import load_samples

        given = {"prompt": args.prompt, "condition": args.condition}
        defaults = {name: value for name, value in given.items() if value is not None}
        rows, problems = load_samples(
            args.data, args.split, columns=args.columns, defaults=defaults, show_progress=True
        )
    prompts: dict[Any, list[dict[str, Any]]] = {}
    for index, row in enumerate(rows):
        if index not in problems:
            asked = (row["prompt"], _identity(row.get("condition")), row.get("task"), row.get("criteria"))
            prompts.setdefault(asked, []).append(row)
    if problems and all(len(group) < 2 for group in prompts.values()):
        raise ValueError(next(iter(problems.values())))
    if args.data and all(len(group) < 2 for group in prompts.values()):
        raise ValueError(
            f"{args.data!r} has {len(prompts)} prompts of one image each, and a ranking needs at least 2."
        )
    documents: list[dict[str, Any]] = []
    args.kept = lambda: f"{len(documents)} of {len(prompts)} rankings were written." if args.data else ""
    scorer = load_scorer(args)
    for group in prompts.values():
        prompt = group[0]["prompt"]
        if args.data and len(group) < 2:
            sys.stderr.write(f"rewarddance rank: {prompt!r} has one image only and is left out\n")
            continue
        documents.append(_rank(args, scorer, group))
        if args.data and not args.json:  # each when it is done
            source = documents[-1].get("condition")
            sys.stdout.write(f"# {prompt}{'' if source is None else f' ({source})'}\n")
            write(args, {}, _lines(documents[-1]))
    if args.images:
        document = {name: value for name, value in documents[0].items() if name != "prompt"}
        write(args, document, _lines(documents[0]))
    elif args.json:
        write(args, {"rankings": documents}, ())
    if problems:
        raise SomeFailed(list(problems.values()), len(rows), "ranked")


def _identity(condition: Any) -> Any:
    """What two rows of the same source image have in common."""
    return (condition.get("bytes") or condition.get("path")) if isinstance(condition, dict) else condition


def _rank(args: argparse.Namespace, scorer: "RewardDanceScorer", group: list[dict[str, Any]]) -> dict[str, Any]:
    first, images = group[0], [row["image"] for row in group]
    condition = first.get("condition")
    ranking = scorer.rank(
        images,
        first["prompt"],
        top_k=args.top_k,
        condition=condition,
        task=first.get("task") or args.task,
        criteria=first.get("criteria") or args.criteria,
        show_progress=True,
        ranking_method=args.ranking_method,
    )
    matrix = [[None if math.isnan(value) else value for value in row] for row in ranking.matrix.tolist()]
    names = [_name_of(image) for image in images]
    wins, scores = ranking.wins.tolist(), ranking.scores.tolist()
    return {
        "prompt": first["prompt"],
        **({} if condition is None else {"condition": _name_of(condition)}),
        "order": ranking.order,
        "images": names,
        "wins": wins,
        "scores": scores,
        "matrix": matrix,
    }


def _name_of(image: Any) -> str:
    return image if isinstance(image, str) else str(dict(image).get("path"))


def _lines(document: dict[str, Any]) -> list[str]:
    rows = [
        f"{place}\t{document['wins'][i]:g}\t{document['scores'][i]:.6f}\t{document['images'][i]}"
        for place, i in enumerate(document["order"], start=1)
    ]
    return ["place\twins\tscore\timage", *rows]
