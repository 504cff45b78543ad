"""Parser of the command line. Results go to stdout, progress and errors to stderr; a command imports what it needs when it runs."""

import argparse
import itertools
import sys
from collections.abc import Sequence

from .. import __version__
from . import demo, evaluate, generate, merge, rank, release, score, serve, train, tune


COMMANDS = (score, merge, rank, evaluate, train, tune, generate, serve, demo, release)


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run the command line.

    Args:
        argv (`list[str]`, *optional*):
            Arguments, by default those of the process.

    Returns:
        `int`: Exit code: 0 if all went well, 1 if an input or a model cannot be used, 2 if the arguments are wrong.
    """
    parser = argparse.ArgumentParser(
        prog="rewarddance",
        description="Judge generated images by the probability that a vision-language model says yes.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    names = [command.__name__.rpartition(".")[2] for command in COMMANDS]
    commands = parser.add_subparsers(dest="command", required=True, metavar=f"{{{','.join(names)}}}")
    for command in COMMANDS:
        command.add_to(commands)
    try:
        args, rest = parser.parse_known_args(_with_dashes(sys.argv[1:] if argv is None else argv))
        if rest and not hasattr(args, "takes_rest"):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        args.rest = rest
    except SystemExit as exit:  # argparse has written help or what is wrong
        return int(exit.code or 0)
    try:
        args.run(args)
        return 0
    except SystemExit as exit:  # from the parser of a script
        return int(exit.code or 0)
    except argparse.ArgumentTypeError as error:
        sys.stderr.write(f"rewarddance {args.command}: error: {error}\n")
        return 2
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if args.traceback:
            raise
        sys.stderr.write(f"rewarddance {args.command}: error: {' '.join(str(error).split())}\n")
        return 1


def _with_dashes(argv: Sequence[str]) -> list[str]:
    """The arguments with `--batch-size` for `--batch_size`; values, and what follows a lone `--`, stay as they are."""
    flags = list(itertools.takewhile(lambda part: part != "--", argv))
    for index, part in enumerate(flags):
        if part.startswith("--"):
            name, equals, value = part.partition("=")
            flags[index] = name.replace("_", "-") + equals + value
    return [*flags, *argv[len(flags) :]]
