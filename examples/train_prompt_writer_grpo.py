# /// script
# dependencies = [
#     "rewarddance_hf[scripts,diffusers,serve]",
# ]
# ///
"""
Train a language model that rewrites prompts for a generator, with GRPO of TRL: what it writes is drawn, and a judge rewards the
image for the prompt that was asked for. No gradient passes through generator or judge, so that the judge may be a server.

    rewarddance serve --model org/my-judge &
    python examples/train_prompt_writer_grpo.py --model_name_or_path Qwen/Qwen3-0.6B --pipeline stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --judge http://127.0.0.1:8000 --dataset_name me/my-prompts --output_dir outputs/prompt_writer --num_generations 4

Rows have a `prompt`. A pairwise judge compares the images of the same prompt with each other: a group of GRPO is its
own reference. `--judge` is a folder or repository, too. The same reward function serves trainers of generators that take TRL's
form, where completions are images: `GRPOReward("http://judge:8000")`.

Run by us at tiny size on a CPU only.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import datasets
import torch
from trl import GRPOConfig, GRPOTrainer, ModelConfig, ScriptArguments, TrlParser, get_peft_config

from rewarddance_hf import GRPOReward, RewardDanceScorer
from rewarddance_hf.rewards import is_address


INSTRUCTION = "Rewrite this prompt for an image generator. Answer with the new prompt only: {prompt}"


@dataclass
class WriterArguments(ScriptArguments):
    """Arguments of the script. `dataset_name` is a Hub repository or a folder of `save_to_disk`, with a column `prompt`."""

    judge: str | None = field(default=None, metadata={"help": "Judge: address of a server, repository ID or folder."})
    pipeline: str | None = field(
        default=None, metadata={"help": "diffusers pipeline, or 'shapes' for the tiny generator."}
    )
    num_inference_steps: int = field(default=28, metadata={"help": "Denoising steps of each image."})
    seed_of_images: int = field(default=0, metadata={"help": "Seed of the noise, the same for all images of a group."})


def load_pipeline(name: str) -> Any:
    if name == "shapes":
        from rewarddance_hf.shapes.generator import load_generator

        return load_generator()
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(name).to("cuda" if torch.cuda.is_available() else "cpu")


def make_reward(args: WriterArguments, pipeline: Any) -> Callable[..., list[float]]:
    """The reward function: draws what was written, and asks the judge about it by the prompt that was asked for."""
    pipeline.set_progress_bar_config(disable=True)

    def draw(prompts: list[str]) -> list[Any]:
        noise = [torch.Generator().manual_seed(args.seed_of_images) for _ in prompts]
        return pipeline(prompt=prompts, generator=noise, num_inference_steps=args.num_inference_steps).images

    judge = args.judge if is_address(args.judge) else RewardDanceScorer.from_pretrained(args.judge)
    judged = GRPOReward(judge, render=draw)

    def rewarddance(prompts: list[Any], completions: list[Any], asked: list[str], **columns: Any) -> list[float]:
        return judged(asked, completions, **columns)

    return rewarddance


def with_instruction(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": INSTRUCTION.format(prompt=row["prompt"])}], "asked": row["prompt"]}


def main(script_args: WriterArguments, training_args: GRPOConfig, model_args: ModelConfig) -> None:
    for name in ("judge", "pipeline", "dataset_name"):
        if getattr(script_args, name) is None:
            raise ValueError(f"`{name}` is missing. Pass `--{name}`.")
    if os.path.isdir(script_args.dataset_name):
        rows = datasets.load_from_disk(script_args.dataset_name)
    else:
        rows = datasets.load_dataset(script_args.dataset_name, split=script_args.dataset_train_split)
    trainer = GRPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=[make_reward(script_args, load_pipeline(script_args.pipeline))],
        args=training_args,
        train_dataset=rows.select_columns(["prompt"]).map(with_instruction),
        peft_config=get_peft_config(model_args),
    )
    trainer.train()
    trainer.save_model(training_args.output_dir)


def make_parser() -> TrlParser:
    return TrlParser((WriterArguments, GRPOConfig, ModelConfig))


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
