"""Model card of a tuned generator, written by the trainer from what it knows about its run."""

from pathlib import Path
from typing import Any

import diffusers
from huggingface_hub import ModelCardData

from ... import __version__
from ...cards import render_card
from ...trainer.sharding import plain_class
from .arguments import ReFLTrainingArguments


def tuned_generator_card(trainer: Any, model_name: str, tags: list[str]) -> str:
    """Fill the model card of a tuned generator."""
    lora = trainer.peft_config
    source = getattr(trainer.pipeline, "name_or_path", None)
    # A folder means nothing to others.
    base_model = None if source is None or Path(source).exists() else str(source)
    has_conditions = trainer.train_dataset is not None and trainer.train_dataset.has_conditions
    card_data = ModelCardData(
        base_model=base_model,
        library_name="diffusers",
        pipeline_tag=f"{'image' if has_conditions else 'text'}-to-{'video' if 'frames' in trainer.output_fields else 'image'}",
        tags=[*tags, *(["lora"] if lora is not None else []), "generated_from_trainer"],
    )
    return render_card(
        "tuned_generator_card.md",
        card_data,
        name=model_name,
        lora=lora,
        denoisers={name: plain_class(getattr(trainer.pipeline, name)).__name__ for name in trainer.denoiser_names},
        base_model=base_model,
        path=base_model or f"path/to/{Path(source).name if source is not None else 'the/pipeline'}",
        settings=_settings(trainer),
        measured=_measured(trainer.state.log_history),
        samples=sorted(grid.name for grid in (Path(trainer.args.output_dir) / "samples").glob("step-*.png")),
    )


def _settings(trainer: Any) -> dict[str, Any]:
    """What was trained, by name."""
    args: ReFLTrainingArguments = trainer.args
    rewards = [
        f"{name} x {weight:g}" for name, weight in zip(trainer.rewards.names, trainer.rewards.weights, strict=True)
    ]
    settings = {
        "rewards": ", ".join(rewards),
        "gradient": args.method if args.method == "refl" else f"{args.method}, last {args.num_gradient_steps} steps",
        "updates": trainer.state.global_step,
        "samples per update": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "prompts": len(trainer.train_dataset) if trainer.train_dataset is not None else 0,
        "learning rate": args.learning_rate,
        "sampling steps": args.num_inference_steps or "default of the pipeline",
        "guidance scale": args.guidance_scale if args.guidance_scale is not None else "default of the pipeline",
        "weight of the distance to the un-tuned denoiser": args.beta,
        "average of weights": f"decay {args.ema_decay}" if args.use_ema else "no",
        "rewarddance_hf / diffusers": f"{__version__} / {diffusers.__version__}",
    }
    ranges = args.step_index_range or args.step_ratio_range
    if args.method == "refl" and ranges:
        settings["gradient"] += f", one step of {list(ranges)}"
    return settings


def _measured(log_history: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Rewards at the start and at the end of training, and of the first and last evaluation."""
    measured = {}
    training = [logs["reward"] for logs in log_history if "reward" in logs]
    if training:
        window = max(1, len(training) // 10)
        means = sum(training[:window]) / window, sum(training[-window:]) / window
        measured["mean reward of the training samples"] = means
    for key in dict.fromkeys(key for logs in log_history for key in logs if key.startswith("eval_")):
        if key.endswith("reward") or "_rewards/" in key:
            values = [logs[key] for logs in log_history if key in logs]
            measured[key] = values[0], values[-1]
    return measured
