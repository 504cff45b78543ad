"""`rewarddance merge`: scores in shards become one file."""

import argparse
import sys

from .shared import SHARED_OPTIONS, Commands


def add_to(commands: Commands) -> None:
    parser = commands.add_parser(
        "merge", parents=[SHARED_OPTIONS], help="join the shards of `rewarddance score --num-shards`"
    )
    parser.add_argument("folder", help="folder of the scores")
    parser.add_argument("--output", help="parquet file to write (default: scores.parquet in the folder)")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from ..scoring.shards import merge_shards

    sys.stdout.write(f"{merge_shards(args.folder, args.output)}\n")
