"""`rewarddance score`: reward of each image."""

import argparse

from .shared import CRITERIA_OPTIONS, JUDGE_OPTIONS, Commands, load_scorer, write


def add_to(commands: Commands) -> None:
    parser = commands.add_parser("score", parents=[JUDGE_OPTIONS, CRITERIA_OPTIONS], help="reward of each image")
    parser.add_argument("--image", nargs="+", required=True, help="images")
    parser.add_argument("--prompt", nargs="+", required=True, help="one prompt for all images, or one each")
    parser.add_argument("--reference", nargs="+", help="one reference for all images, or one each (pairwise judges)")
    help = "dimensions to score by, each on its own, e.g. alignment motion (a wrong name lists those of the task)"
    parser.add_argument("--dimensions", nargs="+", metavar="NAME", help=help)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    prompts = _one_or_each(args.prompt, len(args.image), "--prompt")
    references = _one_or_each(args.reference, len(args.image), "--reference") if args.reference else None
    if args.dimensions and args.criteria:
        raise argparse.ArgumentTypeError("argument --dimensions: not allowed with argument --criteria")
    scores = load_scorer(args).score(
        args.image,
        prompts,
        references,
        task=args.task,
        criteria=args.criteria,
        dimensions=args.dimensions,
        show_progress=True,
    )
    documents, lines = [], []
    if args.dimensions:
        lines.append("\t".join([*args.dimensions, "image"]))
    for i, values in enumerate(scores.view(len(args.image), -1).tolist()):
        shown = (
            {"dimensions": dict(zip(args.dimensions, values, strict=True))}
            if args.dimensions
            else {"score": values[0]}
        )
        reference = references[i] if references else None
        documents.append({"image": args.image[i], "prompt": prompts[i], "reference": reference, **shown})
        lines.append("\t".join([*(f"{value:.6f}" for value in values), args.image[i]]))
    write(args, {"scores": documents}, lines)


def _one_or_each(values: list[str], count: int, name: str) -> list[str]:
    if len(values) not in (1, count):
        raise argparse.ArgumentTypeError(
            f"argument {name}: {len(values)} values for {count} images, pass one for all, or one each"
        )
    return values * count if len(values) == 1 else values
