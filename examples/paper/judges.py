"""Judges of the study: trained by `RewardDanceTrainer`, measured by `RewardDanceEvaluator`."""

from typing import Any

from torch.utils.data import Dataset, Subset
from transformers import TrainerCallback

from rewarddance_hf import (
    RewardDanceEvaluator,
    RewardDanceForYesScoring,
    RewardDanceProcessor,
    RewardDanceScorer,
    RewardDanceTrainer,
    RewardDanceTrainingArguments,
)
from rewarddance_hf.evaluation.statistics import verdict_credits
from rewarddance_hf.shapes.judges_demo import read_pairs, sample
from rewarddance_hf.shapes.models import judge_processor
from rewarddance_hf.shapes.preferences import ShapesPreferences
from rewarddance_hf.shapes.sampled_pairs import mixed_rows


BATCH_SIZE = 48
LEARNING_RATE, SAMPLES_LEARNING_RATE = 5e-4, 3e-4


class ReportSteps(TrainerCallback):
    """Tell how far a training is."""

    def __init__(self, report: Any, done: int, total: int) -> None:
        self.report, self.done, self.total = report, done, total

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.report(self.done + state.global_step, self.total)


def draw_pairs(folder: str, *, report: Any, split: str, num_prompts: int) -> dict[str, Any]:
    """Pairs of the generator's own samples, labelled by the oracle."""
    sample(split, folder, num_prompts, report=report)
    return {"num_rows": len(read_pairs(folder))}


def train_and_measure(
    folder: str,
    *pairs: str,
    report: Any,
    base: str,
    paradigm: str,
    num_rows: int,
    updates: int,
    seed: int,
    held_out_rows: int,
    prompt_layout: str,
    rationale: str | None = None,
    sample_updates: int = 0,
) -> dict[str, Any]:
    """
    Fine-tune a base model on `num_rows` pairs of drawings, which come as often as `updates` ask for, then go on for
    `sample_updates` with as many pairs of the generator's samples; `pairs` are folders of those for training and of held-out ones.
    """
    rows: Dataset = ShapesPreferences(num_rows, seed=100 + seed)
    rows = Subset(rows, [index % num_rows for index in range(updates * BATCH_SIZE)])
    total = updates + sample_updates
    settings = {"paradigm": paradigm, "rationale": rationale, "rationale_weight": 0.5}
    processor = judge_processor(base, prompt_layout=prompt_layout)
    train(base, processor, folder, rows, updates, LEARNING_RATE, seed, ReportSteps(report, 0, total), **settings)
    if sample_updates:
        mixed = mixed_rows(sample_updates * BATCH_SIZE, read_pairs(pairs[0]))
        callback = ReportSteps(report, updates, total)
        train(folder, processor, folder, mixed, sample_updates, SAMPLES_LEARNING_RATE, seed, callback, **settings)
    return measure(
        folder,
        *pairs[1:],
        report=report,
        model=folder,
        paradigm=paradigm,
        prompt_layout=prompt_layout,
        held_out_rows=held_out_rows,
    )


def measure(
    folder: str, *pairs: str, report: Any, model: str, paradigm: str, prompt_layout: str, held_out_rows: int
) -> dict[str, Any]:
    """Metrics of a judge by split, as of [`describe`]."""
    judge = RewardDanceForYesScoring.from_pretrained(model, paradigm=paradigm)
    scorer = RewardDanceScorer(judge, judge_processor(model, prompt_layout=prompt_layout), batch_size=100)
    splits: dict[str, Any] = {split: ShapesPreferences(held_out_rows, split) for split in ("id", "ood")}
    if pairs:
        splits["generated"] = read_pairs(pairs[0])
    return {split: describe(rows, scorer) for split, rows in splits.items()}


def train(
    model: str,
    processor: RewardDanceProcessor,
    folder: str,
    rows: Dataset,
    updates: int,
    learning_rate: float,
    seed: int,
    callback: TrainerCallback,
    batch_size: int = BATCH_SIZE,
    **settings: Any,
) -> None:
    """A short training of a tiny judge, which is saved in `folder`; `settings` are further training arguments."""
    arguments = RewardDanceTrainingArguments(
        folder,
        max_steps=updates,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(50, updates // 8),
        weight_decay=0.02,
        adam_beta2=0.98,
        gradient_checkpointing=False,
        seed=seed,
        logging_steps=max(updates // 10, 1),
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    trainer = RewardDanceTrainer(
        model=model, args=arguments, train_dataset=rows, processing_class=processor, callbacks=[callback]
    )
    trainer.train()
    trainer.save_model()


def describe(rows: Any, scorer: RewardDanceScorer) -> dict[str, Any]:
    """
    Metrics of a judge, with the credit of each row (`credits`), that for the mean of both orders (`averaged_credits`) and its category
    (`categories`).
    """
    evaluator = RewardDanceEvaluator(rows)
    metrics: dict[str, Any] = evaluator(scorer)
    results = evaluator.results
    assert results is not None
    return {
        **metrics,
        "credits": verdict_credits(results.log_odds).mean(axis=1).tolist(),
        "averaged_credits": verdict_credits(results.log_odds.sum(axis=1)).tolist(),
        "categories": list(results.categories),
    }
