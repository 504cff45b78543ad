"""The demo's first half: fine-tune the tiny base model as a judge of shapes and as the paper's baseline, and measure them."""

import json
import multiprocessing
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
from torch.utils.data import Dataset
from transformers import TrainerCallback

from ..evaluation.evaluator import RewardDanceEvaluator
from ..models import RewardDanceForYesScoring
from ..scoring.scorer import RewardDanceScorer
from ..trainer.rewarddance_trainer import RewardDanceTrainer
from ..trainer.training_args import RewardDanceTrainingArguments
from .demo import CURVE_ROWS, EVALUATION_ROWS, TRAINING_STEPS
from .models import JUDGE_BASE, judge_processor
from .preferences import ShapesPreferences
from .sampled_pairs import PAIRS_FILE, mixed_rows, sample_pairs
from .stages import Report, no_report


PARADIGM = {"untrained": "pointwise", "judge": "pairwise", "regressive": "regressive", "pointwise": "pointwise"}
BATCH_SIZE = 48
LEARNING_RATE = 7e-4
GENERATED_LEARNING_RATE = 3e-4
# Rows of the learning curve are others than those that the report's figures come from.
CURVE_SEED = 1
HISTORY_FILE = "log_history.json"


class ReportSteps(TrainerCallback):
    """Tell a [`Report`] of each update."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.report(state.global_step, state.max_steps)


def sample(split: str, output_dir: str, num_prompts: int, *, report: Report) -> None:
    """[`sample_pairs`] as a stage."""
    done = 0

    def add(count: int) -> None:
        nonlocal done
        done += count
        report(done, num_prompts)

    sample_pairs(split, output_dir, num_prompts, add)


def train(
    name: str,
    output_dir: str,
    steps: int = TRAINING_STEPS,
    curve_rows: int = CURVE_ROWS,
    eval_steps: int = TRAINING_STEPS // 8,
    *,
    report: Report = no_report,
) -> None:
    """
    Fine-tune the base model as `"judge"` (pairwise, with rationales), `"pointwise"`, or `"regressive"` (the paper's baseline), and
    save it with its `log_history.json`.
    """
    arguments = _arguments(output_dir, PARADIGM[name], steps, LEARNING_RATE, 50, eval_steps)
    history = _train(str(JUDGE_BASE), ShapesPreferences(steps * BATCH_SIZE), arguments, curve_rows, report)
    _write_history(output_dir, history)


def train_on_generated(
    name: str, output_dir: str, steps: int, pairs_dir: str, curve_rows: int, eval_steps: int, *, report: Report
) -> None:
    """Go on with what [`train`] has saved, with as many pairs of the generator's own samples as drawings."""
    arguments = _arguments(output_dir, PARADIGM[name], steps, GENERATED_LEARNING_RATE, 20, eval_steps)
    rows = mixed_rows(steps * BATCH_SIZE, read_pairs(pairs_dir))
    before = read_history(output_dir)
    history = _train(output_dir, rows, arguments, curve_rows, report)
    start = max(log["step"] for log in before)
    _write_history(output_dir, before + [{**log, "step": log["step"] + start} for log in history])


def read_pairs(folder: str) -> datasets.Dataset:
    """Finished pairs of [`sample_pairs`]."""
    return datasets.Dataset.from_file(str(Path(folder) / PAIRS_FILE))


def read_history(folder: str | Path) -> list[dict[str, Any]]:
    """What was logged in a training."""
    return json.loads((Path(folder) / HISTORY_FILE).read_text(encoding="utf-8"))


def _write_history(folder: str, history: list[dict[str, Any]]) -> None:
    (Path(folder) / HISTORY_FILE).write_text(json.dumps(history, indent=2) + "\n", encoding="utf-8")


def _train(
    model: str, rows: Dataset, arguments: RewardDanceTrainingArguments, curve_rows: int, report: Report
) -> list[dict[str, Any]]:
    """Train, save the model, and give what was logged."""
    # Drawn once, as they are asked about again and again
    curve = {split: list(ShapesPreferences(curve_rows, split, seed=CURVE_SEED)) for split in ("id", "ood")}
    trainer = RewardDanceTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=curve,
        processing_class=judge_processor(model),
        callbacks=[ReportSteps(report)],
    )
    trainer.train()
    trainer.save_model()
    return trainer.state.log_history


def _arguments(
    output_dir: str, paradigm: str, steps: int, learning_rate: float, warmup_steps: int, eval_steps: int
) -> RewardDanceTrainingArguments:
    return RewardDanceTrainingArguments(
        output_dir,
        paradigm=paradigm,
        rationale="decision_first" if paradigm == "pairwise" else None,
        rationale_weight=0.5,
        max_steps=steps,
        per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=100,
        # All else waits for the judge: its rows are prepared beside it.
        dataloader_num_workers=1 if paradigm == "pairwise" and multiprocessing.get_start_method() == "fork" else 0,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=warmup_steps,
        weight_decay=0.02,
        adam_beta2=0.98,
        gradient_checkpointing=False,
        eval_strategy="steps",
        eval_steps=eval_steps,
        logging_steps=eval_steps,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )


def evaluate(
    name: str,
    model_dir: str | None,
    output_file: str,
    rows: int = EVALUATION_ROWS,
    pairs_dir: str | None = None,
    *,
    report: Report = no_report,
) -> None:
    """Measure a judge, by default the untrained one, on held-out rows, and on pairs of the generator's samples."""
    model = model_dir or str(JUDGE_BASE)
    scorer = RewardDanceScorer(
        RewardDanceForYesScoring.from_pretrained(model, paradigm=PARADIGM[name]),
        judge_processor(model),
        batch_size=100,
    )
    held_out: dict[str, Any] = {split: ShapesPreferences(rows, split) for split in ("id", "ood")}
    if pairs_dir is not None:
        held_out["generated"] = read_pairs(pairs_dir)
    metrics: dict[str, Any] = {}
    for done, (split, dataset) in enumerate(held_out.items()):
        report(done, len(held_out))
        evaluator = RewardDanceEvaluator(dataset)
        metrics |= {f"{name}/{split}/{key}": value for key, value in evaluator(scorer).items()}
        assert evaluator.results is not None
        counts = Counter(filter(None, evaluator.results.categories))
        metrics |= {f"{name}/{split}/category/{category}/num_rows": count for category, count in counts.items()}
    Path(output_file).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
