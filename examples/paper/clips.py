"""Judges and generators of clips of the study: text-to-video and image-to-video."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
from generators import load_scorer
from judges import ReportSteps, describe, train
from peft import LoraConfig
from torch.utils.data import ConcatDataset, Subset

from rewarddance_hf import ReFLTrainer, best_of_n_references
from rewarddance_hf.shapes.alignment_demo import tuning_arguments
from rewarddance_hf.shapes.clip_base import CLIP_LAYOUT, CLIP_TEXTS
from rewarddance_hf.shapes.clip_generator import CLIP_SAMPLING, load_clip_generator
from rewarddance_hf.shapes.clips import CATEGORY_SHARES, ShapesClipPreferences
from rewarddance_hf.shapes.generated_clips import ShapesClipPrompts, check_clips, clip_preferences, sample_clips
from rewarddance_hf.shapes.models import judge_processor


TASKS = tuple(CATEGORY_SHARES)
JUDGE_BATCH, LEARNING_RATE, SAMPLES_LEARNING_RATE = 32, 5e-4, 3e-4
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
MEASURED_SEED = 4
# Clips that the report shows
NUM_SHOWN, SHOWN_FILE = 40, "shown.npy"


def draw_pairs(folder: str, *, report: Any, generator: str, split: str, num_prompts: int) -> dict[str, Any]:
    """Pairs of a generator's own clips of each task, labelled by the oracle."""
    counts = {}
    for number, task in enumerate(TASKS):
        prompts = list(ShapesClipPrompts(num_prompts, split, task))
        rows = clip_preferences(load_clip_generator(generator, task), prompts)
        if rows:  # none of a generator whose clips are all right, or all wrong
            datasets.Dataset.from_list(rows).save_to_disk(f"{folder}/{task}")
        counts[task] = len(rows)
        report(number + 1, len(TASKS))
    return counts


def train_and_measure(
    folder: str,
    *pairs: str,
    report: Any,
    base: str,
    paradigm: str,
    updates: int,
    sample_updates: int,
    seed: int,
    held_out_rows: int,
) -> dict[str, Any]:
    """
    Fine-tune a base model that has seen clips on pairs of drawn clips, then go on for `sample_updates` with as many pairs of the
    generator's own; `pairs` are folders of those for training and of held-out ones. Metrics by task and split.
    """
    drawn = ShapesClipPreferences((updates + sample_updates) * JUDGE_BATCH, seed=100 + seed)
    first = Subset(drawn, range(updates * JUDGE_BATCH))
    total = updates + sample_updates
    processor = judge_processor(base, prompt_layout=CLIP_LAYOUT, prompt_texts=CLIP_TEXTS)
    settings = {"batch_size": JUDGE_BATCH, "paradigm": paradigm}
    train(base, processor, folder, first, updates, LEARNING_RATE, seed, ReportSteps(report, 0, total), **settings)
    own = [row for task in TASKS for row in _read(f"{pairs[0]}/{task}")]
    taken = [index % len(own) for index in range(sample_updates * JUDGE_BATCH // 2)] if own else []
    more = Subset(drawn, range(updates * JUDGE_BATCH, total * JUDGE_BATCH - len(taken)))
    mixed = ConcatDataset([more, Subset(own, taken)])
    callback = ReportSteps(report, updates, total)
    train(folder, processor, folder, mixed, sample_updates, SAMPLES_LEARNING_RATE, seed, callback, **settings)

    scorer = load_scorer(folder, 100)
    measured = {}
    for task in TASKS:
        splits: dict[str, Any] = {split: ShapesClipPreferences(held_out_rows, split, task) for split in ("id", "ood")}
        splits["generated"] = _read(f"{pairs[1]}/{task}")
        measured[task] = {split: describe(rows, scorer) for split, rows in splits.items() if rows}
    return measured


def _read(folder: str) -> Any:
    return datasets.load_from_disk(folder) if Path(folder).is_dir() else []


def measure(folder: str, *, report: Any, generator: str, task: str, num_prompts: int) -> dict[str, Any]:
    """Which held-out prompts a generator's clips show all of."""
    return _measure(folder, load_clip_generator(generator, task), task, num_prompts, report)


def tune(
    folder: str,
    judge: str,
    *,
    report: Any,
    generator: str,
    task: str,
    paradigm: str,
    updates: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    num_prompts: int,
    measured_prompts: int,
    num_candidates: int,
    gradient: dict[str, Any],
) -> dict[str, Any]:
    """
    Tune a generator of clips by the gradient of a judge (Section 3.3.1), in the steps that `gradient` says; a pairwise judge compares with
    the best of `num_candidates` clips.
    """
    pipeline: Any = load_clip_generator(generator, task)
    scorer = load_scorer(judge, batch_size)
    rows = datasets.Dataset.from_list(list(ShapesClipPrompts(num_prompts, "train", task, seed)))
    if paradigm == "pairwise":
        rows = best_of_n_references(
            pipeline,
            scorer,
            rows,
            num_candidates=num_candidates,
            top_k=1,
            batch_size=64,
            seed=seed,
            show_progress=False,
            **CLIP_SAMPLING,
        )
    settings: dict[str, Any] = {"step_index_range": None, **gradient}
    arguments = tuning_arguments(
        folder,
        updates,
        "log",
        seed,
        CLIP_SAMPLING,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        **settings,
    )
    trainer = ReFLTrainer(
        pipeline=pipeline,
        reward=scorer,
        args=arguments,
        train_dataset=rows,
        callbacks=[ReportSteps(report, 0, updates)],
        peft_config=LoraConfig(r=16, lora_alpha=16, target_modules=LORA_TARGETS),
    )
    trainer.train()
    trainer.save_model()
    return _measure(folder, pipeline, task, measured_prompts, report)


def _measure(folder: str, pipeline: Any, task: str, num_prompts: int, report: Any) -> dict[str, Any]:
    rows = list(ShapesClipPrompts(num_prompts, "id", task, MEASURED_SEED))
    clips = sample_clips(pipeline, rows, MEASURED_SEED, on_progress=lambda count: report(count, num_prompts))
    results = check_clips(clips, rows)
    shown = (255 * clips[:NUM_SHOWN]).round().byte().permute(0, 1, 3, 4, 2)
    np.save(f"{folder}/{SHOWN_FILE}", shown.numpy())
    return {
        "prompts": [row["prompt"] for row in rows[:NUM_SHOWN]],
        "right": [float(result.all_hold) for result in results],
        "categories": [row["category"] for row in rows],
    }
