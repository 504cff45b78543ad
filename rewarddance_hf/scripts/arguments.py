"""Arguments that the scripts share."""

from dataclasses import dataclass, field
from typing import Any

from trl import ModelConfig


@dataclass
class JudgeModelConfig(ModelConfig):
    """Model that a judge is trained from."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Vision-language model or judge to train: repository ID or folder.",
            "aliases": ["--model"],
        },
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Type of the weights. Defaults to that in which they were saved under an adapter, and to float32 if all of "
            "them are trained.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    lora_r: int = field(default=32, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=64, metadata={"help": "Scale of the adapter, which is divided by its rank."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of adapted layers. Defaults to all linear layers of the language model."},
    )


@dataclass
class PipelineModelConfig(ModelConfig):
    """Pipeline that is tuned."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Diffusers pipeline to tune: repository ID or folder.", "aliases": ["--pipeline"]},
    )
    dtype: str | None = field(
        default="auto",
        metadata={
            "help": "Type of the weights. 'auto' is float32 on the CPU and bfloat16 elsewhere; what is trained is float32.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    lora_r: int = field(default=32, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapter, which is divided by its rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of the adapter."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of adapted layers. Defaults to the attention of the denoiser."},
    )


def required(arguments: Any, name: str, example: str) -> str:
    """Value of an argument; an error if it was not given."""
    value = getattr(arguments, name)
    if value is None:
        raise ValueError(f"`{name}` is None, but is needed. Pass it, e.g. `--{name} {example}`.")
    return value


def finish(trainer: Any, what: str) -> None:
    """Write the card of what a trainer has saved, push it if that is wanted, and let all processes end together."""
    trainer.create_model_card()
    trainer.accelerator.print(f"{what} saved to {trainer.args.output_dir}")
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.wait_for_everyone()  # a process that ends while others still talk to it can hang
    trainer.end()
