"""`rewarddance rank`: order of images of one prompt."""

import argparse
import math

from .shared import CRITERIA_OPTIONS, JUDGE_OPTIONS, Commands, load_scorer, positive_integer, write


def add_to(commands: Commands) -> None:
    help = "order of images of one prompt"
    parser = commands.add_parser("rank", parents=[JUDGE_OPTIONS, CRITERIA_OPTIONS], help=help)
    parser.add_argument("--prompt", required=True, help="prompt that all images were generated from")
    parser.add_argument("--top-k", type=positive_integer, help="number of best images to list (default: all)")
    methods, help = ("round_robin", "swiss", "halving"), "which images are compared (default: all with all)"
    parser.add_argument("--ranking-method", choices=methods, default="round_robin", help=help)
    parser.add_argument("images", nargs="+", metavar="image", help="two or more images")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    ranking = load_scorer(args).rank(
        args.images,
        args.prompt,
        top_k=args.top_k,
        task=args.task,
        criteria=args.criteria,
        show_progress=True,
        ranking_method=args.ranking_method,
    )
    wins, scores = ranking.wins.tolist(), ranking.scores.tolist()
    matrix = [[None if math.isnan(value) else value for value in row] for row in ranking.matrix.tolist()]
    write(
        args,
        {"order": ranking.order, "images": args.images, "wins": wins, "scores": scores, "matrix": matrix},
        (f"{place}\t{wins[i]:g}\t{scores[i]:.6f}\t{args.images[i]}" for place, i in enumerate(ranking.order, start=1)),
    )
