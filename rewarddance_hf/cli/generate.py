"""`rewarddance generate`: images that a judge chose while a pipeline made them."""

import argparse
import json
from typing import Any

from ..import_utils import require_extra
from .shared import (
    COLUMN_OPTIONS,
    CONDITION_HELP,
    CRITERIA_OPTIONS,
    JUDGE_OPTIONS,
    Commands,
    add_shards,
    check_folder,
    find_device,
    find_shard,
    load_scorer,
    positive_integer,
    write,
)


def add_to(commands: Commands) -> None:
    help = "images that a judge chose while a pipeline made them"
    parser = commands.add_parser("generate", parents=[JUDGE_OPTIONS, COLUMN_OPTIONS, CRITERIA_OPTIONS], help=help)
    parser.add_argument("--pipeline", required=True, help="diffusers pipeline: repository ID or folder")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", nargs="+", help="one or more prompts")
    help = "text file with a prompt a line, or table with a column `prompt` and, for edits and clips of an image, `condition`"
    prompts.add_argument("--data", help=help)
    parser.add_argument("--condition", nargs="+", help=CONDITION_HELP.format("prompts"))
    parser.add_argument("--limit", type=positive_integer, help="number of prompts of --data (default: all)")
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
    help = (
        "folder for prompt_0, prompt_1, ...; a repeated command goes on where it stopped (default: outputs/generate)"
    )
    parser.add_argument("--output-dir", default="outputs/generate", help=help)
    add_shards(parser, "search for every N-th prompt only, beside other workers that write to the same folder")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    arguments = dict(_pipeline_argument(text) for text in args.argument)
    if args.steps is not None:
        arguments["num_inference_steps"] = args.steps
    if args.search == "paths":
        arguments["num_paths"] = args.num_paths
    check_folder(args.output_dir)
    shard = find_shard(args)
    prompts, context = _read_prompts(args) if args.data else (args.prompt, {})
    if args.condition:
        if len(args.condition) not in (1, len(prompts)):
            raise argparse.ArgumentTypeError(
                f"argument --condition: {len(args.condition)} values for {len(prompts)} prompts, pass one for all, or one each"
            )
        context["conditions"] = args.condition if len(args.condition) > 1 else args.condition * len(prompts)
    chosen = None if shard is None else range(len(prompts))[shard :: args.num_shards]
    if shard is not None and not 0 <= shard < args.num_shards:
        raise argparse.ArgumentTypeError(f"argument --shard: {shard} is none of the {args.num_shards} shards")
    from ..alignment.pipelines.loading import load_pipeline
    from ..alignment.search.search import best_of_n, search_over_paths, zero_order_search
    from ..parallel import Processes

    scorer = load_scorer(args)
    pipeline = load_pipeline(args.pipeline, find_device(args), args.dtype)
    searches: dict[str, Any] = {"best-of-n": best_of_n, "paths": search_over_paths, "zero-order": zero_order_search}
    context |= {name: getattr(args, name) for name in ("criteria", "task") if getattr(args, name) is not None}
    args.kept = lambda: f"Finished prompts are in {args.output_dir}: repeat the command to go on."
    results = searches[args.search](
        pipeline,
        prompts,
        scorer,
        max_denoiser_evaluations=args.budget,
        num_images=args.num_images,
        context=context,
        seed=args.seed,
        batch_size=args.images_per_batch,
        distribute=True,
        output_dir=args.output_dir,
        prompt_indices=chosen,
        **arguments,
    )
    if not Processes.current().is_main:
        return
    documents = [{"prompt": found.prompt, "images": found.images, "rewards": found.rewards} for found in results]
    pairs = [pair for found in results for pair in zip(found.rewards, found.images, strict=True)]
    write(args, {"results": documents}, [f"{reward:.6f}\t{image}" for reward, image in pairs])


def _read_prompts(args: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """Prompts, and what the reward is told of them."""
    require_extra("train", "datasets")
    from ..data.files import load_prompts

    rows = load_prompts(args.data, args.split, columns=args.columns)
    rows = rows.select(range(len(rows))[: args.limit])
    context: dict[str, Any] = {}
    for name in ("task", "criteria"):
        values = set(rows[name]) - {None} if name in rows.column_names else set()
        if len(values) > 1 and getattr(args, name) is None:
            raise ValueError(
                f"`--data` has {len(values)} values of `{name}`, but a search has one for all prompts. Pass --{name}, split the "
                "table, or call the searches from Python."
            )
        if values:
            context[name] = next(iter(values))
    if "condition" in rows.column_names and any(condition is not None for condition in rows["condition"]):
        context["conditions"] = list(rows["condition"])
    return list(rows["prompt"]), context


def _pipeline_argument(text: str) -> tuple[str, Any]:
    """Name and value of `NAME=VALUE`."""
    name, separator, value = text.partition("=")
    if not separator or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"argument --argument: {text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
