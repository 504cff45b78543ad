"""What a run would do, without its weights: rows, an image of three of them, tokens, updates, estimated memory and time."""

import math
import os
import sys
import time
from copy import copy
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from ..data.preference import row_question
from ..data.rows import keep_images_encoded
from ..memory.apart import run_apart
from ..memory.counting import GIB, fetch_configurations
from ..models.media_rewarddance import load_frames
from .counted_training import count_training_of


GB = 1e9
SIDE, MARGIN = 256, 8  # of an image of the sheet, in pixels
# Of what a matrix product reaches on this device, training reaches about this share.
EFFICIENCY = 0.4


def show_training(
    train_dataset: Any, eval_dataset: Any, model_name: str, processor: Any, args: Any, model_args: Any
) -> None:
    """Print what a training of a judge would do, and write an image of three rows into its folder."""
    if not hasattr(train_dataset, "__len__"):
        raise ValueError("`dry_run` needs rows that can be counted. Leave streaming out.")
    rows = keep_images_encoded(train_dataset) if hasattr(train_dataset, "features") else train_dataset
    shown = [rows[index] for index in range(min(3, len(rows)))]
    lines = [describe_rows("rows to train on", train_dataset)]
    if eval_dataset is not None and not isinstance(eval_dataset, dict):
        lines.append(describe_rows("rows to measure on", eval_dataset))
    if args.should_save:
        lines.append(f"three rows: {contact_sheet(shown, Path(args.output_dir) / 'dry_run.png')}")
    is_pairwise = args.paradigm == "pairwise"
    questions = [processor.load(row_question(row, uses_reference=is_pairwise)) for row in shown]
    tokens = max(processor.encode([question])["input_ids"].shape[1] for question in questions)
    sizes = sorted({image.size for question in questions for image in question.images})
    each = ", ".join(f"{width} x {height}: {processor.count_frame_tokens((width, height))}" for width, height in sizes)
    lines.append(f"tokens of an image: {each}; of a question: {tokens}")
    updates, batch = count_updates(len(train_dataset), args)
    lines.append(f"updates: {updates} of {batch} rows")
    if args.should_log:
        lines += estimate(model_name, shown, tokens, updates, processor, args, model_args)
        sys.stdout.write("\n".join(["dry run: nothing is trained", *lines]) + "\n")


def show_tuning(rows: Any, script_args: Any, args: Any, model_args: Any) -> None:
    """Print what a tuning of a generator would do."""
    updates, batch = count_updates(len(rows), args)
    lines = [describe_rows("prompts to train on", rows), *(f"  {rows[i]['prompt']}" for i in range(min(3, len(rows))))]
    lines.append(f"updates: {updates} of {batch} images")
    if "references" not in rows.column_names:
        count = len(rows) * script_args.num_candidates
        lines.append(f"images for references, if the judge is pairwise: {count}, made before the first update")
    for title, name in (("pipeline", model_args.model_name_or_path), ("judge", script_args.judge)):
        if os.path.isdir(str(name)):
            size = sum(file.stat().st_size for file in Path(str(name)).rglob("*.safetensors"))
            lines.append(f"weights of the {title} as saved: {size / GB:.2f} GB")
    if args.should_log:
        sys.stdout.write("\n".join(["dry run: nothing is tuned", *lines]) + "\n")


def describe_rows(title: str, rows: Any) -> str:
    """Number and columns of rows, and how they were read."""
    columns = getattr(rows, "features", None)
    schema = ", ".join(f"{name} ({_type_of(feature)})" for name, feature in (columns or {}).items())
    origin = getattr(getattr(rows, "info", None), "description", "")
    return f"{title}: {len(rows)}" + f"; {schema}" * bool(schema) + f"\n  {origin}" * bool(origin)


def _type_of(feature: Any) -> str:
    return str(getattr(feature, "dtype", type(feature).__name__))


def contact_sheet(rows: list[Any], path: Path) -> Path:
    """Picture of rows: the condition if there is one, the chosen image, the rejected one, and the prompt above them."""
    line = 20
    height = SIDE + line + MARGIN
    names = ["condition"] * any(row.get("condition") is not None for row in rows) + ["chosen", "rejected"]
    width = len(names) * (SIDE + MARGIN) + MARGIN
    sheet = Image.new("RGB", (width, len(rows) * height + line + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(names):
        draw.text((MARGIN + column * (SIDE + MARGIN), 4), name, fill="black", font_size=13)
    for place, row in enumerate(rows):
        top = line + place * height
        tie = " (tie)" if row.get("tie") else ""
        draw.text((MARGIN, top + 2), (row["prompt"] + tie)[:80], fill="black", font_size=13)
        for column, name in enumerate(names):
            if row.get(name) is None:
                continue
            image = load_frames(row[name], name)[0]
            scale = min(SIDE / image.width, SIDE / image.height)
            image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
            sheet.paste(image, (MARGIN + column * (SIDE + MARGIN), top + line))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def count_updates(num_rows: int, args: Any) -> tuple[int, int]:
    """Number of updates of a run, and of rows in each."""
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    in_epoch = max(1, math.ceil(num_rows / (args.per_device_train_batch_size * args.world_size)))
    in_epoch = max(1, math.ceil(in_epoch / args.gradient_accumulation_steps))
    return (args.max_steps if args.max_steps > 0 else math.ceil(in_epoch * args.num_train_epochs)), batch


def estimate(
    model_name: str, rows: list[Any], tokens: int, updates: int, processor: Any, args: Any, model_args: Any
) -> list[str]:
    """Memory of a device, counted, and time of the run."""
    questions = args.per_device_train_batch_size * (1 if args.paradigm == "pairwise" else 2)
    model_args = copy(model_args)
    model_args.model_name_or_path = fetch_configurations(model_name, model_args.model_revision)
    alone = copy(args)  # without what it knows of this machine and of other processes
    alone.use_cpu, alone.distributed_state = True, None
    vars(alone).pop("_setup_devices", None)
    count = run_apart(count_training_of, rows, processor, _parallel(args), args.world_size, alone, model_args)
    # Two operations a parameter and token forward, four backward (two without gradients of weights), two to compute again.
    passes = 2 + (2 if model_args.use_peft else 4) + (2 if args.gradient_checkpointing else 0)
    work = passes * count.num_parameters * tokens * questions * args.gradient_accumulation_steps * updates
    seconds = work / (EFFICIENCY * _operations_per_second(args))
    each = ", ".join(f"{name} {size * GIB / GB:.2f}" for name, size in count.parts.items())
    return [
        f"parameters: {count.num_parameters / 1e6:.1f} million, {count.num_trained / 1e6:.1f} million of them trained",
        f"memory, counted: {count.peak * GIB / GB:.2f} GB on each device ({each})",
        f"time, estimated from the speed of a matrix product here: {_duration(seconds)} (within a factor of about three; without "
        "decoding and evaluation)",
    ]


def _parallel(args: Any) -> str:
    """How a run is split over its processes, as `rewarddance estimate` calls it."""
    if args.world_size == 1:
        return "none"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" or args.deepspeed:
        return "zero3" if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3" else "zero2"
    return "fsdp2" if os.environ.get("ACCELERATE_USE_FSDP") == "true" or args.fsdp else "ddp"


def _operations_per_second(args: Any) -> float:
    """What a matrix product reaches on the device of the run, in the type of its computation."""
    on_cpu = args.device.type == "cpu"
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    side = 768 if on_cpu else 8192
    matrix = torch.randn(side, side, device=args.device, dtype=dtype)
    fastest = math.inf
    for _ in range(4):
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * side**3 / fastest


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
