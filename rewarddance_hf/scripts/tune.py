"""Tuning of a generator by a judge, told by flags or a YAML file: the body of `rewarddance tune` and `examples/train_refl.py`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import get_peft_config

from ..alignment.refl.arguments import ReFLTrainingArguments
from ..rewards import is_address
from .arguments import PipelineModelConfig, finish, required
from .data import DataArguments, load_prompts_of
from .parser import RecipeParser


SHAPES = "shapes"


@dataclass
class ReFLScriptArguments(DataArguments):
    """Arguments of the script that belong neither to the generator nor to the run."""

    measures = False  # whether prompts are needed to measure on; set when the run begins

    judge: str | None = field(
        default=None,
        metadata={
            "help": "Judge: repository ID or folder of a RewardDance checkpoint, or of a VLM as a zero-shot judge."
        },
    )
    judge_device: str | None = field(
        default=None, metadata={"help": "Device of the judge, e.g. 'cuda:1' or 'cpu'. Defaults to that of the run."}
    )
    judge_load_in_8bit: bool = field(
        default=False, metadata={"help": "Whether to load the judge in 8 bit (needs bitsandbytes)."}
    )
    prompt_column: str = field(default="prompt", metadata={"help": "Column of the dataset that holds the prompts."})
    num_prompts: int | None = field(default=None, metadata={"help": "Number of prompts to train on. Defaults to all."})
    num_eval_prompts: int = field(
        default=100, metadata={"help": "Number of held-out prompts, used if `eval_strategy` is not 'no'."}
    )
    num_candidates: int = field(
        default=16, metadata={"help": "Number of candidates that references of a prompt are chosen from."}
    )
    num_references: int = field(default=2, metadata={"help": "Number of references of a prompt."})
    held_out_judge: str | None = field(
        default=None,
        metadata={
            "help": "Judge that is not tuned against and watches for reward hacking: repository ID or folder, or 'oracle' "
            "for the shapes world. The run ends with the weights that it finds best."
        },
    )
    held_out_prompts: int = field(
        default=160, metadata={"help": "Number of prompts of the test split that the held-out judge looks at."}
    )
    held_out_steps: int = field(
        default=25, metadata={"help": "Number of updates between two looks of the held-out judge."}
    )
    reference_method: str = field(
        default="top",
        metadata={"help": "Which candidates become references.", "choices": ["top", "bottom", "random"]},
    )


def load_pipeline(model_args: PipelineModelConfig, device: Any) -> Any:
    if model_args.model_name_or_path == SHAPES:
        from ..shapes.generator import load_generator

        return load_generator()
    from ..alignment.pipelines import loading

    return loading.load_pipeline(
        model_args.model_name_or_path, device, model_args.dtype, revision=model_args.model_revision
    )


def load_judge(name: str, script_args: ReFLScriptArguments, device: Any) -> Any:
    from ..scoring.scorer import RewardDanceScorer

    if is_address(name):  # `judge_device` and how it is loaded are matters of its server
        from ..serving.remote import RemoteReward

        return RemoteReward.at(name)
    settings = {}
    if script_args.judge_load_in_8bit:
        from transformers import BitsAndBytesConfig

        settings["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    return RewardDanceScorer.from_pretrained(name, device_map=script_args.judge_device or str(device), **settings)


def load_prompts(
    script_args: ReFLScriptArguments, split: str, count: int | None, seed: int = 0, without: Sequence[str] = ()
) -> Any:
    """Rows with each prompt once, as pairs of preferences often share one, and none of those `without`."""
    from datasets import Dataset

    if script_args.dataset_name == SHAPES:
        from ..shapes.generated import ShapesPrompts

        rows = ShapesPrompts(count or 1000, "train" if split == script_args.dataset_train_split else "id", seed)
        return Dataset.from_list([{"prompt": rows[index]["prompt"]} for index in range(len(rows))])
    if script_args.prompt_column != "prompt" and script_args.columns is None:
        script_args.columns = f"prompt={script_args.prompt_column}"
    rows = load_prompts_of(script_args, split, script_args.measures)
    if "condition" in rows.column_names:  # a prompt may come again with another image
        return rows.select(range(len(rows))[:count])
    first = {prompt: index for index, prompt in reversed(list(enumerate(rows["prompt"])))}
    others = set(without)
    kept = sorted(index for prompt, index in first.items() if prompt not in others)
    if not kept:
        raise ValueError(
            f"The split {split!r} of {script_args.dataset_name!r} has no prompt that is not in the training split too. Choose "
            "another `--dataset_test_split`."
        )
    return rows.select(kept[:count])


def add_references(
    rows: Any, pipeline: Any, judge: Any, script_args: ReFLScriptArguments, args: ReFLTrainingArguments, name: str
) -> Any:
    """Best-of-N references by the judge, from the un-tuned generator. A second call reads what the first has made."""
    if not judge.is_pairwise or "references" in rows.column_names:
        return rows
    from ..alignment.refl.references import best_of_n_references

    if args.shard_denoiser:
        raise ValueError(
            "The judge is pairwise and the rows have no `references`, but with `shard_denoiser` no process has a whole generator to "
            "make them with. Make them before, with `best_of_n_references`, and pass rows that have them, or use a pointwise judge."
        )
    settings = {**(args.pipeline_kwargs or {})}
    for key in ("num_inference_steps", "guidance_scale"):
        if getattr(args, key) is not None:
            settings[key] = getattr(args, key)
    return best_of_n_references(
        pipeline.to(args.device),
        judge,
        rows,
        num_candidates=script_args.num_candidates,
        top_k=script_args.num_references,
        method=script_args.reference_method,
        batch_size=args.per_device_eval_batch_size,
        seed=args.seed,
        output_dir=Path(args.output_dir) / "references" / name,
        show_progress=not args.disable_tqdm,
        **settings,
    )


def make_monitor(
    pipeline: Any, script_args: ReFLScriptArguments, args: ReFLTrainingArguments, trained: Sequence[str] = ()
) -> Any:
    """Callback that sees reward hacking, and undoes it at the end of the run."""
    from ..alignment.monitor.callback import RewardDynamicsCallback

    if script_args.held_out_judge == "oracle" and script_args.dataset_name != SHAPES:
        raise ValueError(
            f"`held_out_judge` is 'oracle' and `dataset_name` is {script_args.dataset_name!r}, but the oracle knows only "
            f"the prompts of {SHAPES!r}. Pass another judge."
        )
    # Where prompts are drawn, these are others than those of `eval_dataset` and of the oracle's figures.
    rows = load_prompts(script_args, script_args.dataset_test_split, script_args.held_out_prompts, 1, trained)
    if script_args.held_out_judge == "oracle":
        from ..shapes.alignment_demo import oracle_reward as held_out
    else:
        held_out = load_judge(script_args.held_out_judge, script_args, args.device)
        rows = add_references(rows, pipeline, held_out, script_args, args, "held_out")
    restore_best = not args.shard_denoiser
    return RewardDynamicsCallback(held_out, rows, eval_steps=script_args.held_out_steps, restore_best=restore_best)


def main(
    script_args: ReFLScriptArguments, training_args: ReFLTrainingArguments, model_args: PipelineModelConfig
) -> dict[str, float]:
    from ..alignment.refl.trainer import ReFLTrainer

    required(model_args, "model_name_or_path", "stabilityai/stable-diffusion-3.5-medium")
    required(script_args, "judge", "org/my-judge")
    required(script_args, "dataset_name", "me/my-prompts")
    script_args.measures = training_args.eval_strategy != "no" or script_args.held_out_judge is not None
    # Prompts are checked before anything is loaded that takes long.
    train_dataset = load_prompts(script_args, script_args.dataset_train_split, script_args.num_prompts)
    if script_args.dry_run:
        from .dry_run import show_tuning

        show_tuning(train_dataset, script_args, training_args, model_args)
        return {}
    device: Any = training_args.device
    if training_args.shard_denoiser:  # no GPU has room for all of it
        if model_args.dtype == "auto" and device.type != "cpu":
            model_args.dtype = "bfloat16"
        device = "cpu"
    pipeline = load_pipeline(model_args, device)
    judge = load_judge(script_args.judge, script_args, training_args.device)
    train_dataset = add_references(train_dataset, pipeline, judge, script_args, training_args, "train")
    eval_dataset, trained = None, train_dataset["prompt"]
    if training_args.eval_strategy != "no":
        eval_dataset = load_prompts(
            script_args, script_args.dataset_test_split, script_args.num_eval_prompts, without=trained
        )
        eval_dataset = add_references(eval_dataset, pipeline, judge, script_args, training_args, "eval")
    monitors = []
    if script_args.held_out_judge is not None:
        monitors = [make_monitor(pipeline, script_args, training_args, trained)]
    trainer = ReFLTrainer(
        pipeline=pipeline,
        reward={"judge": judge},
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        callbacks=monitors,
        peft_config=get_peft_config(model_args),
    )
    has_oracle = script_args.dataset_name == SHAPES
    before = oracle_share(trainer, script_args.num_eval_prompts) if has_oracle else None
    metrics = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint).metrics
    if has_oracle:
        metrics |= {"oracle_before": before, "oracle_after": oracle_share(trainer, script_args.num_eval_prompts)}
    trainer.accelerator.print(metrics)
    trainer.save_model()
    finish(trainer, "Generator")
    return metrics


def oracle_share(trainer: Any, num_prompts: int) -> float:
    """Share of held-out prompts of the shapes world that the oracle finds drawn right, always from the same noise."""
    from ..shapes.generated import ShapesPrompts, alignment_holds

    rows = ShapesPrompts(num_prompts, split="id")
    prompts = [rows[index]["prompt"] for index in range(num_prompts)]
    return float(alignment_holds(trainer.sample(prompts, output_type="pt"), prompts).mean())


def make_parser(**kwargs: Any) -> RecipeParser:
    return RecipeParser((ReFLScriptArguments, ReFLTrainingArguments, PipelineModelConfig), **kwargs)
