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
    parser.add_argument("--top-k", type=positive_integer, help="number of best images to list (default: all)")
    methods, help = ("round_robin", "swiss", "halving"), "which images are compared (default: all with all)"
    parser.add_argument("--ranking-method", choices=methods, default="round_robin", help=help)
    help = "table with `image` and `prompt`, whose prompts are ranked one by one: CSV, JSON lines, Parquet, dataset of the Hub, ..."
    parser.add_argument("--data", help=help)
    parser.add_argument("images", nargs="*", metavar="image", help="two or more images, or a folder of images")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    if bool(args.images) == bool(args.data):
        raise argparse.ArgumentTypeError("pass images, a folder of images, or --data")
    if args.images:
        if args.prompt is None:
            raise argparse.ArgumentTypeError("the following arguments are required: --prompt")
        rows: list[dict[str, Any]] = [{"image": image, "prompt": args.prompt} for image in expand_folders(args.images)]
        problems = unreadable(rows)
    else:
        require_extra("train", "datasets")
        from ..data.files import load_samples

        defaults = {} if args.prompt is None else {"prompt": args.prompt}
        rows, problems = load_samples(
            args.data, args.split, columns=args.columns, defaults=defaults, show_progress=True
        )
    prompts: dict[str, list[Any]] = {}
    for index, row in enumerate(rows):
        if index not in problems:
            prompts.setdefault(row["prompt"], []).append(row["image"])
    if problems and all(len(images) < 2 for images in prompts.values()):
        raise ValueError(next(iter(problems.values())))
    if args.data and all(len(images) < 2 for images in prompts.values()):
        raise ValueError(
            f"{args.data!r} has {len(prompts)} prompts of one image each, and a ranking needs at least 2."
        )
    documents: list[dict[str, Any]] = []
    args.kept = lambda: f"{len(documents)} of {len(prompts)} rankings were written." if args.data else ""
    scorer = load_scorer(args)
    for prompt, images in prompts.items():
        if args.data and len(images) < 2:
            sys.stderr.write(f"rewarddance rank: {prompt!r} has one image only and is left out\n")
            continue
        documents.append(_rank(args, scorer, prompt, images))
        if args.data and not args.json:  # each when it is done
            sys.stdout.write(f"# {prompt}\n")
            write(args, {}, _lines(documents[-1]))
    if args.images:
        document = {name: value for name, value in documents[0].items() if name != "prompt"}
        write(args, document, _lines(documents[0]))
    elif args.json:
        write(args, {"rankings": documents}, ())
    if problems:
        raise SomeFailed(list(problems.values()), len(rows), "ranked")


def _rank(args: argparse.Namespace, scorer: "RewardDanceScorer", prompt: str, images: list[Any]) -> dict[str, Any]:
    ranking = scorer.rank(
        images,
        prompt,
        top_k=args.top_k,
        task=args.task,
        criteria=args.criteria,
        show_progress=True,
        ranking_method=args.ranking_method,
    )
    matrix = [[None if math.isnan(value) else value for value in row] for row in ranking.matrix.tolist()]
    names = [image if isinstance(image, str) else str(dict(image).get("path")) for image in images]
    wins, scores = ranking.wins.tolist(), ranking.scores.tolist()
    return {
        "prompt": prompt,
        "order": ranking.order,
        "images": names,
        "wins": wins,
        "scores": scores,
        "matrix": matrix,
    }


def _lines(document: dict[str, Any]) -> list[str]:
    rows = [
        f"{place}\t{document['wins'][i]:g}\t{document['scores'][i]:.6f}\t{document['images'][i]}"
        for place, i in enumerate(document["order"], start=1)
    ]
    return ["place\twins\tscore\timage", *rows]
