"""`rewarddance train`: train a judge on preference rows, with all flags of the trainer."""

import argparse

from ..import_utils import require_extra
from .shared import Commands, add_script, parse_rest


def add_to(commands: Commands) -> None:
    add_script(commands, "train", "train a judge on preference rows", _run)


def _run(args: argparse.Namespace) -> None:
    require_extra("scripts", "accelerate", "datasets", "peft", "trl")
    from ..scripts.train import main, make_parser

    main(*parse_rest(make_parser(prog="rewarddance train"), args))
