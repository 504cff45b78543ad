"""`rewarddance tune`: tune a diffusers pipeline by the reward of a judge, with all flags of the trainer."""

import argparse

from ..import_utils import require_extra
from .shared import Commands, add_script, parse_rest


def add_to(commands: Commands) -> None:
    add_script(commands, "tune", "tune a diffusers pipeline by the reward of a judge", _run)


def _run(args: argparse.Namespace) -> None:
    require_extra("scripts,diffusers", "accelerate", "datasets", "peft", "trl", "diffusers")
    from ..scripts.tune import main, make_parser

    main(*parse_rest(make_parser(prog="rewarddance tune"), args))
