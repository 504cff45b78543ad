"""
The demo's second half: tune the tiny generator by the freshly trained judge, and beside it by a weak reward that it can
hack, both watched by the monitor.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from peft import LoraConfig

from ..alignment.monitor.callback import RewardDynamicsCallback
from ..alignment.monitor.dynamics import RewardDynamics
from ..alignment.refl.arguments import ReFLTrainingArguments
from ..alignment.refl.references import best_of_n_references
from ..alignment.refl.trainer import ReFLTrainer
from ..alignment.refl.weights import LORA_FILE
from ..evaluation.statistics import bootstrap_interval
from ..scoring.scorer import RewardDanceScorer
from .captions import parse_caption
from .generated import ShapesPrompts, alignment_holds, sample_images
from .generator import NUM_INFERENCE_STEPS, SAMPLING, load_generator
from .judges_demo import ReportSteps
from .scenes import COLORS
from .stages import Report


GENERATORS = ("tuned", "hacked")
SHARES_FILE = "right.json"
METRICS_FILE, TUNING_FILE = "metrics.json", "tuning.json"
BATCH_SIZE = 32
LEARNING_RATE = 1e-3
# The later half of the steps: earlier previews are too blurred for the judge, which leads the generator astray by them.
STEP_INDEX_RANGE = [NUM_INFERENCE_STEPS // 2, NUM_INFERENCE_STEPS]
NUM_REFERENCE_PROMPTS, NUM_CANDIDATES, NUM_REFERENCES = 240, 8, 1
# The monitor's held-out prompts are others than those that the report's figures come from.
MONITOR_PROMPTS, MONITOR_SEED = 160, 1
NUM_EVALUATIONS = {"tuned": 5, "hacked": 7}
SAMPLES_PER_PROMPT = 2
EVALUATION_SEED = 2
LORA_TARGETS = [
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
]


def color_reward(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """
    Share of an image `(batch_size, 3, height, width)` that has the colors of its prompt, whatever their shapes and number: a
    differentiable reward to be hacked, in [0, 1].
    """
    rewards = []
    for image, prompt in zip(images, prompts, strict=True):
        colors = dict.fromkeys(item.color for item in parse_caption(prompt).objects)
        palette = image.new_tensor([COLORS[color] for color in colors]) / 255
        distances = (image - palette[:, :, None, None]).square().sum(1)
        share = torch.exp(-distances / 0.08).mean((1, 2)).sum()
        rewards.append(share / (share + 0.15))
    return torch.stack(rewards)


def oracle_reward(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """
    Whether each image shows all of its prompt, 1 or 0, by the oracle.

    A reward that only sees colors soon breaks something in many images, which the share of facts that hold shows late,
    since colors become right.
    """
    return torch.from_numpy(alignment_holds(images, prompts)).float()


def load_tuned(folder: str | Path) -> Any:
    """The base generator with the adapter that [`tune`] has saved."""
    pipeline: Any = load_generator()
    # `pipeline.load_lora_weights` would warn that there are no weights for the text encoders.
    pipeline.transformer.load_lora_adapter(str(folder), prefix="transformer", weight_name=LORA_FILE)
    return pipeline


def measure(name: str, output_dir: str, num_prompts: int, *, report: Report) -> None:
    """
    Measure how often a generator, `"base"` or one that [`tune`] has saved in the folder, draws what held-out prompts say, always
    from the same noise.

    Writes `generator/{name}/alignment` with the 95 % bootstrap interval over prompts (`_low`, `_high`), and
    `generator/{name}/kind/{kind}/alignment`; and the share of right samples of each prompt.
    """
    folder = Path(output_dir)
    pipeline = load_generator() if name == "base" else load_tuned(folder)
    right = shares_right(pipeline, num_prompts, report)
    key = f"generator/{name}"
    low, high = bootstrap_interval(right)
    metrics = {f"{key}/alignment": float(right.mean()), f"{key}/alignment_low": low, f"{key}/alignment_high": high}
    kinds = np.array([row["kind"] for row in ShapesPrompts(num_prompts, "id", EVALUATION_SEED)])
    metrics |= {
        f"{key}/kind/{kind}/alignment": float(right[kinds == kind].mean()) for kind in dict.fromkeys(kinds.tolist())
    }
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / SHARES_FILE, right.tolist())
    _write(folder / METRICS_FILE, metrics)


def shares_right(pipeline: Any, num_prompts: int, report: Report) -> np.ndarray:
    """Share of samples that show all of their prompt, for each of the held-out prompts: an array `(num_prompts,)` in [0, 1]."""
    rows = ShapesPrompts(num_prompts, "id", EVALUATION_SEED)
    prompts = [row["prompt"] for row in rows for _ in range(SAMPLES_PER_PROMPT)]
    images = sample_images(pipeline, prompts, EVALUATION_SEED, on_progress=lambda count: report(count, len(prompts)))
    return alignment_holds(images, prompts).reshape(num_prompts, SAMPLES_PER_PROMPT).mean(1)


def gains(folder: Path) -> dict[str, float]:
    """
    Compare what [`measure`] has written with the base, prompt by prompt: `generator/{name}/gain`, the difference in the share of
    samples drawn right, with the 95 % bootstrap interval over prompts (`_low`, `_high`).
    """
    shares = {
        name: json.loads((folder / name / SHARES_FILE).read_text(encoding="utf-8")) for name in ("base", *GENERATORS)
    }
    metrics: dict[str, float] = {}
    for name in GENERATORS:
        differences = np.subtract(shares[name], shares["base"])
        low, high = bootstrap_interval(differences)
        key = f"generator/{name}/gain"
        metrics |= {key: float(differences.mean()), f"{key}_low": low, f"{key}_high": high}
    return metrics


def tuning_prompts(steps_share: float) -> list[str]:
    """Prompts that generators are tuned on."""
    return [row["prompt"] for row in ShapesPrompts(max(8, round(steps_share * NUM_REFERENCE_PROMPTS)))]


def choose_references(
    output_dir: str, judge_dir: str, steps_share: float, part: int, num_parts: int, *, report: Report
) -> None:
    """Let the judge choose Best-of-N references for one of several parts of the prompts, and save them."""
    prompts = tuning_prompts(steps_share)[part::num_parts]
    sampling: dict[str, Any] = SAMPLING
    judge = RewardDanceScorer.from_pretrained(judge_dir, batch_size=64)
    rows = best_of_n_references(
        load_generator(),
        judge,
        prompts,
        num_candidates=NUM_CANDIDATES,
        top_k=NUM_REFERENCES,
        batch_size=64,
        show_progress=False,
        **sampling,
    )
    rows.save_to_disk(output_dir)


def _read_references(folders: Sequence[str]) -> list[dict[str, Any]]:
    """References of all parts in the order of prompts."""
    parts = [datasets.load_from_disk(folder) for folder in folders]
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def tuning_arguments(
    output_dir: str,
    steps: int,
    reward_transform: str,
    seed: int = 42,
    sampling: Mapping[str, Any] = SAMPLING,
    **settings: Any,
) -> ReFLTrainingArguments:
    """Arguments of a short tuning of a tiny generator, which draws as `sampling` says; `settings` take the place of the usual ones."""
    pipeline_kwargs = {**sampling}
    usual: dict[str, Any] = {
        "num_inference_steps": pipeline_kwargs.pop("num_inference_steps"),
        "guidance_scale": pipeline_kwargs.pop("guidance_scale"),
        "pipeline_kwargs": pipeline_kwargs,
        "step_index_range": STEP_INDEX_RANGE,
        "reward_transform": reward_transform,
        "per_device_train_batch_size": BATCH_SIZE,
        "per_device_eval_batch_size": 64,
        "max_steps": steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": min(10, steps // 8),
        "adam_beta2": 0.95,
        "gradient_checkpointing": False,
        # So few pixels need no savings of memory, which would cost half of the time.
        "vae_checkpointing": False,
        "vae_slicing": False,
        "seed": seed,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return ReFLTrainingArguments(output_dir, **{**usual, **settings})


def tune(
    name: str,
    output_dir: str,
    judge_dir: str | None,
    reference_dirs: Sequence[str],
    steps: int,
    steps_share: float,
    *,
    report: Report,
) -> None:
    """
    Tune the base generator by ReFL (Section 3.3.1 of the [RewardDance paper](https://huggingface.co/papers/2509.08826)), and
    write adapter, plot of the rewards and the monitor's verdict.

    `"tuned"` is tuned by the judge in `judge_dir` against Best-of-N references, with the monitor's best weights; `"hacked"` by
    [`color_reward`].
    """
    pipeline, folder = load_generator(), Path(output_dir)
    metrics: dict[str, Any] = {}
    reward: Any = color_reward
    rows: Any = [{"prompt": prompt} for prompt in tuning_prompts(steps_share)]
    if name == "tuned":
        reward = RewardDanceScorer.from_pretrained(judge_dir or "", batch_size=BATCH_SIZE * NUM_REFERENCES)
        rows = _read_references(reference_dirs)
        kept = [(image, row["prompt"]) for row in rows for image in row["references"]]
        metrics["generator/references/alignment"] = float(alignment_holds(*zip(*kept, strict=True)).mean())
    held_out = ShapesPrompts(max(8, round(steps_share * MONITOR_PROMPTS)), "id", MONITOR_SEED)
    monitor = RewardDynamicsCallback(
        oracle_reward,
        [row["prompt"] for row in held_out],
        eval_steps=max(-(-steps // NUM_EVALUATIONS[name]), 1),
        restore_best=name == "tuned",
        dynamics=RewardDynamics(window=max(steps // 10, 2)),
    )
    # Unlike log-odds, a logarithm lets go of samples that the judge takes for better already.
    arguments = tuning_arguments(output_dir, steps, "log" if name == "tuned" else "none")
    trainer = ReFLTrainer(
        pipeline=pipeline,
        reward={"judge" if name == "tuned" else "color": reward},
        args=arguments,
        train_dataset=rows,
        callbacks=[monitor, ReportSteps(report)],
        peft_config=LoraConfig(r=16, lora_alpha=16, target_modules=LORA_TARGETS),
    )
    trainer.train()
    trainer.save_model()
    (folder / "verdict.txt").write_text(monitor.dynamics.verdict + "\n", encoding="utf-8")
    warnings = [warning.step for warning in monitor.dynamics.warnings]
    metrics[f"generator/{name}/num_warnings"] = len(warnings)
    if warnings:
        metrics[f"generator/{name}/first_warning"] = warnings[0]
    _write(folder / TUNING_FILE, metrics)


def _write(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
