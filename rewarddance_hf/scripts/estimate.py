"""Memory of a run, told by the flags and the YAML file of the run: the body of `rewarddance estimate`."""

import argparse
import json
import logging
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from PIL import Image
from trl import get_peft_config

from ..data.preference import row_question
from ..memory.counting import fetch_configurations
from ..memory.judge import count_scoring
from ..memory.report import PARALLEL, Count, advice, table
from ..rewards import is_address
from . import train
from .arguments import required
from .counted_training import count_training_of
from .parser import RecipeParser


TASKS = ("train", "score", "tune")
ENGINES = {"NO": "none", "MULTI_GPU": "ddp", "FSDP": "fsdp2"}
# A prompt and a reason of usual length
PROMPT = (
    "A watercolor painting of two green parrots on a branch in front of an old stone tower, soft morning light, mist over the "
    "valley, highly detailed feathers, muted colors"
)
RATIONALE = {"yes": f"Image 1: one parrot. Image 2: {PROMPT}.", "no": f"Image 1: {PROMPT}. Image 2: one parrot."}


@dataclass
class EstimateArguments:
    """Arguments of the estimate beside those of the run."""

    task: str | None = field(
        default=None,
        metadata={
            "help": "What is estimated: training of a judge, scoring with one, or tuning of a generator. Defaults to what the "
            "recipe does, or to tuning if a pipeline is told, else to training.",
            "choices": TASKS,
        },
    )
    image_size: str = field(
        default="512x512", metadata={"help": "Size of the images that a judge is trained on, WIDTHxHEIGHT in pixels."}
    )
    num_gpus: int | None = field(default=None, metadata={"help": "Number of GPUs. Defaults to 1."})
    parallel: str | None = field(
        default=None,
        metadata={
            "help": "How a training of a judge is split over the GPUs. Defaults to ddp on several.",
            "choices": PARALLEL,
        },
    )
    accelerate_config: str | None = field(
        default=None, metadata={"help": "File of `accelerate launch` that tells number of GPUs and how they are used."}
    )
    json: bool = field(default=False, metadata={"help": "Whether to write one JSON document."})


def main(arguments: Sequence[str]) -> None:
    """Estimate, and print a table or JSON. The process is of no use for anything else afterwards."""
    logging.disable(logging.WARNING)  # what is warned of is not what is run
    warnings.simplefilter("ignore")
    task, parsed = parse(arguments)
    how, _, args, model_args = parsed
    title, count = estimate(task, *parsed)
    if how.json:
        about = {"task": task, "title": title, "parallel": how.parallel, "num_gpus": how.num_gpus}
        lines = [json.dumps(about | count.as_dict(), indent=2)]
    else:
        lines = table(count, title, how.num_gpus) + advice(count, task, args, model_args.use_peft, how.parallel)
    sys.stdout.write("\n".join(lines) + "\n")


def parse(arguments: Sequence[str]) -> tuple[str, Any]:
    """The task, and the arguments of the estimate, of the script, of the run and of the model."""
    task = find_task(arguments)
    parsed = make_parser(task).parse_args_and_config(with_gpu_defaults(arguments))
    read_parallel(parsed[0])
    return task, parsed


def estimate(task: str, how: EstimateArguments, script_args: Any, args: Any, model_args: Any) -> tuple[str, Count]:
    """Title and count."""
    return (estimate_tuning if task == "tune" else estimate_judge)(task, how, script_args, args, model_args)


def make_parser(task: str) -> RecipeParser:
    """Parser of the flags of a run and of those of the estimate."""
    if task == "tune":
        from . import tune

        run: Any = (tune.ReFLScriptArguments, tune.ReFLTrainingArguments, tune.PipelineModelConfig)
    else:
        run = (train.RewardDanceScriptArguments, train.RewardDanceTrainingArguments, train.JudgeModelConfig)
    return RecipeParser((EstimateArguments, *run), prog="rewarddance estimate")


def find_task(arguments: Sequence[str]) -> str:
    """What is estimated, by the flags and the recipe."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--task", "--config", "--pipeline", "--judge"):
        parser.add_argument(flag)
    known, _ = parser.parse_known_args(list(arguments))
    if known.task:
        if known.task not in TASKS:
            raise ValueError(f"`task` is {known.task!r}, but must be one of {TASKS}.")
        return known.task
    of_tuning = {"judge", "pipeline_kwargs", "num_inference_steps"} & set(_recipe(known.config))
    return "tune" if known.pipeline or known.judge or of_tuning else "train"


def with_gpu_defaults(arguments: Sequence[str]) -> list[str]:
    """Arguments with those that follow from a GPU, which this machine may not have, and of which nothing is used."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    known, _ = parser.parse_known_args(list(arguments))
    named = {part.split("=")[0].lstrip("-").replace("-", "_") for part in arguments} | set(_recipe(known.config))
    more = [] if named & {"bf16", "fp16", "use_cpu"} else ["--bf16", "true"]
    return [*arguments, *more, "--use_cpu", "true"]


def _recipe(path: str | None) -> dict[str, Any]:
    return yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {} if path else {}


def read_parallel(how: EstimateArguments) -> None:
    """Number of GPUs and how they are used, by the flags or a file of accelerate."""
    if how.accelerate_config is not None:
        config = _recipe(how.accelerate_config)
        kind = config.get("distributed_type", "NO")
        engine = f"zero{config['deepspeed_config']['zero_stage']}" if kind == "DEEPSPEED" else ENGINES.get(kind)
        if engine not in PARALLEL:
            raise ValueError(f"`distributed_type` of {how.accelerate_config} is {kind!r}, which cannot be estimated.")
        how.parallel = how.parallel or engine
        how.num_gpus = how.num_gpus or config.get("num_processes", 1)
    how.num_gpus = how.num_gpus or 1
    how.parallel = how.parallel or ("ddp" if how.num_gpus > 1 else "none")
    if how.num_gpus < 1 or (how.num_gpus > 1) != (how.parallel != "none"):
        raise ValueError(
            f"`num_gpus` is {how.num_gpus} and `parallel` is {how.parallel!r}, which do not fit together. Pass 2 GPUs or more "
            "with one of ddp, fsdp2, zero2 and zero3."
        )


def make_rows(size: str, with_rationales: bool) -> list[dict[str, Any]]:
    """A row of usual length."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", size)
    if match is None or "0" in match.groups():
        raise ValueError(f"`image_size` is {size!r}, but must be WIDTHxHEIGHT in pixels, e.g. 1024x768.")
    side = int(match[1]), int(match[2] or match[1])
    row = {"prompt": PROMPT, "chosen": Image.new("RGB", side, "white"), "rejected": Image.new("RGB", side)}
    return [{**row, "rationale": RATIONALE} if with_rationales else row]


def estimate_judge(
    task: str, how: EstimateArguments, script_args: Any, args: Any, model_args: Any
) -> tuple[str, Count]:
    """Title and count of a training of a judge, or of scoring with one."""
    from ..trainer.processor import load_processor

    name = required(model_args, "model_name_or_path", "OpenGVLab/InternVL3_5-2B-HF")
    model_args.model_name_or_path = fetch_configurations(name, model_args.model_revision)
    try:
        processor = load_processor(model_args.model_name_or_path, **dict(script_args.processor_kwargs or {}))
    except OSError as error:
        raise ValueError(
            f"{name!r} has no processor that can be loaded, and questions are encoded as in a run. Its folder needs all files but "
            f"the weights: those of the tokenizer, `preprocessor_config.json`, the chat template ({error})."
        ) from error
    rows = make_rows(how.image_size, args.rationale is not None)
    question = processor.load(row_question(rows[0], uses_reference=args.paradigm == "pairwise"))
    tokens = processor.encode([question])["input_ids"].shape[1]
    of_image = processor.count_frame_tokens(rows[0]["chosen"].size)
    images = f"{tokens} tokens in a question, {of_image} of an image"
    batch = args.per_device_train_batch_size
    if task == "score":
        count = _scoring(rows[0], batch, script_args, args, model_args)
        return f"scoring with {name}: {batch} questions at once, {images}", count
    kind = f"LoRA of rank {model_args.lora_r}" if model_args.use_peft else "all weights"
    on = f"on {how.num_gpus} GPUs with {how.parallel}" if how.num_gpus and how.num_gpus > 1 else "on one GPU"
    count = count_training_of(rows, processor, str(how.parallel), how.num_gpus or 1, args, model_args)
    return f"training of {name}, {kind}, {on}: {batch} pairs at once, {images}", count


def _scoring(row: dict[str, Any], batch: int, script_args: Any, args: Any, model_args: Any) -> Count:
    from ..scoring.scorer import RewardDanceScorer

    def load() -> Any:
        dtype = model_args.dtype or "auto"
        return RewardDanceScorer.from_pretrained(model_args.model_name_or_path, dtype=dtype, batch_size=batch)

    # Images that differ, as nothing is computed twice
    images = [Image.new("RGB", row["chosen"].size, (index % 256, index // 256, 0)) for index in range(2 * batch)]

    def score(scorer: Any) -> None:
        scorer.score(images[:batch], [row["prompt"]] * batch, images[batch:] if scorer.is_pairwise else None)

    return count_scoring(load, score)


def estimate_tuning(
    task: str, how: EstimateArguments, script_args: Any, args: Any, model_args: Any
) -> tuple[str, Count]:
    """Title and count of a tuning of a generator."""
    from datasets import Dataset

    from ..memory.generator import Elsewhere, count_tuning
    from . import tune

    if how.parallel not in ("none", "ddp"):
        raise ValueError(
            f"`parallel` is {how.parallel!r}, but a generator is tuned on one GPU or with ddp. Leave it out; "
            "`--shard_denoiser true` splits the denoiser over the GPUs."
        )
    name = required(model_args, "model_name_or_path", "stabilityai/stable-diffusion-3.5-medium")
    if name != tune.SHAPES:
        model_args.model_name_or_path = fetch_configurations(name, model_args.model_revision)
    judges: dict[str, Any] = {}
    for title, judge in (("judge", script_args.judge), ("held-out judge", script_args.held_out_judge)):
        is_here = (
            judge is not None and judge != "oracle" and not is_address(judge) and script_args.judge_device is None
        )
        if is_here:
            folder = fetch_configurations(judge)
            judges[title] = lambda device, folder=folder: tune.load_judge(folder, script_args, device)
        elif title == "judge":
            judges[title] = lambda device: Elsewhere()
    # Of these, memory does not depend on numbers above: a batch is filled all the same.
    script_args.num_candidates = script_args.num_references = 2
    num_prompts = max(args.per_device_train_batch_size, -(-args.per_device_eval_batch_size // 2))
    if args.step_index_range is None and args.num_inference_steps is not None:
        args.num_inference_steps = min(args.num_inference_steps, args.num_gradient_steps + 1)

    count = count_tuning(
        lambda device: tune.load_pipeline(model_args, device),
        judges,
        args,
        Dataset.from_list([{"prompt": f"{PROMPT}, {index}"} for index in range(num_prompts)]),
        lambda rows, pipeline, judge: tune.add_references(rows, pipeline, judge, script_args, args, "train"),
        get_peft_config(model_args),
        how.num_gpus or 1,
    )
    kind = f"LoRA of rank {model_args.lora_r}" if model_args.use_peft else "all weights of the denoiser"
    size = args.per_device_train_batch_size
    return f"tuning of {name}, {kind}, by {script_args.judge or 'a judge elsewhere'}: {size} samples at once", count
