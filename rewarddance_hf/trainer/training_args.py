"""Arguments of a training run of a judge."""

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from ..data.collator import RATIONALE_FORMATS
from ..models.configuration_rewarddance import PARADIGMS
from .common import CommonTrainingArguments


@dataclass
class RewardDanceTrainingArguments(CommonTrainingArguments):
    r"""
    Arguments of [`RewardDanceTrainer`]: what a run is told. What the checkpoint remembers is [`RewardDanceConfig`].

    Only the arguments that are specific to judges are listed. For all others see [`~transformers.TrainingArguments`].

    Parameters:
        > Parameters that control the model

        paradigm (`str`, *optional*, defaults to `"pairwise"`):
            Training variant (Section 3.2.3 of the [paper](https://huggingface.co/papers/2509.08826)): `"pairwise"`,
            `"pointwise"` or `"regressive"`.
        model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for [`RewardDanceForYesScoring.from_pretrained`], used when `model` is a string.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Whether to disable dropout in the model.

        > Parameters that control the training

        rationale (`str`, *optional*):
            Where the row's rationale stands (chain of thought, Section 3.2.1): `"decision_first"` trains on the answer,
            then the rationale; `"reasons_first"` asks for reasons first and trains on the rationale, then the answer;
            `"mixed"` draws one of both for each row and epoch. Rows without a rationale are asked for the decision only.
            Pairwise only. Without it rationales in the rows are not used.
        rationale_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the rationale's cross-entropy (with reasons first: and that of the phrase before the answer) beside
            that of the answer, whose weight is 1.
        answer_weight (`float`, *optional*, defaults to `0.1`):
            Weight of the answer's cross-entropy beside the Bradley-Terry loss of the pointwise paradigm.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `logging_steps`: Defaults to `10` instead of `500`.
    > - `gradient_checkpointing`: Defaults to `True` instead of `False`.
    > - `bf16`: Defaults to `True` on an accelerator that supports it if `fp16` is not set, instead of `False`.
    > - `learning_rate`: Defaults to `1e-5` instead of `5e-5`.
    > - `remove_unused_columns`: Defaults to `False` instead of `True`; the trainer selects the columns itself.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    # Parameters whose default values are overridden from TrainingArguments
    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate for AdamW."})
    logging_steps: float = field(
        default=10,
        metadata={
            "help": "Log every X updates steps. Should be an integer or a float in range `[0,1)`. If smaller than 1, "
            "will be interpreted as ratio of total training steps."
        },
    )

    # Parameters that control the model
    paradigm: str = field(
        default="pairwise",
        metadata={"help": "Training variant.", "choices": list(PARADIGMS)},
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments for `RewardDanceForYesScoring.from_pretrained`, used when `model` is a string."
        },
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Whether to disable dropout in the model."})

    # Parameters that control the training
    rationale: str | None = field(
        default=None,
        metadata={
            "help": "Where the row's rationale stands: after the answer ('decision_first'), before it ('reasons_first'), "
            "or one of both, drawn for each row ('mixed'). Pairwise only.",
            "choices": list(RATIONALE_FORMATS),
        },
    )
    rationale_weight: float = field(
        default=1.0, metadata={"help": "Weight of the rationale's cross-entropy beside that of the answer."}
    )
    answer_weight: float = field(
        default=0.1,
        metadata={
            "help": "Weight of the answer's cross-entropy beside the Bradley-Terry loss of the pointwise paradigm."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.paradigm not in PARADIGMS:
            raise ValueError(f"`paradigm` is {self.paradigm!r}, but must be one of {PARADIGMS}.")
        if self.rationale is not None and self.rationale not in RATIONALE_FORMATS:
            raise ValueError(f"`rationale` is {self.rationale!r}, but must be None or one of {RATIONALE_FORMATS}.")
        if self.rationale is not None and self.paradigm != "pairwise":
            raise ValueError(
                f"`rationale` is {self.rationale!r}, but the {self.paradigm} paradigm has no rationales. Set "
                "`paradigm='pairwise'`, or leave `rationale` out."
            )
