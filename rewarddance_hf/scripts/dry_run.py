"""What a run would do, without its weights: rows, a picture of three of them, tokens, updates, estimated memory and time."""

import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import nn

from ..data.preference import row_question
from ..data.rows import keep_images_encoded
from ..models import RewardDanceConfig, RewardDanceForYesScoring
from ..models.media_rewarddance import load_frames


GB = 1e9
SIDE, MARGIN = 256, 8  # of a picture of the sheet, in pixels
# Of what a matrix product reaches on this device, training reaches about this share.
EFFICIENCY = 0.4


def show_training(
    train_dataset: Any, eval_dataset: Any, model_name: str, processor: Any, args: Any, model_args: Any
) -> None:
    """Print what a training of a judge would do, and write a picture of three rows into its folder."""
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
    # A row is one question of a pairwise judge, and two of the others.
    questions_at_once = args.per_device_train_batch_size * (1 if is_pairwise else 2)
    lines += estimate(model_name, tokens, questions_at_once, updates, args, model_args)
    if args.should_log:
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
    """Picture of rows: the chosen image on the left, the rejected one on the right, the prompt above."""
    line = 20
    height = SIDE + line + MARGIN
    sheet = Image.new("RGB", (2 * SIDE + 3 * MARGIN, len(rows) * height + line + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(("chosen", "rejected")):
        draw.text((MARGIN + column * (SIDE + MARGIN), 4), name, fill="black", font_size=13)
    for place, row in enumerate(rows):
        top = line + place * height
        tie = " (tie)" if row.get("tie") else ""
        draw.text((MARGIN, top + 2), (row["prompt"] + tie)[:80], fill="black", font_size=13)
        for column, name in enumerate(("chosen", "rejected")):
            picture = load_frames(row[name], name)[0]
            scale = min(SIDE / picture.width, SIDE / picture.height)
            picture = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
            sheet.paste(picture, (MARGIN + column * (SIDE + MARGIN), top + line))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def count_updates(num_rows: int, args: Any) -> tuple[int, int]:
    """Number of updates of a run, and of rows in each."""
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    in_epoch = max(1, math.ceil(num_rows / (args.per_device_train_batch_size * args.world_size)))
    in_epoch = max(1, math.ceil(in_epoch / args.gradient_accumulation_steps))
    return (args.max_steps if args.max_steps > 0 else math.ceil(in_epoch * args.num_train_epochs)), batch


def estimate(model_name: str, tokens: int, questions: int, updates: int, args: Any, model_args: Any) -> list[str]:
    """Memory of a device and time of the run, from the shapes of the model alone."""
    config = RewardDanceConfig.from_pretrained(model_name, revision=model_args.model_revision)
    with torch.device("meta"):
        model = RewardDanceForYesScoring(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    is_adapter = model_args.use_peft
    trained = _adapter_size(model, model_args) if is_adapter else count
    # Under an adapter weights stay in the type that they were saved in, else they are trained in float32.
    saved = {"float32": 4, "bfloat16": 2, "float16": 2}.get(str(model_args.dtype), 2 if is_adapter else 4)
    weights = count * (1 if model_args.load_in_8bit else 0.5 if model_args.load_in_4bit else saved)
    optimizer = trained * (4 * 4 if is_adapter else 3 * 4)  # gradients and two moments; an adapter is float32 itself
    text: Any = config.vlm_config.get_text_config()  # type: ignore[union-attr]
    layers, hidden = text.num_hidden_layers, text.hidden_size
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    size = 2 if args.bf16 or args.fp16 else 4
    in_layer = tokens * questions * (12 * hidden + 3 * inner) * size
    kept = tokens * questions * hidden * size * layers
    activations = kept + in_layer if args.gradient_checkpointing else kept + layers * in_layer
    total = weights + optimizer + activations
    # Two operations a parameter and token forward, four backward (two without gradients of weights), two to compute again.
    passes = 2 + (2 if is_adapter else 4) + (2 if args.gradient_checkpointing else 0)
    work = passes * count * tokens * questions * args.gradient_accumulation_steps * updates
    seconds = work / (EFFICIENCY * _operations_per_second(args))
    return [
        f"parameters: {count / 1e6:.1f} million, {trained / 1e6:.1f} million of them trained",
        f"memory, estimated: {total / GB:.2f} GB on each device (weights {weights / GB:.2f}, gradients and optimizer "
        f"{optimizer / GB:.2f}, activations {activations / GB:.2f})",
        f"time, estimated from the speed of a matrix product here: {_duration(seconds)} (within a factor of about three; without "
        "decoding and evaluation)",
    ]


def _adapter_size(model: nn.Module, model_args: Any) -> int:
    names = model_args.lora_target_modules
    names = [names] if isinstance(names, str) else names
    language = getattr(model.vlm.base_model, "language_model", model)  # type: ignore[union-attr]
    chosen = language if not names or names == ["all-linear"] else model
    return sum(
        model_args.lora_r * (module.in_features + module.out_features)
        for path, module in chosen.named_modules()
        if isinstance(module, nn.Linear) and (chosen is language or any(path.endswith(name) for name in names))
    )


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
