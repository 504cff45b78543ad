"""`rewarddance release`: build a release folder, verify it, push and tag it."""

import argparse
import sys

from ..import_utils import require_extra
from .shared import SHARED_OPTIONS, Commands


def add_to(commands: Commands) -> None:
    help = "build a release folder, verify it in a clean process, push and tag it"
    parser = commands.add_parser("release", parents=[SHARED_OPTIONS], help=help)
    parser.add_argument("--folder", required=True, help="release folder: to be built with --model, else ready to push")
    parser.add_argument("--repo-id", required=True, help="repository on the Hub, OWNER/NAME")
    parser.add_argument("--tag", required=True, help="tag of the release, e.g. v1.0")
    parser.add_argument("--model", help="judge to build the folder from: checkpoint or adapter")
    help = "all data that the judge was trained on; none=none if it was not"
    parser.add_argument("--training-data", nargs="+", default=[], metavar="NAME=LICENSE", help=help)
    parser.add_argument("--results", nargs="+", default=[], help="files of `rewarddance evaluate --output`")
    parser.add_argument("--license", default="apache-2.0", help="license of the judge (default: apache-2.0)")
    parser.add_argument("--base-model", help="base model (default: as the trainer recorded)")
    parser.add_argument(
        "--limit", dest="limits", nargs="+", default=[], help="limits of the judge to name in its card"
    )
    parser.add_argument("--media", default="images", help="what is judged, for the card (default: images)")
    help = "go on with training data that forbids commercial use; the license of the judge then says so"
    parser.add_argument("--allow-non-commercial", action="store_true", help=help)
    parser.add_argument("--private", action="store_true", help="keep a new repository private")
    parser.add_argument("--dry-run", action="store_true", help="show what would be pushed, and push nothing")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    if args.repo_id.count("/") != 1:
        raise argparse.ArgumentTypeError(f"argument --repo-id: {args.repo_id!r} must be OWNER/NAME")
    require_extra("train", "datasets")
    from ..hub.licenses import TrainingData, check_training_data
    from ..hub.release import build_model_release, plan_push, push_release
    from ..hub.verification import verify_release

    if args.model:
        training_data = [TrainingData.parse(text) for text in args.training_data]
        check_training_data(training_data, allow_non_commercial=args.allow_non_commercial)
        options = ("results", "license", "base_model", "limits", "media", "allow_non_commercial")
        given = {name: getattr(args, name) for name in options}
        build_model_release(args.model, args.folder, args.repo_id, args.tag, training_data, **given)
    else:
        verify_release(args.folder)
    sys.stdout.write(f"{args.folder}: verified in a process without this package\n")
    if args.dry_run:
        sys.stdout.write(f"{plan_push(args.folder, args.repo_id, args.tag)}\n")
    else:
        plan = push_release(args.folder, args.repo_id, args.tag, private=args.private)
        sys.stdout.write(f"{plan}\n" if plan.is_released else f"{plan}\npushed and tagged\n")
