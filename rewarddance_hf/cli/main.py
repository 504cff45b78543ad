"""Parser of the command line. Results go to stdout, progress and errors to stderr; a command imports what it needs when it runs."""

import argparse
import itertools
import sys
from collections.abc import Sequence

from .. import __version__
from . import demo, estimate, evaluate, export, generate, merge, rank, release, score, serve, train, tune
from .shared import SomeFailed


COMMANDS = (score, merge, rank, evaluate, train, tune, estimate, generate, serve, export, demo, release)


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run the command line.

    Args:
        argv (`list[str]`, *optional*):
            Arguments, by default those of the process.

    Returns:
        `int`: Exit code: 0 if all went well, 1 if an input or a model cannot be used, 2 if the arguments are wrong, 130 if the
            user interrupted it.
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
    except KeyboardInterrupt:
        if args.traceback:
            raise
        kept = args.kept() if hasattr(args, "kept") else ""
        sys.stderr.write(f"\nrewarddance {args.command}: interrupted. {kept}".rstrip() + "\n")
        return 130
    except argparse.ArgumentTypeError as error:
        sys.stderr.write(f"rewarddance {args.command}: error: {error}\n")
        return 2
    except Exception as error:
        message = _explain(error, args)
        if args.traceback or message is None:
            raise
        sys.stderr.write(f"rewarddance {args.command}: error: {' '.join(message.split())}\n")
        return 1


def _explain(error: Exception, args: argparse.Namespace) -> str | None:
    """What to tell about an error that a user can do something about, or None for an error of this package."""
    text = str(error)
    if isinstance(error, (RuntimeError, MemoryError)) and ("out of memory" in text or "can't allocate memory" in text):
        return (
            f"Memory ran out ({text[:200]}). Use smaller batches (--batch-size; in training --per_device_train_batch_size, with "
            "--gradient_accumulation_steps), --use_peft in training, --load-in-8bit, smaller images or a smaller model."
        )
    if type(error).__module__.startswith(("httpx", "httpcore")):  # the client of huggingface_hub: httpx, or httpx2
        wanted = f" for {args.model!r}" if getattr(args, "model", None) else ""
        return (
            f"The Hub cannot be reached{wanted} ({type(error).__name__}: {text}). Check the network and HF_ENDPOINT, or pass a "
            "local folder; with HF_HUB_OFFLINE=1 only files of the cache are used."
        )
    if isinstance(error, OSError) and "couldn't connect" in text and getattr(args, "model", None):  # of transformers
        return f"{args.model!r} is no folder here and cannot be had from the Hub: {text}"
    is_known = isinstance(error, (ValueError, TypeError, OSError, ImportError, RuntimeError, SomeFailed))
    return text if is_known else None


def _with_dashes(argv: Sequence[str]) -> list[str]:
    """The arguments with `--batch-size` for `--batch_size`; values, and what follows a lone `--`, stay as they are."""
    flags = list(itertools.takewhile(lambda part: part != "--", argv))
    for index, part in enumerate(flags):
        if part.startswith("--"):
            name, equals, value = part.partition("=")
            flags[index] = name.replace("_", "-") + equals + value
    return [*flags, *argv[len(flags) :]]
