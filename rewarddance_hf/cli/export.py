"""`rewarddance export`: a judge as other engines load it."""

import argparse
import json
import sys

from .shared import SHARED_OPTIONS, Commands


def add_to(commands: Commands) -> None:
    help = "write a judge as other engines load it, e.g. vLLM"
    parser = commands.add_parser("export", parents=[SHARED_OPTIONS], help=help)
    parser.add_argument("--model", required=True, help="judge: repository ID or folder, of a checkpoint or an adapter")
    parser.add_argument("--format", choices=("vllm",), default="vllm", help="engine (default: vllm)")
    parser.add_argument("--output-dir", required=True, help="folder to write, empty or missing")
    types = ("auto", "float32", "bfloat16", "float16")
    help = "type of the weights (default: as they were saved)"
    parser.add_argument("--dtype", choices=types, default="auto", help=help)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from ..serving.export import export_judge

    folder = export_judge(args.model, args.output_dir, dtype=args.dtype)
    dtype = json.loads((folder / "score.json").read_text(encoding="utf-8"))["dtype"]
    sys.stdout.write(
        f"{folder}: written. Serve it in an environment of vLLM, with the type of the weights as vLLM would else choose its own (and more\n"
        "images for clips and examples):\n"
        f"vllm serve {folder} --served-model-name judge --dtype {dtype} --chat-template-content-format openai "
        '--limit-mm-per-prompt \'{"image": 2, "video": 0}\' --port 8123\n'
    )
