"""Command line: `rewarddance score | rank | evaluate | generate | demo | release`. Results go to stdout, progress and errors to stderr."""

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .. import __version__


if TYPE_CHECKING:
    from ..scoring.scorer import RewardDanceScorer


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
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="{score,rank,evaluate,generate,demo,release}"
    )

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
    score.add_argument(
        "--dimensions",
        nargs="+",
        metavar="NAME",
        help="dimensions to score by, each on its own, e.g. alignment motion (a wrong name lists those of the task)",
    )
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
    rows = evaluate.add_mutually_exclusive_group(required=True)
    rows.add_argument(
        "--dataset",
        help="repository ID or folder, a folder written by `save_to_disk`, or shapes:id, shapes:ood, shapes:train, "
        "of clips shapes:video-id, shapes:t2v-id, shapes:i2v-id, ...",
    )
    rows.add_argument(
        "--benchmark", metavar="NAME", help="public benchmark, e.g. genai-bench-image (a wrong name lists all)"
    )
    evaluate.add_argument("--split", help="split, e.g. test or test[:100] (default: the only one, or the benchmark's)")
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
    evaluate.add_argument(
        "--compare",
        nargs="+",
        metavar="JUDGE",
        default=[],
        help="with --benchmark: other judges on the same rows: clipscore, pickscore (or clipscore:ID), module:function, or "
        "the ID of a judge or of an untrained vision-language model",
    )
    evaluate.add_argument(
        "--model-index",
        metavar="FILE",
        help="with --benchmark: model card (or new file) that gets the results as metadata",
    )
    evaluate.set_defaults(run=_evaluate)

    generate = commands.add_parser(
        "generate", parents=[judge, criteria], help="images that a judge chose while a pipeline made them"
    )
    generate.add_argument(
        "--pipeline", required=True, help="diffusers pipeline that makes the images: repository ID or folder"
    )
    generate.add_argument("--prompt", nargs="+", required=True, help="one or more prompts")
    generate.add_argument(
        "--search",
        choices=("best-of-n", "paths", "zero-order"),
        default="best-of-n",
        help="how to search (paths and zero-order need a pointwise judge; default: best-of-n)",
    )
    generate.add_argument(
        "--budget",
        type=_positive_integer,
        required=True,
        help="largest number of denoiser evaluations for each prompt: images times steps, guidance not counted",
    )
    generate.add_argument(
        "--num-images", type=_positive_integer, default=1, help="number of best images to write (default: 1)"
    )
    generate.add_argument("--steps", type=_positive_integer, help="denoising steps (default: those of the pipeline)")
    generate.add_argument(
        "--num-paths", type=_positive_integer, default=4, help="paths that are kept by --search paths (default: 4)"
    )
    generate.add_argument(
        "--argument",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="any argument of the pipeline's call, values as in JSON or plain text, e.g. guidance_scale=4.5 height=512",
    )
    generate.add_argument("--seed", type=int, default=0, help="seed of the search (default: 0)")
    generate.add_argument(
        "--images-per-batch", type=_positive_integer, default=8, help="images that are made at once (default: 8)"
    )
    generate.add_argument(
        "--output-dir", default="outputs/generate", help="folder for the images (default: outputs/generate)"
    )
    generate.set_defaults(run=_generate)

    demo = commands.add_parser("demo", parents=[shared], help="train and measure a tiny judge on this computer")
    demo.add_argument("--output-dir", default="outputs/demo", help="folder for the report (default: outputs/demo)")
    demo.add_argument(
        "--tune-generator",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="then tune a tiny generator by the judge (the second half of the time)",
    )
    demo.set_defaults(run=_demo)

    release = commands.add_parser(
        "release", parents=[shared], help="build a release folder, verify it in a clean process, push and tag it"
    )
    release.add_argument(
        "--folder", required=True, help="release folder: to be built with --model, else ready to push"
    )
    release.add_argument("--repo-id", required=True, help="repository on the Hub, OWNER/NAME")
    release.add_argument("--tag", required=True, help="tag of the release, e.g. v1.0")
    release.add_argument("--model", help="judge to build the folder from: checkpoint or adapter")
    release.add_argument(
        "--training-data",
        nargs="+",
        default=[],
        metavar="NAME=LICENSE",
        help="all data that the judge was trained on; none=none if it was not",
    )
    release.add_argument("--results", nargs="+", default=[], help="files of `rewarddance evaluate --output`")
    release.add_argument("--license", default="apache-2.0", help="license of the judge (default: apache-2.0)")
    release.add_argument("--base-model", help="base model (default: as the trainer recorded)")
    release.add_argument("--limit", nargs="+", default=[], help="limits of the judge to name in its card")
    release.add_argument("--media", default="images", help="what is judged, for the card (default: images)")
    release.add_argument(
        "--allow-non-commercial",
        action="store_true",
        help="go on with training data that forbids commercial use; the license of the judge then says so",
    )
    release.add_argument("--private", action="store_true", help="keep a new repository private")
    release.add_argument("--dry-run", action="store_true", help="show what would be pushed, and push nothing")
    release.set_defaults(run=_release)
    return parser


def _positive_integer(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


def _score(args: argparse.Namespace) -> None:
    prompts = _one_or_each(args.prompt, len(args.image), "--prompt")
    references = None if args.reference is None else _one_or_each(args.reference, len(args.image), "--reference")
    if args.dimensions and args.criteria:
        raise argparse.ArgumentTypeError("argument --dimensions: not allowed with argument --criteria")
    scorer = _load_scorer(args)
    scores = scorer.score(
        args.image,
        prompts,
        references,
        task=args.task,
        criteria=args.criteria,
        dimensions=args.dimensions,
        show_progress=True,
    )
    values = scores.view(len(args.image), -1).tolist()
    names = args.dimensions or ["score"]
    if args.json:
        shown_references: Sequence[str | None] = references or [None] * len(prompts)
        rows = zip(args.image, prompts, shown_references, values, strict=True)
        documents = []
        for image, prompt, reference, row in rows:
            named = dict(zip(names, row, strict=True))
            shown = {"dimensions": named} if args.dimensions else named
            documents.append({"image": image, "prompt": prompt, "reference": reference, **shown})
        _write_json({"scores": documents})
    else:
        if args.dimensions:
            _write_lines(["\t".join([*names, "image"])])
        _write_lines(
            "\t".join([*(f"{value:.6f}" for value in row), image])
            for row, image in zip(values, args.image, strict=True)
        )


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
    if args.benchmark:
        return _evaluate_benchmark(args)
    if args.compare or args.model_index:
        raise argparse.ArgumentTypeError("arguments --compare and --model-index: need --benchmark")
    if args.output:
        _check_file(args.output)
    if args.calibrate:
        _check_folder(args.calibrate, args.model)
    from ..evaluation.evaluator import RewardDanceEvaluator

    dataset = _load_rows(args)
    scorer = _load_scorer(args)
    evaluator = RewardDanceEvaluator(dataset, seed=args.seed, show_progress=True)
    metrics = evaluator(scorer)
    if args.calibrate:
        metrics |= evaluator.calibrate(scorer, results=evaluator.results)
    document = {
        "model": args.model,
        "dataset": args.dataset,
        "config": args.config,
        "split": args.split,
        "limit": args.limit,
        "metrics": metrics,
    }
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


def _evaluate_benchmark(args: argparse.Namespace) -> None:
    for name in ("config", "data_files", "calibrate"):
        if getattr(args, name):
            raise argparse.ArgumentTypeError(f"argument --{name.replace('_', '-')}: not allowed with --benchmark")
    for path in (args.output, args.model_index):
        if path:
            _check_file(path)
    from ..import_utils import require_extra

    require_extra("train", "datasets")
    from ..evaluation.baselines import load_baseline
    from ..evaluation.benchmarks import BenchmarkRun, write_model_index

    run = BenchmarkRun(
        args.benchmark, args.split, args.limit, batch_size=args.batch_size, seed=args.seed, show_progress=True
    )
    try:
        run(args.model, _load_scorer(args))
        for name in args.compare:
            run(name, load_baseline(name, _device(args), _dtype(args)) or _load_scorer(args, name))
    finally:  # a judge that fails does not cost the results of those before it
        if run.results:
            document = {"model": args.model, **run.document(), "metrics": run.results[args.model]}
            if args.json:
                _write_json(document)
            else:
                _write_lines([run.table()])
            sys.stdout.flush()
            if args.output:
                with open(args.output, "w", encoding="utf-8") as file:
                    file.write(json.dumps(document, indent=2) + "\n")
            if args.model_index:
                write_model_index(args.model_index, args.model, run.eval_results(args.model))


def _generate(args: argparse.Namespace) -> None:
    arguments = dict(_pipeline_argument(text) for text in args.argument)
    if args.steps is not None:
        arguments["num_inference_steps"] = args.steps
    os.makedirs(args.output_dir, exist_ok=True)
    with tempfile.TemporaryFile(dir=args.output_dir):  # fail now rather than after the computation
        pass
    from ..alignment.pipelines.loading import load_pipeline
    from ..alignment.search.search import best_of_n, search_over_paths, zero_order_search

    scorer = _load_scorer(args)
    pipeline = load_pipeline(args.pipeline, scorer.model.device, args.dtype)
    searches: dict[str, Any] = {"best-of-n": best_of_n, "paths": search_over_paths, "zero-order": zero_order_search}
    if args.search == "paths":
        arguments["num_paths"] = args.num_paths
    context = {"criteria": args.criteria, "task": None if args.task == "text-to-image" else args.task}
    results = searches[args.search](
        pipeline,
        args.prompt,
        scorer,
        max_denoiser_evaluations=args.budget,
        num_images=args.num_images,
        context={name: value for name, value in context.items() if value is not None},
        seed=args.seed,
        batch_size=args.images_per_batch,
        **arguments,
    )
    documents = []
    for number, result in enumerate(results):
        folder = args.output_dir if len(results) == 1 else os.path.join(args.output_dir, f"prompt_{number}")
        documents.append({"prompt": result.prompt, "images": result.save(folder), "rewards": result.rewards})
    if args.json:
        _write_json({"results": documents})
    else:
        _write_lines(
            f"{reward:.6f}\t{image}"
            for document in documents
            for reward, image in zip(document["rewards"], document["images"], strict=True)
        )


def _demo(args: argparse.Namespace) -> None:
    from ..import_utils import require_extra

    require_extra("demo", "accelerate", "datasets", "diffusers", "matplotlib", "peft")
    from ..shapes.demo import run_demo

    run_demo(args.output_dir, args.tune_generator)


def _release(args: argparse.Namespace) -> None:
    if args.repo_id.count("/") != 1:
        raise argparse.ArgumentTypeError(f"argument --repo-id: {args.repo_id!r} must be OWNER/NAME")
    from ..import_utils import require_extra

    require_extra("train", "datasets")
    from ..hub.licenses import TrainingData, check_training_data
    from ..hub.release import build_model_release, plan_push, push_release
    from ..hub.verification import verify_release

    if args.model:
        training_data = [TrainingData.parse(text) for text in args.training_data]
        check_training_data(training_data, allow_non_commercial=args.allow_non_commercial)
        build_model_release(
            args.model,
            args.folder,
            args.repo_id,
            args.tag,
            training_data,
            results=args.results,
            license=args.license,
            base_model=args.base_model,
            limits=args.limit,
            media=args.media,
            allow_non_commercial=args.allow_non_commercial,
        )
    else:
        verify_release(args.folder)
    _write_lines([f"{args.folder}: verified in a process without this package"])
    if args.dry_run:
        _write_lines([plan_push(args.folder, args.repo_id, args.tag)])
    else:
        plan = push_release(args.folder, args.repo_id, args.tag, private=args.private)
        _write_lines([plan] if plan.is_released else [plan, "pushed and tagged"])


def _load_scorer(args: argparse.Namespace, model: str | None = None) -> "RewardDanceScorer":
    from ..scoring.scorer import RewardDanceScorer

    device = _device(args)
    scorer = RewardDanceScorer.from_pretrained(model or args.model, dtype=_dtype(args), batch_size=args.batch_size)
    scorer.model.to(device)
    return scorer


def _device(args: argparse.Namespace) -> str:
    import torch

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a build without CUDA fails by assertion
        raise ValueError(
            f"`--device` is {device!r}, which cannot be used here ({error}). Choose another, e.g. cpu."
        ) from error
    return device


def _dtype(args: argparse.Namespace) -> Any:
    import torch

    return args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)


def _pipeline_argument(text: str) -> tuple[str, Any]:
    """Name and value of `NAME=VALUE`."""
    name, separator, value = text.partition("=")
    if not separator or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"argument --argument: {text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _load_rows(args: argparse.Namespace) -> Any:
    """Preference rows of `--dataset`."""
    if args.dataset.startswith(SHAPES_PREFIX):
        from ..shapes.clips import load_shapes

        split = args.dataset.removeprefix(SHAPES_PREFIX)
        return load_shapes(split, args.limit or DEFAULT_SHAPES_ROWS, seed=args.seed)
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
