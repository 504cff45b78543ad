"""Command line: `rewarddance score | rank | evaluate | demo`. Results go to stdout, progress and errors to stderr."""

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import __version__


if TYPE_CHECKING:
    from .scoring.scorer import RewardDanceScorer


DTYPES = ("auto", "float32", "bfloat16", "float16")
SHAPES_PREFIX = "shapes:"
DEFAULT_SHAPES_ROWS = 1000


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run the command line.

    Args:
        argv (`list[str]`, *optional*):
            Arguments, by default those of the process.

    Returns:
        `int`: Exit code: 0 if all went well, 1 if an input or a model cannot be used, 2 if the arguments are wrong.
    """
    parser = _make_parser()
    try:
        args = parser.parse_args(argv)
    except SystemExit as exit:  # argparse has written help or what is wrong
        return int(exit.code or 0)
    try:
        args.run(args)
        return 0
    except argparse.ArgumentTypeError as error:
        sys.stderr.write(f"rewarddance {args.command}: error: {error}\n")
        return 2
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if args.traceback:
            raise
        sys.stderr.write(f"rewarddance {args.command}: error: {' '.join(str(error).split())}\n")
        return 1


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rewarddance",
        description="Judge generated images by the probability that a vision-language model says yes.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{score,rank,evaluate,demo}")

    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--traceback", action="store_true", help="show the traceback of errors")
    judge = argparse.ArgumentParser(add_help=False, parents=[shared])
    judge.add_argument("--model", required=True, help="judge: repository ID or folder, of a checkpoint or an adapter")
    judge.add_argument(
        "--batch-size", type=_positive_integer, default=8, help="judgements per forward pass (default: 8)"
    )
    judge.add_argument("--device", help="device, e.g. cuda:1 (default: cuda if there is one, else cpu)")
    judge.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="type of the weights (default: as they were saved)"
    )
    judge.add_argument("--json", action="store_true", help="write one JSON document")
    criteria = argparse.ArgumentParser(add_help=False)
    criteria.add_argument(
        "--task", default="text-to-image", help="task whose criteria are used (default: text-to-image)"
    )
    criteria.add_argument("--criteria", help="criteria in place of those of the task")

    score = commands.add_parser("score", parents=[judge, criteria], help="reward of each image")
    score.add_argument("--image", nargs="+", required=True, help="images")
    score.add_argument("--prompt", nargs="+", required=True, help="one prompt for all images, or one each")
    score.add_argument("--reference", nargs="+", help="one reference for all images, or one each (pairwise judges)")
    score.set_defaults(run=_score)

    rank = commands.add_parser("rank", parents=[judge, criteria], help="order of images of one prompt")
    rank.add_argument("--prompt", required=True, help="prompt that all images were generated from")
    rank.add_argument("--top-k", type=_positive_integer, help="number of best images to list (default: all)")
    rank.add_argument(
        "--method",
        choices=("round_robin", "swiss", "halving"),
        default="round_robin",
        help="which images are compared (default: all with all)",
    )
    rank.add_argument("images", nargs="+", metavar="image", help="two or more images")
    rank.set_defaults(run=_rank)

    evaluate = commands.add_parser("evaluate", parents=[judge], help="accuracy on preference rows")
    evaluate.add_argument(
        "--dataset",
        required=True,
        help="repository ID or folder, a folder written by `save_to_disk`, or shapes:id, shapes:ood, shapes:train",
    )
    evaluate.add_argument("--split", help="split, e.g. test or test[:100] (default: the only one)")
    evaluate.add_argument("--config", help="configuration of the dataset")
    evaluate.add_argument("--data-files", nargs="+", help="files of the dataset, e.g. with --dataset parquet")
    evaluate.add_argument(
        "--limit", type=_positive_integer, help=f"number of rows (default: all; {DEFAULT_SHAPES_ROWS} of shapes)"
    )
    evaluate.add_argument("--seed", type=int, default=0, help="seed of the bootstrap and of shapes (default: 0)")
    evaluate.add_argument("--output", help="JSON file for the metrics")
    evaluate.add_argument(
        "--calibrate", metavar="FOLDER", help="fit a temperature on these rows and save the calibrated judge there"
    )
    evaluate.set_defaults(run=_evaluate)

    demo = commands.add_parser("demo", parents=[shared], help="train and measure a tiny judge on this computer")
    demo.add_argument("--output-dir", default="outputs/demo", help="folder for the report (default: outputs/demo)")
    demo.set_defaults(run=_demo)
    return parser


def _positive_integer(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


def _score(args: argparse.Namespace) -> None:
    prompts = _one_or_each(args.prompt, len(args.image), "--prompt")
    references = None if args.reference is None else _one_or_each(args.reference, len(args.image), "--reference")
    scorer = _load_scorer(args)
    scores = scorer.score(
        args.image, prompts, references, task=args.task, criteria=args.criteria, show_progress=True
    ).tolist()
    if args.json:
        shown: Sequence[str | None] = references or [None] * len(prompts)
        rows = zip(args.image, prompts, shown, scores, strict=True)
        names = ("image", "prompt", "reference", "score")
        _write_json({"scores": [dict(zip(names, row, strict=True)) for row in rows]})
    else:
        _write_lines(f"{score:.6f}\t{image}" for score, image in zip(scores, args.image, strict=True))


def _rank(args: argparse.Namespace) -> None:
    ranking = _load_scorer(args).rank(
        args.images,
        args.prompt,
        top_k=args.top_k,
        task=args.task,
        criteria=args.criteria,
        show_progress=True,
        method=args.method,
    )
    wins, scores = ranking.wins.tolist(), ranking.scores.tolist()
    if args.json:
        matrix = [[None if math.isnan(value) else value for value in row] for row in ranking.matrix.tolist()]
        _write_json({"order": ranking.order, "images": args.images, "wins": wins, "scores": scores, "matrix": matrix})
    else:
        _write_lines(
            f"{place}\t{wins[i]:g}\t{scores[i]:.6f}\t{args.images[i]}"
            for place, i in enumerate(ranking.order, start=1)
        )


def _evaluate(args: argparse.Namespace) -> None:
    if args.output:
        _check_file(args.output)
    if args.calibrate:
        _check_folder(args.calibrate, args.model)
    from .evaluation.evaluator import RewardDanceEvaluator

    dataset = _load_rows(args)
    scorer = _load_scorer(args)
    evaluator = RewardDanceEvaluator(dataset, seed=args.seed, show_progress=True)
    metrics = evaluator(scorer)
    if args.calibrate:
        metrics |= evaluator.calibrate(scorer, results=evaluator.results)
    document = {"model": args.model, "dataset": args.dataset, "split": args.split, "metrics": metrics}
    # Shown before anything is written: a full disk must not cost the result of hours.
    if args.json:
        _write_json(document)
    else:
        width = max(map(len, metrics))
        _write_lines(f"{name:{width}}  {value:.6g}" for name, value in metrics.items())
    sys.stdout.flush()
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            file.write(json.dumps(document, indent=2) + "\n")
    if args.calibrate:
        scorer.save_pretrained(args.calibrate)


def _demo(args: argparse.Namespace) -> None:
    from .import_utils import require_extra

    require_extra("demo", "accelerate", "datasets", "matplotlib")
    from .shapes.demo import run_demo

    run_demo(args.output_dir)


def _load_scorer(args: argparse.Namespace) -> "RewardDanceScorer":
    import torch

    from .scoring.scorer import RewardDanceScorer

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a build without CUDA fails by assertion
        raise ValueError(
            f"`--device` is {device!r}, which cannot be used here ({error}). Choose another, e.g. cpu."
        ) from error
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    scorer = RewardDanceScorer.from_pretrained(args.model, dtype=dtype, batch_size=args.batch_size)
    scorer.model.to(device)
    return scorer


def _load_rows(args: argparse.Namespace) -> Any:
    """Preference rows of `--dataset`."""
    if args.dataset.startswith(SHAPES_PREFIX):
        from .shapes.preferences import ShapesPreferences

        split = args.dataset.removeprefix(SHAPES_PREFIX)
        return ShapesPreferences(args.limit or DEFAULT_SHAPES_ROWS, split, seed=args.seed)
    import datasets

    is_saved = any(
        os.path.isfile(os.path.join(args.dataset, file)) for file in ("state.json", "dataset_dict.json")
    )  # by `save_to_disk`
    if is_saved:
        dataset = datasets.load_from_disk(args.dataset)
        if args.split and isinstance(dataset, datasets.DatasetDict):
            if args.split not in dataset:
                raise ValueError(
                    f"`--split` is {args.split!r}, but {args.dataset!r} has {sorted(dataset)}. Choose one of them."
                )
            dataset = dataset[args.split]
    else:
        try:
            dataset = datasets.load_dataset(args.dataset, args.config, split=args.split, data_files=args.data_files)
        except datasets.exceptions.DatasetsError as error:
            raise ValueError(f"`--dataset` {args.dataset!r} cannot be loaded: {error}") from error
    if isinstance(dataset, dict):
        if len(dataset) != 1:
            raise ValueError(
                f"`--split` was not given, but {args.dataset!r} has {sorted(dataset)}. Choose one of them."
            )
        dataset = next(iter(dataset.values()))
    return dataset if args.limit is None else dataset.select(range(min(args.limit, len(dataset))))


def _one_or_each(values: list[str], count: int, name: str) -> list[str]:
    if len(values) not in (1, count):
        raise argparse.ArgumentTypeError(
            f"argument {name}: {len(values)} values for {count} images, pass one for all, or one each"
        )
    return values * count if len(values) == 1 else values


def _check_file(path: str) -> None:
    """Fail now rather than after the computation if a file cannot be written."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    is_new = not os.path.exists(path)
    with open(path, "a", encoding="utf-8"):
        pass
    if is_new:
        os.remove(path)


def _check_folder(path: str, model: str) -> None:
    os.makedirs(path, exist_ok=True)
    if os.path.exists(model) and os.path.samefile(path, model):
        raise ValueError(
            f"`--calibrate` is the folder of `--model`, {model!r}, whose weights are in use. Choose another."
        )
    with tempfile.TemporaryFile(dir=path):
        pass


def _write_json(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(document, indent=2) + "\n")


def _write_lines(lines: Any) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    sys.exit(main())
