"""`rewarddance generate`: images that a judge chose while a pipeline made them."""

import argparse
import json
import os
from typing import Any

from .shared import (
    CRITERIA_OPTIONS,
    JUDGE_OPTIONS,
    Commands,
    check_folder,
    find_device,
    load_scorer,
    positive_integer,
    write,
)


def add_to(commands: Commands) -> None:
    help = "images that a judge chose while a pipeline made them"
    parser = commands.add_parser("generate", parents=[JUDGE_OPTIONS, CRITERIA_OPTIONS], help=help)
    parser.add_argument("--pipeline", required=True, help="diffusers pipeline: repository ID or folder")
    parser.add_argument("--prompt", nargs="+", required=True, help="one or more prompts")
    help = "how to search (paths and zero-order need a pointwise judge; default: best-of-n)"
    parser.add_argument("--search", choices=("best-of-n", "paths", "zero-order"), default="best-of-n", help=help)
    help = "largest number of denoiser evaluations for each prompt: images times steps, guidance not counted"
    parser.add_argument("--budget", type=positive_integer, required=True, help=help)
    parser.add_argument("--num-images", type=positive_integer, default=1, help="best images to write (default: 1)")
    parser.add_argument("--steps", type=positive_integer, help="denoising steps (default: those of the pipeline)")
    parser.add_argument("--num-paths", type=positive_integer, default=4, help="paths of --search paths (default: 4)")
    help = "any argument of the pipeline's call, values as in JSON or plain text, e.g. guidance_scale=4.5 height=512"
    parser.add_argument("--argument", nargs="+", default=[], metavar="NAME=VALUE", help=help)
    parser.add_argument("--seed", type=int, default=0, help="seed of the search (default: 0)")
    parser.add_argument("--images-per-batch", type=positive_integer, default=8, help="images at once (default: 8)")
    parser.add_argument("--output-dir", default="outputs/generate", help="folder (default: outputs/generate)")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    arguments = dict(_pipeline_argument(text) for text in args.argument)
    if args.steps is not None:
        arguments["num_inference_steps"] = args.steps
    if args.search == "paths":
        arguments["num_paths"] = args.num_paths
    check_folder(args.output_dir)
    from ..alignment.pipelines.loading import load_pipeline
    from ..alignment.search.saving import save_search
    from ..alignment.search.search import best_of_n, search_over_paths, zero_order_search

    scorer = load_scorer(args)
    pipeline = load_pipeline(args.pipeline, find_device(args), args.dtype)
    searches: dict[str, Any] = {"best-of-n": best_of_n, "paths": search_over_paths, "zero-order": zero_order_search}
    context = {"criteria": args.criteria, "task": args.task}
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
    documents, lines = [], []
    for number, result in enumerate(results):
        folder = args.output_dir if len(results) == 1 else os.path.join(args.output_dir, f"prompt_{number}")
        images = save_search(result, folder)
        documents.append({"prompt": result.prompt, "images": images, "rewards": result.rewards})
        lines += [f"{reward:.6f}\t{image}" for reward, image in zip(result.rewards, images, strict=True)]
    write(args, {"results": documents}, lines)


def _pipeline_argument(text: str) -> tuple[str, Any]:
    """Name and value of `NAME=VALUE`."""
    name, separator, value = text.partition("=")
    if not separator or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"argument --argument: {text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
