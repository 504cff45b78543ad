"""`rewarddance evaluate`: accuracy on preference rows, or on a public benchmark beside other judges."""

import argparse
import json
import os
from collections.abc import Iterable
from typing import Any

from ..import_utils import require_extra
from .shared import (
    COLUMN_OPTIONS,
    JUDGE_OPTIONS,
    Commands,
    check_file,
    check_folder,
    find_device,
    load_scorer,
    positive_integer,
    write,
)


SHAPES_PREFIX = "shapes:"
DEFAULT_SHAPES_ROWS = 1000


def add_to(commands: Commands) -> None:
    parser = commands.add_parser(
        "evaluate", parents=[JUDGE_OPTIONS, COLUMN_OPTIONS], help="accuracy on preference rows"
    )
    rows = parser.add_mutually_exclusive_group(required=True)
    help = (
        "rows: CSV, TSV, JSON (lines), Parquet, folder of images with metadata.csv, folder of `save_to_disk`, dataset of the "
        "Hub, public set by name, or shapes:id, shapes:ood, shapes:train, of clips shapes:video-id, shapes:t2v-id, ..."
    )
    rows.add_argument("--dataset", "--data", metavar="DATA", help=help)
    help = "public benchmark, e.g. genai-bench-image (a wrong name lists all)"
    rows.add_argument("--benchmark", metavar="NAME", help=help)
    parser.add_argument("--config", help="configuration of the dataset")
    parser.add_argument("--data-files", nargs="+", help="files of the dataset, e.g. with --dataset parquet")
    help = "labels of the first sample, of the second and of a tie, e.g. left,right,both"
    parser.add_argument("--label-values", metavar="FIRST,SECOND[,TIE]", help=help)
    parser.add_argument(
        "--skip-bad-rows", action="store_true", help="leave out rows that cannot be used, with a count"
    )
    help = "only the rows that `rewarddance train` holds out by the same size: a share below 1, or a number"
    parser.add_argument("--test-split-size", type=float, metavar="SIZE", help=help)
    help = f"number of rows (default: all; {DEFAULT_SHAPES_ROWS} of shapes)"
    parser.add_argument("--limit", type=positive_integer, help=help)
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap and of shapes (default: 0)")
    parser.add_argument("--output", help="JSON file for the metrics")
    help = "fit a temperature on these rows and save the calibrated judge there"
    parser.add_argument("--calibrate", metavar="FOLDER", help=help)
    help = (
        "with --benchmark: other judges on the same rows: clipscore, pickscore (or clipscore:ID), module:function, or the "
        "ID of a judge or of an untrained vision-language model"
    )
    parser.add_argument("--compare", nargs="+", metavar="JUDGE", default=[], help=help)
    help = "with --benchmark: model card (or new file) that gets the results as metadata"
    parser.add_argument("--model-index", metavar="FILE", help=help)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from ..parallel import Processes
    from ..rewards import is_address

    for option in ("config", "data_files", "calibrate", "columns", "label_values", "skip_bad_rows", "test_split_size"):
        if args.benchmark and getattr(args, option):
            raise argparse.ArgumentTypeError(f"argument --{option.replace('_', '-')}: not allowed with --benchmark")
    if args.dataset and (args.compare or args.model_index):
        raise argparse.ArgumentTypeError("arguments --compare and --model-index: need --benchmark")
    is_main = Processes.current().is_main
    for path in filter(None, (args.output, args.model_index) if is_main else ()):
        check_file(path)
    if args.calibrate and is_address(args.model):
        raise argparse.ArgumentTypeError(
            "argument --calibrate: a judge at an address stores no temperature; calibrate it where its weights are"
        )
    if args.calibrate:
        if (
            os.path.exists(args.calibrate)
            and os.path.exists(args.model)
            and os.path.samefile(args.calibrate, args.model)
        ):
            raise ValueError(
                f"`--calibrate` is the folder of `--model`, {args.model!r}, whose weights are in use. Choose another."
            )
        if is_main:
            check_folder(args.calibrate)
    (_evaluate_benchmark if args.benchmark else _evaluate_rows)(args)


def _evaluate_rows(args: argparse.Namespace) -> None:
    from ..evaluation.evaluator import RewardDanceEvaluator
    from ..parallel import Processes

    is_main = Processes.current().is_main
    dataset = _load_rows(args, show_progress=is_main)
    scorer = load_scorer(args)
    fingerprint = scorer.fingerprint()  # before a calibration changes it
    evaluator = RewardDanceEvaluator(dataset, seed=args.seed, show_progress=is_main)
    metrics = evaluator(scorer)
    if args.calibrate:
        metrics |= evaluator.calibrate(scorer, results=evaluator.results)
    document = {name: getattr(args, name) for name in ("model", "dataset", "config", "split", "limit")}
    if args.test_split_size is not None:
        document["split"] = f"{args.split or 'train'}, {args.test_split_size:g} held out"
    if args.data_files:
        document["data_files"] = [os.path.basename(file) for file in args.data_files]
    if args.dataset.startswith(SHAPES_PREFIX):
        document["seed"] = args.seed
    document["is_local"] = bool(args.data_files) or os.path.exists(args.dataset)
    if document["split"] is None and not args.dataset.startswith(SHAPES_PREFIX):
        document["split"] = str(getattr(dataset, "split", None) or "all")  # the only one
    document["rows_fingerprint"] = evaluator.results.rows_fingerprint if evaluator.results else None
    width = max(map(len, metrics))
    lines = (f"{name:{width}}  {value:.6g}" for name, value in metrics.items())
    _report(args, {**document, "judge_fingerprint": fingerprint, "metrics": metrics}, lines)
    if args.calibrate and is_main:
        scorer.save_pretrained(args.calibrate)


def _evaluate_benchmark(args: argparse.Namespace) -> None:
    require_extra("train", "datasets")
    from ..evaluation.baselines import load_baseline
    from ..evaluation.benchmarks import BenchmarkRun, write_model_index
    from ..parallel import Processes

    is_main = Processes.current().is_main
    run = BenchmarkRun(
        args.benchmark, args.split, args.limit, batch_size=args.batch_size, seed=args.seed, show_progress=is_main
    )
    scorer = load_scorer(args)
    try:
        run(args.model, scorer)
        for name in args.compare:
            run(name, load_baseline(name, find_device(args), args.dtype) or load_scorer(args, name))
    finally:  # a judge that fails does not cost the results of those before it
        if run.results:
            own = {"judge_fingerprint": scorer.fingerprint(), "metrics": run.results[args.model]}
            document = {"model": args.model, **run.document(), **own}
            _report(args, document, [run.table()])
            if args.model_index and is_main:
                write_model_index(args.model_index, args.model, run.eval_results(args.model))


def _report(args: argparse.Namespace, document: dict[str, Any], lines: Iterable[str]) -> None:
    """Show the result, then save it: a full disk must not cost the result of hours. Of several processes, one does."""
    from ..parallel import Processes

    if not Processes.current().is_main:
        return
    write(args, document, lines)
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            file.write(json.dumps(document, indent=2) + "\n")


def _load_rows(args: argparse.Namespace, show_progress: bool) -> Any:
    """Preference rows of `--dataset`."""
    if args.dataset.startswith(SHAPES_PREFIX):
        from ..shapes.loading import load_shapes

        split = args.dataset.removeprefix(SHAPES_PREFIX)
        return load_shapes(split, args.limit or DEFAULT_SHAPES_ROWS, seed=args.seed)
    require_extra("train", "datasets")
    from ..data.files import hold_out, load_rows

    rows = load_rows(
        args.dataset,
        args.split,
        columns=args.columns,
        label_values=args.label_values.split(",") if args.label_values else None,
        skip_bad_rows=args.skip_bad_rows,
        limit=args.limit,
        show_progress=show_progress,
        config=args.config,
        data_files=args.data_files,
    )
    return rows if args.test_split_size is None else hold_out(rows, args.test_split_size)[1]
