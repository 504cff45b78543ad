"""Training of a judge, told by flags or a YAML file: the body of `rewarddance train` and `examples/train_reward_model.py`."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import get_peft_config, get_quantization_config

from ..availability import check_available
from ..trainer.training_args import RewardDanceTrainingArguments
from .arguments import JudgeModelConfig, finish, required
from .data import DataArguments, load_preferences_of
from .parser import RecipeParser


# Datasets that are made when they are asked for, and how the names of their splits begin.
SHAPES = {"shapes": "", "shapes-generated": "", "shapes-video": "video-", "shapes-edits": "edit-"}


@dataclass
class RewardDanceScriptArguments(DataArguments):
    """Arguments of the script that belong neither to the model nor to the run."""

    processor_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Arguments of `RewardDanceProcessor`, e.g. `{prompt_layout: text_first}` in YAML."},
    )
    shapes_rows: int = field(
        default=40_000, metadata={"help": "Number of training rows when `dataset_name` begins with 'shapes'."}
    )
    shapes_prompts: int = field(
        default=1600,
        metadata={
            "help": "Number of prompts, 6 samples each, whose pairs are half of the rows of 'shapes-generated'."
        },
    )


def load_rows(script_args: RewardDanceScriptArguments, training_args: RewardDanceTrainingArguments) -> tuple[Any, Any]:
    """Training rows, and evaluation sets by name or None."""
    with_eval = training_args.eval_strategy != "no"
    if script_args.dataset_name in SHAPES:
        from ..shapes.loading import load_shapes

        kind = SHAPES[script_args.dataset_name]
        evaluation = {split: load_shapes(f"{kind}{split}", 500) for split in ("id", "ood")} if with_eval else None
        if script_args.dataset_name == "shapes-generated":
            return load_generated_rows(script_args, training_args, evaluation), evaluation
        return load_shapes(f"{kind}train", script_args.shapes_rows), evaluation
    return load_preferences_of(script_args, with_eval, show_progress=training_args.should_log)


def load_generated_rows(
    script_args: RewardDanceScriptArguments, training_args: RewardDanceTrainingArguments, evaluation: Any
) -> Any:
    """Drawings, and as many pairs of the tiny generator's own samples. Held-out ones become an evaluation set."""
    from ..shapes.demo import GENERATED_PROMPTS
    from ..shapes.sampled_pairs import mixed_rows, sample_pairs

    pairs = {
        split: sample_pairs(split, Path(training_args.output_dir) / f"pairs_{split}_{num_prompts}", num_prompts)
        for split, num_prompts in {"train": script_args.shapes_prompts, "id": GENERATED_PROMPTS["id"]}.items()
    }
    if evaluation is not None:
        evaluation["generated"] = pairs["id"]
    return mixed_rows(script_args.shapes_rows, pairs["train"])


def main(
    script_args: RewardDanceScriptArguments, training_args: RewardDanceTrainingArguments, model_args: JudgeModelConfig
) -> None:
    from ..trainer.processor import load_processor
    from ..trainer.rewarddance_trainer import RewardDanceTrainer

    if script_args.dataset_name not in SHAPES:
        name = required(model_args, "model_name_or_path", "OpenGVLab/InternVL3_5-2B-HF")
        if name.startswith(("/", "./", "../", "~")) and not os.path.isdir(name):
            raise ValueError(f"`model_name_or_path` is {name!r}, but there is no such folder. Check the path.")
        required(script_args, "dataset_name", "me/my-pairs")
    # Every row is checked before anything is loaded that takes long.
    train_dataset, eval_dataset = load_rows(script_args, training_args)
    model_name = model_args.model_name_or_path
    processor_kwargs = dict(script_args.processor_kwargs or {})
    if script_args.dataset_name in SHAPES:
        from ..shapes.models import BASE_VLM, JUDGE_BASE, judge_processor

        # Clips and edits are those with a prefix.
        model_name = model_name or str(BASE_VLM if SHAPES[script_args.dataset_name] else JUDGE_BASE)
        processor = judge_processor(model_name, **processor_kwargs)
    else:
        check_available(str(model_name), revision=model_args.model_revision)
        processor = load_processor(model_name, revision=model_args.model_revision, **processor_kwargs)
    if script_args.dry_run:
        from .dry_run import show_training

        return show_training(train_dataset, eval_dataset, str(model_name), processor, training_args, model_args)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "quantization_config": get_quantization_config(model_args),
        **(training_args.model_init_kwargs or {}),
    }
    trainer = RewardDanceTrainer(
        model=model_name,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    if eval_dataset is not None and script_args.dataset_name not in SHAPES:
        measure(trainer, eval_dataset)
    finish(trainer, "Judge")


def measure(trainer: Any, rows: Any) -> None:
    """Accuracy on held-out rows with its interval, in both orders: printed, logged for the card, and in `eval_results.json`."""
    from ..evaluation.evaluator import RewardDanceEvaluator

    args = trainer.args
    is_shown = not args.disable_tqdm and args.should_log
    trainer.evaluator = RewardDanceEvaluator(
        rows, batch_size=args.per_device_eval_batch_size, seed=args.seed, show_progress=is_shown
    )
    metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    accuracy, low, high = (100 * metrics[f"eval_accuracy{end}"] for end in ("", "_low", "_high"))
    trainer.accelerator.print(
        f"Accuracy on {int(metrics['eval_num_rows'])} rows that were not trained on: {accuracy:.1f} % (95 % interval {low:.1f} "
        f"to {high:.1f})"
    )


def make_parser(**kwargs: Any) -> RecipeParser:
    return RecipeParser((RewardDanceScriptArguments, RewardDanceTrainingArguments, JudgeModelConfig), **kwargs)
