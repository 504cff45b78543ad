"""`rewarddance estimate`: memory of a training, a tuning or a scoring, with all flags of the run."""

import argparse

from ..import_utils import require_extra
from .shared import Commands, add_script, script_flags


def add_to(commands: Commands) -> None:
    add_script(commands, "estimate", "estimate the memory of a training, a tuning or a scoring", _run)


def _run(args: argparse.Namespace) -> None:
    require_extra("scripts", "accelerate", "datasets", "peft", "trl")
    from ..scripts.estimate import main

    with script_flags():
        main(args.rest)
