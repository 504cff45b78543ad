"""The demo: fine-tune the tiny base model as a judge of shapes, measure it beside two others, and score with it."""

import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..evaluation.evaluator import RewardDanceEvaluator
from ..models import RewardDanceForYesScoring
from ..scoring.scorer import RewardDanceScorer
from ..trainer.rewarddance_trainer import RewardDanceTrainer
from ..trainer.training_args import RewardDanceTrainingArguments
from .models import BASE_VLM, judge_processor
from .preferences import ShapesPreferences
from .report import write_report


MODELS = ("untrained", "judge", "regressive")
PARADIGM = {"untrained": "pairwise", "judge": "pairwise", "regressive": "regressive"}
TRAINING_STEPS = 700
BATCH_SIZE = 48
EVALUATION_ROWS = 1000
# Rows of the learning curve are others than those that the report's figures come from.
CURVE_ROWS, CURVE_SEED = 300, 1


def train(name: str, output_dir: str, steps: int = TRAINING_STEPS, show_progress: bool = True) -> None:
    """
    Fine-tune the base model and save it.

    Args:
        name (`str`):
            `"judge"` (pairwise, with rationales) or `"regressive"` (the paper's baseline).
        output_dir (`str`):
            Folder for the checkpoint and `log_history.json`.
        steps (`int`, *optional*):
            Number of updates.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.
    """
    torch.set_num_threads(1)  # two processes train side by side
    paradigm = PARADIGM[name]
    arguments = RewardDanceTrainingArguments(
        output_dir,
        paradigm=paradigm,
        rationale="decision_first" if paradigm == "pairwise" else None,
        rationale_weight=0.5,
        max_steps=steps,
        per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=100,
        learning_rate=7e-4,
        lr_scheduler_type="cosine",
        warmup_steps=50,
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
    trainer = RewardDanceTrainer(
        model=RewardDanceForYesScoring.from_pretrained(BASE_VLM, paradigm=paradigm),
        args=arguments,
        train_dataset=ShapesPreferences(steps * BATCH_SIZE),
        eval_dataset={split: ShapesPreferences(CURVE_ROWS, split, seed=CURVE_SEED) for split in ("id", "ood")},
        processing_class=judge_processor(),
    )
    trainer.train()
    trainer.save_model()
    log_history = Path(output_dir) / "log_history.json"
    log_history.write_text(json.dumps(trainer.state.log_history, indent=2) + "\n", encoding="utf-8")


def evaluate(name: str, model_dir: str, output_file: str, rows: int = EVALUATION_ROWS) -> None:
    """
    Measure a judge on held-out rows, in and out of domain.

    Args:
        name (`str`):
            `"untrained"`, `"judge"` or `"regressive"`.
        model_dir (`str`):
            Folder of its checkpoint.
        output_file (`str`):
            JSON file for the metrics.
        rows (`int`, *optional*):
            Number of rows of each split.
    """
    torch.set_num_threads(1)
    scorer = RewardDanceScorer(
        RewardDanceForYesScoring.from_pretrained(model_dir, paradigm=PARADIGM[name]),
        judge_processor(model_dir),
        batch_size=100,
    )
    metrics: dict[str, Any] = {}
    for split in ("id", "ood"):
        evaluator = RewardDanceEvaluator(ShapesPreferences(rows, split))
        metrics |= {f"{name}/{split}/{key}": value for key, value in evaluator(scorer).items()}
    Path(output_file).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def _train_and_evaluate(name: str, output_dir: str, steps: int, rows: int, show_progress: bool) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = Path(output_dir) / name
    train(name, str(folder), steps, show_progress)
    evaluate(name, str(folder), str(folder / "metrics.json"), rows)


def run_demo(
    output_dir: str = "outputs/demo", steps: int = TRAINING_STEPS, rows: int = EVALUATION_ROWS
) -> dict[str, float]:
    """
    Train a judge and the regressive baseline side by side, measure both and the untrained model, and write a report.

    Args:
        output_dir (`str`, *optional*, defaults to `"outputs/demo"`):
            Folder for `report.md`, `metrics.json`, pictures and checkpoints.
        steps (`int`, *optional*):
            Number of updates of each training.
        rows (`int`, *optional*):
            Number of held-out rows of each split.

    Returns:
        `dict[str, float]`: Metrics with flat keys like `judge/id/accuracy`.

    Raises:
        `OSError`: If `output_dir` cannot be written.
        `RuntimeError`: If a training fails.
    """
    start = time.monotonic()
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").touch()  # fails now rather than after minutes of training
    _say(f"Training a pairwise judge and a regressive baseline, {steps} steps each, side by side ...")
    context = multiprocessing.get_context("spawn")
    processes = {
        name: context.Process(target=_train_and_evaluate, args=(name, str(folder), steps, rows, name == "judge"))
        for name in ("judge", "regressive")
    }
    for process in processes.values():
        process.start()
    for process in processes.values():
        process.join()
    failed = [name for name, process in processes.items() if process.exitcode != 0]
    if failed:
        raise RuntimeError(f"Training of {failed} failed; see the messages above. Nothing else was written.")
    _say("Measuring the untrained model ...")
    evaluate("untrained", str(BASE_VLM), str(folder / "untrained.json"), rows)

    metrics: dict[str, Any] = {}
    for file in (folder / "untrained.json", folder / "judge" / "metrics.json", folder / "regressive" / "metrics.json"):
        metrics |= json.loads(file.read_text(encoding="utf-8"))
    scorer = RewardDanceScorer.from_pretrained(folder / "judge", batch_size=100)
    metrics["seconds"] = time.monotonic() - start
    write_report(folder, metrics, scorer, steps)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    for name in MODELS:
        values = [f"{split} {100 * metrics[f'{name}/{split}/accuracy']:.1f} %" for split in ("id", "ood")]
        _say(f"{name:12} held-out accuracy: {', '.join(values)}")
    _say(f"Report: {folder / 'report.md'} ({metrics['seconds']:.0f} s)")
    return metrics


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
