"""
The demo: fine-tune the tiny base model as a judge of shapes, measure it beside two others, score with it, and tune a tiny
generator by it.
"""

import json
import multiprocessing
import random
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset
from transformers.utils import logging

from ..evaluation.evaluator import RewardDanceEvaluator
from ..models import RewardDanceForYesScoring
from ..scoring.scorer import RewardDanceScorer
from ..trainer.rewarddance_trainer import RewardDanceTrainer
from ..trainer.training_args import RewardDanceTrainingArguments
from .alignment_demo import EVALUATION_PROMPTS, GENERATORS, TUNING_STEPS, gains, tune
from .generated import generated_preferences
from .generator import load_generator
from .models import BASE_VLM, judge_processor
from .preferences import ShapesPreferences
from .report import write_report


MODELS = ("untrained", "judge", "regressive")
PARADIGM = {"untrained": "pairwise", "judge": "pairwise", "regressive": "regressive", "pointwise": "pointwise"}
TRAINING_STEPS = 700
BATCH_SIZE = 48
EVALUATION_ROWS = 1000
# A judge that has only seen clean drawings reads a generator's images less well: it is trained on for some steps, with
# pairs of those in half of the rows.
GENERATED_STEPS, GENERATED_LEARNING_RATE = 200, 3e-4
GENERATED_PROMPTS = {"train": 350, "id": 150}
# Rows of the learning curve are others than those that the report's figures come from.
CURVE_ROWS, CURVE_SEED = 200, 1
MIXED_SEED = 2


def sample_pairs(split: str, output_dir: str, num_prompts: int | None = None) -> None:
    """Draw pairs of the generator's own samples, six for each prompt, labelled by the oracle, and save them."""
    num_prompts = num_prompts or GENERATED_PROMPTS[split]
    training = split == "train"
    rows = generated_preferences(load_generator(), num_prompts, split, with_described=training, with_ties=training)
    datasets.Dataset.from_list(rows).save_to_disk(output_dir)


def mixed_rows(num_rows: int, generated_dir: str) -> Dataset:
    """Rendered pairs, others than in the first training, and as many of [`sample_pairs`], which come several times if few."""
    generated = datasets.load_from_disk(generated_dir)
    indices = [i % len(generated) for i in range(num_rows // 2)]
    random.Random(0).shuffle(indices)
    return ConcatDataset([ShapesPreferences(num_rows - len(indices), seed=MIXED_SEED), Subset(generated, indices)])


def train(
    name: str,
    output_dir: str,
    steps: int = TRAINING_STEPS,
    show_progress: bool = True,
    generated_dir: str | None = None,
) -> None:
    """
    Fine-tune the base model as `"judge"` (pairwise, with rationales), `"pointwise"`, or `"regressive"` (the paper's baseline), and
    save it with its `log_history.json`. With the generator's pairs in `generated_dir` it goes on for a while with those too.
    """
    rows = ShapesPreferences(steps * BATCH_SIZE)
    arguments = _arguments(output_dir, PARADIGM[name], steps, 7e-4, 50, show_progress)
    curve_rows = max(BATCH_SIZE, round(min(1.0, steps / TRAINING_STEPS) * CURVE_ROWS))
    trainer = _trainer(str(BASE_VLM), rows, arguments, curve_rows)
    trainer.train()
    log_history = trainer.state.log_history
    if generated_dir is not None:
        more = max(1, GENERATED_STEPS * steps // TRAINING_STEPS)
        arguments = _arguments(output_dir, PARADIGM[name], more, GENERATED_LEARNING_RATE, 20, show_progress)
        trainer = _trainer(trainer.model, mixed_rows(more * BATCH_SIZE, generated_dir), arguments, curve_rows)
        trainer.train()
        log_history = log_history + [{**log, "step": log["step"] + steps} for log in trainer.state.log_history]
    trainer.save_model()
    file = Path(output_dir) / "log_history.json"
    file.write_text(json.dumps(log_history, indent=2) + "\n", encoding="utf-8")


def _arguments(
    output_dir: str, paradigm: str, steps: int, learning_rate: float, warmup_steps: int, show_progress: bool
) -> RewardDanceTrainingArguments:
    return RewardDanceTrainingArguments(
        output_dir,
        paradigm=paradigm,
        rationale="decision_first" if paradigm == "pairwise" else None,
        rationale_weight=0.5,
        max_steps=steps,
        per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=100,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=warmup_steps,
        weight_decay=0.02,
        adam_beta2=0.98,
        gradient_checkpointing=False,
        eval_strategy="steps",
        eval_steps=max(steps // 10, 1),
        logging_steps=max(steps // 10, 1),
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=not show_progress,
        log_level="error",
    )


def _trainer(
    model: Any, rows: Dataset, arguments: RewardDanceTrainingArguments, curve_rows: int
) -> RewardDanceTrainer:
    return RewardDanceTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset={split: ShapesPreferences(curve_rows, split, seed=CURVE_SEED) for split in ("id", "ood")},
        processing_class=judge_processor(),
    )


def evaluate(
    name: str, model_dir: str, output_file: str, rows: int = EVALUATION_ROWS, generated_dir: str | None = None
) -> None:
    """Measure a judge on held-out rows, in and out of domain, and on pairs of the generator's samples."""
    scorer = RewardDanceScorer(
        RewardDanceForYesScoring.from_pretrained(model_dir, paradigm=PARADIGM[name]),
        judge_processor(model_dir),
        batch_size=100,
    )
    metrics: dict[str, Any] = {}
    held_out = {split: ShapesPreferences(rows, split) for split in ("id", "ood")}
    if generated_dir is not None:
        held_out["generated"] = datasets.load_from_disk(generated_dir)
    for split, dataset in held_out.items():
        evaluator = RewardDanceEvaluator(dataset)
        metrics |= {f"{name}/{split}/{key}": value for key, value in evaluator(scorer).items()}
    Path(output_file).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def _train_and_evaluate(
    name: str, folder: str, pairs: dict[str, str | None], steps: int, rows: int, show_progress: bool
) -> None:
    train(name, folder, steps, show_progress, pairs["train"])
    evaluate(name, folder, str(Path(folder) / "metrics.json"), rows, pairs["id"])


def _run_quietly(function: Callable[..., None], *arguments: Any) -> None:
    torch.set_num_threads(1)  # two processes run side by side
    # Numbers too small for the usual form, which backward passes are full of, cost many times the time of others.
    torch.set_flush_denormal(True)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    function(*arguments)


def _side_by_side(calls: dict[str, tuple[Any, ...]]) -> None:
    """Run functions with their arguments in processes of their own, which import torch and the rest once for all."""
    can_fork = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if can_fork else "spawn")
    if can_fork:
        context.set_forkserver_preload([__name__])
    processes = {name: context.Process(target=_run_quietly, args=call) for name, call in calls.items()}
    for process in processes.values():
        process.start()
    for process in processes.values():
        process.join()
    failed = [name for name, process in processes.items() if process.exitcode != 0]
    if failed:
        raise RuntimeError(f"{failed} failed; see the messages above. What was written before is kept.")


def run_demo(
    output_dir: str = "outputs/demo",
    tune_generator: bool = True,
    steps: int = TRAINING_STEPS,
    rows: int = EVALUATION_ROWS,
    tuning_steps: int = TUNING_STEPS,
    prompts: int = EVALUATION_PROMPTS,
) -> dict[str, float]:
    """
    Train a judge and the regressive baseline side by side, measure both and the untrained model, and write a report.

    Args:
        output_dir (`str`, *optional*, defaults to `"outputs/demo"`):
            Folder for `report.md`, `metrics.json`, images and checkpoints.
        tune_generator (`bool`, *optional*, defaults to `True`):
            Whether to train the judge on pairs of a generator's samples too, and to tune the generator by the judge and by a
            weak reward.
        steps (`int`, *optional*):
            Number of updates of each judge.
        rows (`int`, *optional*):
            Number of held-out rows of each split.
        tuning_steps (`int`, *optional*):
            Number of updates of the generator that the judge tunes.
        prompts (`int`, *optional*):
            Number of held-out prompts that generators are measured on.

    Returns:
        `dict[str, float]`: Metrics with flat keys like `judge/id/accuracy` and `generator/tuned/alignment`.

    Raises:
        `OSError`: If `output_dir` cannot be written.
        `RuntimeError`: If a training fails.
    """
    start = time.monotonic()
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").touch()  # fails now rather than after minutes of training
    pairs: dict[str, str | None] = dict.fromkeys(GENERATED_PROMPTS)
    if tune_generator:
        pairs = {split: str(folder / f"pairs_{split}") for split in GENERATED_PROMPTS}
        _say("Sampling pairs from the base generator ...")
        share = min(1.0, steps / TRAINING_STEPS)
        _side_by_side(
            {
                f"sampling {split}": (sample_pairs, split, pairs[split], max(20, round(share * count)))
                for split, count in GENERATED_PROMPTS.items()
            }
        )
    _say(f"Training a pairwise judge and a regressive baseline, {steps} steps each, side by side ...")
    _side_by_side(
        {
            name: (_train_and_evaluate, name, str(folder / name), pairs, steps, rows, name == "judge")
            for name in ("judge", "regressive")
        }
    )
    calls: dict[str, tuple[Any, ...]] = {
        "untrained": (evaluate, "untrained", str(BASE_VLM), str(folder / "untrained.json"), rows, pairs["id"])
    }
    files = [folder / "untrained.json", *(folder / name / "metrics.json" for name in ("judge", "regressive"))]
    if tune_generator:
        _say(f"Tuning the generator by the judge, {tuning_steps} steps, and beside it by a weak reward ...")
        for name in GENERATORS:
            judge_dir = str(folder / "judge") if name == "tuned" else None
            calls[name] = (tune, name, str(folder / name), judge_dir, tuning_steps, prompts, name == "tuned")
            files.append(folder / name / "metrics.json")
    else:
        _say("Measuring the untrained model ...")
    _side_by_side(calls)

    metrics: dict[str, Any] = {}
    for file in files:
        metrics |= json.loads(file.read_text(encoding="utf-8"))
    if tune_generator:
        metrics |= gains(folder)
    scorer = RewardDanceScorer.from_pretrained(folder / "judge", batch_size=100)
    metrics["seconds"] = time.monotonic() - start
    write_report(folder, metrics, scorer)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    for name in MODELS:
        accuracies = {
            key.split("/")[1]: metrics[key] for key in metrics if re.fullmatch(f"{name}/[a-z]+/accuracy", key)
        }
        values = [f"{split} {100 * value:.1f} %" for split, value in accuracies.items()]
        _say(f"{name:12} held-out accuracy: {', '.join(values)}")
    for name in ("base", *GENERATORS) if tune_generator else ():
        _say(
            f"{name:12} generator, held-out prompts drawn right: {100 * metrics[f'generator/{name}/alignment']:.1f} %"
        )
    _say(f"Report: {folder / 'report.md'} ({metrics['seconds']:.0f} s)")
    return metrics


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
