"""What the commands share: options, the judge and its device, files that can be written, output."""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..import_utils import require_extra


Commands = Any  # argparse gives the type of what `add_subparsers` returns no public name


def positive_integer(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


SHARED_OPTIONS = argparse.ArgumentParser(add_help=False)
SHARED_OPTIONS.add_argument("--traceback", action="store_true", help="show the traceback of errors")

JUDGE_OPTIONS = argparse.ArgumentParser(add_help=False, parents=[SHARED_OPTIONS])
JUDGE_OPTIONS.add_argument(
    "--model",
    required=True,
    help="judge: repository ID or folder, of a checkpoint or an adapter; or address of `rewarddance serve`, http://HOST:PORT "
    "(several with commas), which decides about device, type and batches itself",
)
JUDGE_OPTIONS.add_argument(
    "--batch-size", type=positive_integer, default=8, help="questions per forward pass (default: 8)"
)
JUDGE_OPTIONS.add_argument("--device", help="device, e.g. cuda:1 (default: cuda if there is one, else cpu)")
JUDGE_OPTIONS.add_argument(
    "--dtype",
    choices=("auto", "float32", "bfloat16", "float16"),
    default="auto",
    help="type of the weights (default: as they were saved)",
)
JUDGE_OPTIONS.add_argument("--revision", help="branch, tag or commit of the judge on the Hub")
help = "how the judge is asked (default: as it was trained; pairwise if it was not)"
JUDGE_OPTIONS.add_argument("--paradigm", choices=("pairwise", "pointwise", "regressive"), help=help)
help = "scoring engine: share what questions have in common, vision features only, or nothing (default: auto)"
JUDGE_OPTIONS.add_argument("--engine", choices=("auto", "features", "plain"), default="auto", help=help)
JUDGE_OPTIONS.add_argument("--load-in-8bit", action="store_true", help="load the judge in 8 bit (needs bitsandbytes)")
JUDGE_OPTIONS.add_argument("--json", action="store_true", help="write one JSON document")

CRITERIA_OPTIONS = argparse.ArgumentParser(add_help=False)
CRITERIA_OPTIONS.add_argument(
    "--task",
    help="task whose criteria are used: text-to-image, text-to-video, image-to-video, image-editing, or one of the judge's own "
    "(default: what images or clips are, with or without a condition)",
)
CRITERIA_OPTIONS.add_argument("--criteria", help="criteria in place of those of the task")


CONDITION_HELP = (
    "image that the generator was given, one for all {} or one each: source image of an edit, or first frame"
)

COLUMN_OPTIONS = argparse.ArgumentParser(add_help=False)
help = "split, e.g. test or test[:100] (default: the only one, or the benchmark's)"
COLUMN_OPTIONS.add_argument("--split", help=help)
help = "columns by what they are, e.g. prompt=caption,{} (default: of these names)"
COLUMN_OPTIONS.add_argument(
    "--columns", metavar="NAME=COLUMN,...", help=help.format("chosen=a,rejected=b or image=file")
)


def add_script(commands: Commands, name: str, help: str, run: Callable[[argparse.Namespace], None]) -> None:
    """Add a command with more flags than are named here: `run` gets what is not understood as `args.rest`."""
    parser = commands.add_parser(name, parents=[SHARED_OPTIONS], help=help, add_help=False, allow_abbrev=False)
    parser.set_defaults(run=run, takes_rest=True)


def parse_rest(parser: Any, args: argparse.Namespace) -> tuple[Any, ...]:
    """What the parser of a script makes of the flags that are named there; what is left of an interrupted run is told from it."""
    with script_flags():
        parsed = parser.parse_args_and_config(args.rest)
    args.kept = lambda: kept_checkpoint(parsed[1].output_dir)
    args.model = parsed[2].model_name_or_path
    return parsed


@contextmanager
def script_flags() -> Iterator[None]:
    """Flags that the parser of a script does not know are errors of the command line."""
    try:
        yield
    except ValueError as error:
        if "not used by the HfArgumentParser" in str(error):
            raise argparse.ArgumentTypeError(f"unrecognized arguments: {str(error).partition(': ')[2]}") from error
        raise


def kept_checkpoint(folder: str) -> str:
    """What an interrupted training has left."""
    from ..trainer.common import last_checkpoint

    try:
        checkpoint = last_checkpoint(Path(folder))
    except ValueError:
        return "No checkpoint was written; --save_steps says how often one is."
    return f"{checkpoint} is complete: repeat the command with --resume_from_checkpoint true to go on from there."


class SomeFailed(Exception):
    """What could be done was done, but some inputs could not be used."""

    def __init__(self, problems: list[str], count: int, done: str) -> None:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        super().__init__(f"{len(problems)} of {count} could not be {done}: {'; '.join(problems[:3])}{more}")


def expand_folders(paths: list[str]) -> list[str]:
    """Paths of images, and those in folders in the order of their names."""
    from ..data.media import media_of_folder

    return [file for path in paths for file in (media_of_folder(path) if os.path.isdir(path) else [path])]


def unreadable(rows: list[dict[str, Any]]) -> dict[int, str]:
    """What is wrong with the images of rows that cannot be scored."""
    from ..data.media import read_media

    problems = {}
    for index, row in enumerate(rows):
        for name in ("image", "reference", "condition"):
            if row.get(name) is not None and index not in problems:
                try:
                    read_media(row[name], name)
                except (ValueError, TypeError, ImportError, OSError) as error:
                    problems[index] = str(error)
    return problems


def load_scorer(args: argparse.Namespace, model: str | None = None) -> Any:
    """Judge of `--model`, or another one, on the device and in the type of the options; or a remote one at its address."""
    from ..rewards import is_address

    name = model or args.model
    if is_address(name):
        from ..serving.remote import RemoteReward

        own = {"--paradigm": args.paradigm, "--revision": args.revision, "--load-in-8bit": args.load_in_8bit}
        if model is None and (given := [flag for flag, value in own.items() if value]):
            raise argparse.ArgumentTypeError(f"arguments {', '.join(given)}: not allowed with the address of a judge")
        return RemoteReward.at(name)
    from ..scoring.scorer import RewardDanceScorer

    device = find_device(args)
    settings: dict[str, Any] = {"dtype": args.dtype, "batch_size": args.batch_size, "engine": args.engine}
    if args.load_in_8bit:
        require_extra("quantization", "bitsandbytes")
        from transformers import BitsAndBytesConfig

        settings |= {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": device}
    if model is None:  # another judge has other revisions, and is asked in its own way
        settings |= {key: value for key in ("revision", "paradigm") if (value := getattr(args, key)) is not None}
    scorer = RewardDanceScorer.from_pretrained(name, **settings)
    if not args.load_in_8bit:
        scorer.model.to(device)
    return scorer


def find_device(args: argparse.Namespace) -> str:
    import torch

    from ..parallel import own_device

    device = args.device or str(own_device())
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a build without CUDA fails by assertion
        raise ValueError(
            f"`--device` is {device!r}, which cannot be used here ({error}). Choose another, e.g. cpu."
        ) from error
    return device


def check_file(path: str) -> None:
    """Fail now rather than after the computation if a file cannot be written."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "a", encoding="utf-8"):
        pass
    if not os.path.getsize(path):
        os.remove(path)


def check_folder(path: str) -> None:
    """Same as [`check_file`], for a folder."""
    os.makedirs(path, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
        pass


def add_shards(parser: argparse.ArgumentParser, what: str) -> None:
    """Options of a command whose rows can be split over workers that know nothing of each other."""
    parser.add_argument("--num-shards", type=positive_integer, metavar="N", help=what)
    help = "the shard of this worker, from 0 (default: $SLURM_ARRAY_TASK_ID, else all, shared by the processes of a launcher)"
    parser.add_argument("--shard", type=int, metavar="K", help=help)


def find_shard(args: argparse.Namespace) -> int | None:
    """Shard of this worker, None for all."""
    if args.shard is not None and not args.num_shards:
        raise argparse.ArgumentTypeError("argument --shard: needs --num-shards")
    if args.shard is None and args.num_shards and "SLURM_ARRAY_TASK_ID" in os.environ:
        return int(os.environ["SLURM_ARRAY_TASK_ID"]) - int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0"))
    return args.shard


def write(args: argparse.Namespace, document: dict[str, Any], lines: Iterable[str]) -> None:
    """Write the document with `--json`, else the lines."""
    text = json.dumps(document, indent=2) if args.json else "\n".join(lines)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
