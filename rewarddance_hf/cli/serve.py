"""`rewarddance serve`: a judge behind HTTP."""

import argparse
import os
from dataclasses import fields

from ..import_utils import require_extra
from .shared import JUDGE_OPTIONS, Commands, load_scorer, positive_integer, write


# Bounds of `ServerLimits` that have an option, with their help; sizes in bytes are given in MiB.
LIMITS = {
    "max_body_bytes": "largest body of a request, in MiB (default: 256)",
    "max_memory_bytes": "bodies and decoded images that all requests may hold together, in MiB (default: 2048)",
    "max_questions": "most questions of a request (default: 256)",
    "max_ranked": "most samples of a ranking (default: 64)",
    "max_pixels": "most pixels of an image (default: 67108864)",
    "max_frames": "most frames of a clip (default: 512)",
    "max_characters": "most characters of a prompt or criteria (default: 20000)",
    "max_waiting": "most questions that may wait (default: 1024)",
    "header_timeout": "seconds in which the headers of a request must arrive (default: 20)",
    "body_timeout": "seconds in which a body must arrive (default: 60)",
}
MIB = 1 << 20


def add_to(commands: Commands) -> None:
    help = "answer other machines: a judge behind HTTP (token in REWARDDANCE_TOKEN)"
    parser = commands.add_parser("serve", parents=[JUDGE_OPTIONS], help=help)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port, 0 for a free one (default: 8000)")
    parser.add_argument("--token-file", metavar="FILE", help="file with the token, in place of REWARDDANCE_TOKEN")
    help = "answer requests that wait together; without it no rounding depends on what others ask (default: do)"
    parser.add_argument("--merge-requests", action=argparse.BooleanOptionalAction, default=True, help=help)
    help = "write prompts to the log (default: neither texts nor images of users)"
    parser.add_argument("--log-prompts", action="store_true", help=help)
    for name, help in LIMITS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=positive_integer, metavar="N", help=help)
    help = "serve nothing, but compare an engine at this address, which serves an export of this judge, and state the difference"
    parser.add_argument("--verify-against", metavar="URL", help=help)
    parser.add_argument("--export", metavar="FOLDER", help="with --verify-against: folder of `rewarddance export`")
    help = "with --verify-against: number of questions (default: 50)"
    parser.add_argument("--questions", type=positive_integer, default=50, metavar="N", help=help)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    require_extra("serve", "starlette", "uvicorn", "prometheus_client")
    from ..rewards import is_address

    if is_address(args.model):
        raise ValueError(f"`--model` is {args.model!r}, which is served already. Pass a repository ID or a folder.")
    if args.verify_against:
        _verify(args)
        return
    from ..serving.limits import ServerLimits
    from ..serving.observing import log_to_stderr
    from ..serving.server import JudgeServer

    given = {field.name: getattr(args, field.name) for field in fields(ServerLimits)}
    limits = {
        name: value * (MIB if name.endswith("_bytes") else 1) for name, value in given.items() if value is not None
    }
    log_to_stderr()
    server = JudgeServer(
        load_scorer(args),
        args.model,
        args.host,
        args.port,
        _read_token(args.token_file),
        limits=ServerLimits(**limits),
        merge_requests=args.merge_requests,
        log_prompts=args.log_prompts,
    )
    server.run()


def _verify(args: argparse.Namespace) -> None:
    if not args.export:
        raise argparse.ArgumentTypeError(
            "argument --verify-against: needs --export, the folder that the engine serves"
        )
    from ..serving.engine import EngineJudge
    from ..serving.parity import compare_with_engine, make_sheet

    scorer = load_scorer(args)
    engine = EngineJudge(args.verify_against, judge=args.export, token=_read_token(args.token_file))
    report = compare_with_engine(scorer, engine, make_sheet(args.questions, scorer.is_pairwise))
    write(args, report.to_dict(), report.lines())


def _read_token(file: str | None) -> str | None:
    if file is None:
        return os.environ.get("REWARDDANCE_TOKEN")
    with open(file, encoding="utf-8") as stream:
        token = stream.read().strip()
    if not token:
        raise ValueError(f"`--token-file` is {file!r}, which is empty. Write a token into it.")
    return token
