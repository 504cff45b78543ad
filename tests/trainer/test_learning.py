"""Training makes a better judge."""

import pytest

from rewarddance_hf import RewardDanceEvaluator, RewardDanceTrainer, RewardDanceTrainingArguments
from rewarddance_hf.shapes.models import BASE_VLM, judge_processor
from rewarddance_hf.shapes.preferences import ShapesPreferences


STEPS, BATCH_SIZE = 100, 24


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_accuracy_rises_on_rows_that_were_not_seen(seed, tmp_path):
    """100 updates on shapes lift the accuracy on other rows by more than 15 points."""
    arguments = RewardDanceTrainingArguments(
        str(tmp_path),
        rationale="decision_first",
        rationale_weight=0.5,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        adam_beta2=0.98,
        gradient_checkpointing=False,
        seed=seed,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = RewardDanceTrainer(
        str(BASE_VLM),
        arguments,
        train_dataset=ShapesPreferences(STEPS * BATCH_SIZE, "train", seed=seed),
        processing_class=judge_processor(),
    )
    evaluator = RewardDanceEvaluator(ShapesPreferences(150, "id", seed=9), batch_size=50)
    before = evaluator(trainer.model, trainer.processing_class)["accuracy"]
    trainer.train()
    after = evaluator(trainer.model, trainer.processing_class)["accuracy"]
    assert after > before + 0.15, (before, after)
