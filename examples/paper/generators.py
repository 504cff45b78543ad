"""Generators of the study: tuned by ReFL, searched through, and measured by the oracle."""

import json
from typing import Any

import torch
from peft import LoraConfig

from rewarddance_hf import (
    ReFLTrainer,
    RewardDanceScorer,
    RewardDynamics,
    RewardDynamicsCallback,
    best_of_n,
    best_of_n_references,
    search_over_paths,
)
from rewarddance_hf.shapes.alignment_demo import (
    BATCH_SIZE,
    LORA_TARGETS,
    MONITOR_SEED,
    oracle_reward,
    shares_right,
    tuning_arguments,
)
from rewarddance_hf.shapes.generated import ShapesPrompts, alignment_holds
from rewarddance_hf.shapes.generator import SAMPLING, load_generator
from rewarddance_hf.shapes.preferences import ALIGNMENT_CRITERIA


# Prompts to search for, others than those that tuned generators are measured on
SEARCHED_SEED = 3
PATHS = {"num_paths": 2, "start_step": 4, "renoise_steps": 2, "denoise_steps": 4}


def measure(folder: str, *, report: Any, generator: str, num_prompts: int) -> dict[str, Any]:
    """Share of samples of a generator that show all of their held-out prompt, for each prompt."""
    return {"right": shares_right(load_generator(generator), num_prompts, report).tolist()}


def tune(
    folder: str,
    judge: str,
    *,
    report: Any,
    generator: str,
    paradigm: str,
    updates: int,
    seed: int,
    num_prompts: int,
    measured_prompts: int,
    monitored_prompts: int,
    references: dict[str, Any],
) -> dict[str, Any]:
    """
    Tune a generator by ReFL (Section 3.3.1), with `references` for a pairwise judge: `method`, `num_candidates`, `top_k`.
    The weights of the last update are measured.
    """
    pipeline: Any = load_generator(generator)
    scorer = load_scorer(judge, BATCH_SIZE * references["top_k"])
    prompts = [row["prompt"] for row in ShapesPrompts(num_prompts, seed=seed)]
    rows: Any = [{"prompt": prompt} for prompt in prompts]
    metrics: dict[str, Any] = {}
    if paradigm == "pairwise":
        settings: dict[str, Any] = {**SAMPLING, **references}
        rows = best_of_n_references(
            pipeline, load_scorer(judge, 64), prompts, batch_size=64, seed=seed, show_progress=False, **settings
        )
        kept = [(image, row["prompt"]) for row in rows for image in row["references"]]
        metrics["references"] = float(alignment_holds(*zip(*kept, strict=True)).mean())
    held_out = [row["prompt"] for row in ShapesPrompts(monitored_prompts, "id", MONITOR_SEED)]
    monitor = RewardDynamicsCallback(
        oracle_reward,
        held_out,
        eval_steps=max(updates // 4, 1),
        restore_best=False,
        dynamics=RewardDynamics(window=max(updates // 5, 2)),
    )
    transform = "none" if paradigm == "regressive" else "log"
    trainer = ReFLTrainer(
        pipeline=pipeline,
        reward=scorer,
        args=tuning_arguments(folder, updates, transform, seed),
        train_dataset=rows,
        callbacks=[monitor],
        peft_config=LoraConfig(r=16, lora_alpha=16, target_modules=LORA_TARGETS),
    )
    trainer.train()
    trainer.save_model()
    metrics["right"] = shares_right(pipeline, measured_prompts, report).tolist()
    metrics["history"] = json.loads(json.dumps(monitor.dynamics.history, default=float))
    metrics["warnings"] = [[warning.step, warning.kind] for warning in monitor.dynamics.warnings]
    return metrics


def search(folder: str, judge: str, *, report: Any, seed: int, num_prompts: int, budgets: list[int]) -> dict[str, Any]:
    """
    Search by a pointwise judge (Section 3.3.2): whether the image that is found shows all of its prompt, for each prompt, by method
    and budget of denoiser evaluations; and how many tokens the judge has read for a prompt (`tokens`).
    """
    pipeline: Any = load_generator()
    scorer = load_scorer(judge, 128)
    prompts = [row["prompt"] for row in ShapesPrompts(num_prompts, "id", SEARCHED_SEED)]

    num_tokens = 0

    def reward(images: Any, prompts: Any) -> torch.Tensor:
        nonlocal num_tokens
        scores = scorer.score(images, prompts, criteria=ALIGNMENT_CRITERIA)
        num_tokens += scorer.statistics.tokens
        return scores

    options: dict[str, Any] = {"output_type": "pt", "batch_size": 128, "seed": seed, **SAMPLING}
    searches: dict[str, Any] = {"best_of_n": (best_of_n, {}), "paths": (search_over_paths, PATHS)}
    found: dict[str, Any] = {"tokens": {}}
    for number, budget in enumerate(budgets):
        for method, (function, settings) in searches.items():
            num_tokens = 0
            results = function(pipeline, prompts, reward, max_denoiser_evaluations=budget, **settings, **options)
            images = torch.stack([result.images[0] for result in results])
            found[f"{method}/{budget}"] = alignment_holds(images, prompts).astype(float).tolist()
            found["tokens"][f"{method}/{budget}"] = num_tokens / num_prompts
        report(number + 1, len(budgets))
    plain = best_of_n(pipeline, prompts, reward, num_candidates=1, **options)
    images = torch.stack([result.images[0] for result in plain])
    return {"plain": alignment_holds(images, prompts).astype(float).tolist(), **found}


def load_scorer(judge: str, batch_size: int) -> RewardDanceScorer:
    """A frozen judge of the study."""
    scorer = RewardDanceScorer.from_pretrained(judge, batch_size=batch_size)
    scorer.model.requires_grad_(False)
    return scorer
