"""Arguments that the scripts share."""

from dataclasses import dataclass, field

from trl import ModelConfig, ScriptArguments


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


@dataclass
class PipelineModelConfig(ModelConfig):
    """Pipeline that is tuned."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Diffusers pipeline to tune: repository ID or folder.", "aliases": ["--pipeline"]},
    )


@dataclass
class DataArguments(ScriptArguments):
    """Dataset of a run."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset: repository ID or folder.", "aliases": ["--data"]}
    )
