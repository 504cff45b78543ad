"""Model card of a tuned generator, written by the trainer from what it knows of its run."""

from pathlib import Path
from typing import Any

import diffusers
from huggingface_hub import ModelCard, ModelCardData

from ... import __version__
from .arguments import ReFLTrainingArguments


TEXT = """---
{card_data}
---

# {model_name}

{what} of {base}, tuned by the gradient of a reward
([ReFL](https://huggingface.co/papers/2304.05977) as in
[RewardDance](https://huggingface.co/papers/2509.08826), Section 3.3.1).

```python
{snippet}
```

| | |
|---|---|
{settings}

{metrics}{samples}A reward that rises does not prove better images: a generator can learn what its judge overlooks. Look at the samples,
and measure with a judge that was not trained on.

## Citation

```bibtex
@article{{rewarddance2025,
    title  = {{RewardDance: Reward Scaling in Visual Generation}},
    year   = {{2025}},
    eprint = {{2509.08826}},
}}
```
"""


def generator_card(trainer: Any, model_name: str, tags: list[str]) -> str:
    """
    Fill the model card of a tuned generator.

    Args:
        trainer ([`ReFLTrainer`]):
            Trainer after its run.
        model_name (`str`):
            Repository ID, or name of the folder.
        tags (`list[str]`):
            Tags of the repository.

    Returns:
        `str`: Text of the card in Markdown, with metadata.
    """
    pipeline, name, lora = trainer.pipeline, trainer.denoiser_name, trainer.peft_config
    source = getattr(pipeline, "name_or_path", None)
    # A folder means nothing to others.
    base_model = None if source is None or Path(source).exists() else str(source)
    path = base_model or f"path/to/{Path(source).name if source is not None else 'the/pipeline'}"
    card_data = ModelCardData(
        base_model=base_model,
        library_name="diffusers",
        pipeline_tag="text-to-video" if "frames" in trainer.output_fields else "text-to-image",
        tags=[*tags, *(["lora"] if lora is not None else []), "generated_from_trainer"],
    )
    if lora is not None:
        snippet = [
            "from diffusers import DiffusionPipeline\n",
            f'pipeline = DiffusionPipeline.from_pretrained("{path}")',
            f'pipeline.load_lora_weights("{model_name}")',
        ]
    else:
        denoiser = type(getattr(pipeline, name)).__name__
        snippet = [
            f"from diffusers import DiffusionPipeline, {denoiser}\n",
            f'{name} = {denoiser}.from_pretrained("{model_name}", subfolder="{name}")',
            f'pipeline = DiffusionPipeline.from_pretrained("{path}", {name}={name})',
        ]
    text = TEXT.format(
        card_data=card_data.to_yaml(),
        model_name=model_name,
        what=f"LoRA (rank {lora.r}, alpha {lora.lora_alpha}) for the {name}" if lora is not None else f"Full {name}",
        base=f"[{base_model}](https://huggingface.co/{base_model})" if base_model else f"`{path}`",
        snippet="\n".join(snippet),
        settings="\n".join(f"| {key} | {value} |" for key, value in _settings(trainer).items()),
        metrics=_metrics(trainer.state.log_history),
        samples=_samples(Path(trainer.args.output_dir)),
    )
    return str(ModelCard(text))


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


def _metrics(log_history: list[dict[str, Any]]) -> str:
    """Table of rewards at the start and at the end of training, and of the evaluations."""
    rows = []
    training = [logs["reward"] for logs in log_history if "reward" in logs]
    if training:
        window = max(1, len(training) // 10)
        first, last = (sum(part) / window for part in (training[:window], training[-window:]))
        rows.append(f"| mean reward of the training samples | {first:.3f} | {last:.3f} |")
    for key in dict.fromkeys(key for logs in log_history for key in logs if key.startswith("eval_")):
        values = [logs[key] for logs in log_history if key in logs]
        if key.endswith("reward") or "_rewards/" in key:
            rows.append(f"| {key} | {values[0]:.3f} | {values[-1]:.3f} |")
    if not rows:
        return ""
    return "\n".join(["| measured | first | last |", "|---|---|---|", *rows]) + "\n\n"


def _samples(folder: Path) -> str:
    """Links to the first and the last grid of samples."""
    grids = sorted((folder / "samples").glob("step-*.png"))
    if len(grids) < 2:
        return ""
    first, last = (f"samples/{grid.name}" for grid in (grids[0], grids[-1]))
    return f"| before | after |\n|---|---|\n| ![before]({first}) | ![after]({last}) |\n\n"
