"""Generators of the study: tuned by ReFL, searched through, and measured by the oracle."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from judges import LAYOUT
from peft import LoraConfig

from rewarddance_hf import (
    ReFLTrainer,
    ReFLTrainingArguments,
    RewardDanceForYesScoring,
    RewardDanceScorer,
    RewardDynamics,
    RewardDynamicsCallback,
    best_of_n,
    best_of_n_references,
    search_over_paths,
)
from rewarddance_hf.shapes.alignment_demo import LORA_TARGETS, oracle_reward
from rewarddance_hf.shapes.generated import ShapesPrompts, alignment_holds, sample_images
from rewarddance_hf.shapes.generator import MAX_SEQUENCE_LENGTH, NUM_INFERENCE_STEPS, SAMPLING, load_generator
from rewarddance_hf.shapes.models import judge_processor
from rewarddance_hf.shapes.preferences import ALIGNMENT_CRITERIA


BATCH_SIZE = 32
LEARNING_RATE = 1e-3
STEP_INDEX_RANGE = [NUM_INFERENCE_STEPS // 2, NUM_INFERENCE_STEPS]
SAMPLES_PER_PROMPT = 2
# Prompts that figures come from, that the monitor sees, that are searched for: none is in two of these.
MEASURED_SEED, MONITORED_SEED, SEARCHED_SEED = 2, 1, 3
PATHS = {"num_paths": 2, "start_step": 4, "renoise_steps": 2, "denoise_steps": 4}


def measure(folder: str, *, report: Any, num_prompts: int) -> dict[str, Any]:
    """Share of samples of the base generator that show all of their held-out prompt, for each prompt."""
    return {"right": _measure(load_generator(), num_prompts, report)}


def tune(
    folder: str,
    judge: str,
    *,
    report: Any,
    paradigm: str,
    updates: int,
    seed: int,
    num_prompts: int,
    measured_prompts: int,
    references: dict[str, Any],
) -> dict[str, Any]:
    """
    Tune the base generator by ReFL (Section 3.3.1), with `references` for a pairwise judge: `method`, `num_candidates`, `top_k`.
    The weights of the last update are measured.
    """
    pipeline: Any = load_generator()
    scorer = load_scorer(judge, paradigm, BATCH_SIZE * references["top_k"])
    prompts = [row["prompt"] for row in ShapesPrompts(num_prompts, seed=seed)]
    rows: Any = [{"prompt": prompt} for prompt in prompts]
    metrics: dict[str, Any] = {}
    if paradigm == "pairwise":
        settings: dict[str, Any] = {**SAMPLING, **references}
        rows = best_of_n_references(
            pipeline, scorer, prompts, batch_size=64, seed=seed, show_progress=False, **settings
        )
        kept = [(image, row["prompt"]) for row in rows for image in row["references"]]
        metrics["references"] = float(alignment_holds(*zip(*kept, strict=True)).mean())
    held_out = [row["prompt"] for row in ShapesPrompts(100, "id", MONITORED_SEED)]
    monitor = RewardDynamicsCallback(
        oracle_reward,
        held_out,
        eval_steps=max(updates // 4, 1),
        restore_best=False,
        dynamics=RewardDynamics(window=max(updates // 5, 2)),
    )
    arguments = ReFLTrainingArguments(
        folder,
        num_inference_steps=NUM_INFERENCE_STEPS,
        guidance_scale=SAMPLING["guidance_scale"],
        pipeline_kwargs={"max_sequence_length": MAX_SEQUENCE_LENGTH},
        step_index_range=STEP_INDEX_RANGE,
        reward_transform="none" if paradigm == "regressive" else "log",
        per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=64,
        max_steps=updates,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=min(10, updates // 8),
        adam_beta2=0.95,
        gradient_checkpointing=False,
        vae_checkpointing=False,
        vae_slicing=False,
        seed=seed,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = ReFLTrainer(
        pipeline=pipeline,
        reward=scorer,
        args=arguments,
        train_dataset=rows,
        callbacks=[monitor],
        peft_config=LoraConfig(r=16, lora_alpha=16, target_modules=LORA_TARGETS),
    )
    trainer.train()
    trainer.save_model()
    metrics["right"] = _measure(pipeline, measured_prompts, report)
    metrics["history"] = json.loads(json.dumps(monitor.dynamics.history, default=float))
    metrics["warnings"] = [[warning.step, warning.kind] for warning in monitor.dynamics.warnings]
    return metrics


def search(folder: str, judge: str, *, report: Any, seed: int, num_prompts: int, budgets: list[int]) -> dict[str, Any]:
    """
    Search by a pointwise judge (Section 3.3.2): whether the image that is found shows all of its prompt, for each prompt, by method
    and budget of denoiser evaluations.
    """
    pipeline: Any = load_generator()
    scorer = load_scorer(judge, "pointwise", 128)
    prompts = [row["prompt"] for row in ShapesPrompts(num_prompts, "id", SEARCHED_SEED)]

    def reward(images: Any, prompts: Any) -> torch.Tensor:
        return scorer.score(images, prompts, criteria=ALIGNMENT_CRITERIA)

    options: dict[str, Any] = {"output_type": "pt", "batch_size": 128, "seed": seed, **SAMPLING}
    searches: dict[str, Any] = {"best_of_n": (best_of_n, {}), "paths": (search_over_paths, PATHS)}
    found: dict[str, Any] = {}
    for number, budget in enumerate(budgets):
        for method, (function, settings) in searches.items():
            results = function(pipeline, prompts, reward, max_denoiser_evaluations=budget, **settings, **options)
            images = torch.stack([result.images[0] for result in results])
            found[f"{method}/{budget}"] = alignment_holds(images, prompts).astype(float).tolist()
        report(number + 1, len(budgets))
    plain = best_of_n(pipeline, prompts, reward, num_candidates=1, **options)
    images = torch.stack([result.images[0] for result in plain])
    return {"plain": alignment_holds(images, prompts).astype(float).tolist(), **found}


def load_scorer(judge: str, paradigm: str, batch_size: int) -> RewardDanceScorer:
    """A frozen judge of the study."""
    model = RewardDanceForYesScoring.from_pretrained(judge, paradigm=paradigm).requires_grad_(False)
    return RewardDanceScorer(model, judge_processor(Path(judge), prompt_layout=LAYOUT), batch_size=batch_size)


def _measure(pipeline: Any, num_prompts: int, report: Any) -> list[float]:
    rows = ShapesPrompts(num_prompts, "id", MEASURED_SEED)
    prompts = [row["prompt"] for row in rows for _ in range(SAMPLES_PER_PROMPT)]
    images = sample_images(pipeline, prompts, MEASURED_SEED, on_progress=lambda count: report(count, len(prompts)))
    right = alignment_holds(images, prompts).astype(float)
    return np.asarray(right).reshape(num_prompts, SAMPLES_PER_PROMPT).mean(1).tolist()
