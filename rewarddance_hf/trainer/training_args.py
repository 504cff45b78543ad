"""Arguments of a training run of a judge."""

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from ..data.collator import RATIONALE_FORMATS
from ..models.configuration_rewarddance import PARADIGMS
from .common import CommonTrainingArguments, with_help


@with_help
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

        > Parameters that control the data

        resize_images (`bool`, *optional*, defaults to `False`):
            Whether to bring images to the size at which the judge sees them once, before training, and not in each epoch. See
            [`~rewarddance_hf.resize_images`]. Datasets must be of the class `datasets.Dataset`, which keeps the result on disk. Of
            several processes on a machine the first does it while the others wait: raise `ddp_timeout` where that takes long.
        dataset_num_proc (`int`, *optional*):
            Number of processes that do so.

        > Parameters that control the training

        rationale (`str`, *optional*):
            Where the row's rationale stands (chain of thought, Section 3.2.1): `"decision_first"` trains on the
            answer, then the rationale; `"reasons_first"` asks for reasons first and trains on the rationale, then the
            answer; `"mixed"` draws one of the two for each row and epoch. Rows without a rationale are asked for the
            decision only. Pairwise only. Without it rationales in the rows are not used.
        rationale_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the rationale's cross-entropy (with reasons first: and that of the phrase before the answer) beside
            that of the answer, whose weight is 1.
        answer_weight (`float`, *optional*, defaults to `0.1`):
            Weight of the answer's cross-entropy beside the Bradley-Terry loss of the pointwise paradigm.

        > Parameters with other defaults than in [`~transformers.TrainingArguments`]; see also [`CommonTrainingArguments`]

        learning_rate (`float`, *optional*):
            Initial learning rate for AdamW. Defaults to `1e-4` for an adapter, and to `1e-5` if all weights are trained.
        logging_steps (`float`, *optional*, defaults to `10`):
            Number of updates between two logs; below 1, a ratio of all updates.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    paradigm: str = field(default="pairwise", metadata={"choices": list(PARADIGMS)})
    model_init_kwargs: dict[str, Any] | str | None = None
    disable_dropout: bool = True
    resize_images: bool = False
    dataset_num_proc: int | None = None
    rationale: str | None = field(default=None, metadata={"choices": list(RATIONALE_FORMATS)})
    rationale_weight: float = 1.0
    answer_weight: float = 0.1
    logging_steps: float = 10

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
