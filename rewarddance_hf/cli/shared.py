"""What the commands share: options, the judge and its device, files that can be written, output."""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from typing import Any


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
JUDGE_OPTIONS.add_argument("--json", action="store_true", help="write one JSON document")

CRITERIA_OPTIONS = argparse.ArgumentParser(add_help=False)
CRITERIA_OPTIONS.add_argument("--task", help="task whose criteria are used (default: that of images, or of clips)")
CRITERIA_OPTIONS.add_argument("--criteria", help="criteria in place of those of the task")


def add_script(commands: Commands, name: str, help: str, run: Callable[[argparse.Namespace], None]) -> None:
    """Add a command with more flags than are named here: `run` gets what is not understood as `args.rest`."""
    parser = commands.add_parser(name, parents=[SHARED_OPTIONS], help=help, add_help=False, allow_abbrev=False)
    parser.set_defaults(run=run, takes_rest=True)


def load_scorer(args: argparse.Namespace, model: str | None = None) -> Any:
    """Judge of `--model`, or another one, on the device and in the type of the options; or a remote one at its address."""
    from ..rewards import is_address

    name = model or args.model
    if is_address(name):
        from ..serving.remote import RemoteReward

        return RemoteReward.at(name)
    from ..scoring.scorer import RewardDanceScorer

    device = find_device(args)
    scorer = RewardDanceScorer.from_pretrained(name, dtype=args.dtype, batch_size=args.batch_size)
    scorer.model.to(device)
    return scorer


def find_device(args: argparse.Namespace) -> str:
    import torch

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
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


def write(args: argparse.Namespace, document: dict[str, Any], lines: Iterable[str]) -> None:
    """Write the document with `--json`, else the lines."""
    text = json.dumps(document, indent=2) if args.json else "\n".join(lines)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
