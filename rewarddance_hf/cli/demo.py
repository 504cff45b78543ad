"""`rewarddance demo`: train and measure a tiny judge on this computer."""

import argparse

from ..import_utils import require_extra
from .shared import SHARED_OPTIONS, Commands


def add_to(commands: Commands) -> None:
    help = "train and measure a tiny judge on this computer"
    parser = commands.add_parser("demo", parents=[SHARED_OPTIONS], help=help)
    parser.add_argument("--output-dir", default="outputs/demo", help="folder for the report (default: outputs/demo)")
    help = "then tune a tiny generator by the judge (the second half of the time)"
    parser.add_argument("--tune-generator", action=argparse.BooleanOptionalAction, default=True, help=help)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    require_extra("demo", "accelerate", "datasets", "diffusers", "matplotlib", "peft")
    from ..shapes.demo import run_demo

    run_demo(args.output_dir, args.tune_generator)
