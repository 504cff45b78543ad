"""Arguments of a run that tunes a generator by the gradient of a reward."""

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from ...trainer.common import CommonTrainingArguments


REWARD_TRANSFORMS = ("none", "log", "log_odds")


@dataclass
class ReFLTrainingArguments(CommonTrainingArguments):
    r"""
    Arguments of [`ReFLTrainer`].

    Only the arguments that are specific to reward fine-tuning are listed. For all others see
    [`~transformers.TrainingArguments`].

    Parameters:
        > Parameters that control the sampler

        num_inference_steps (`int`, *optional*):
            Number of steps of the sampler. Defaults to that of the pipeline.
        guidance_scale (`float`, *optional*):
            Guidance scale of the sampler. Defaults to that of the pipeline.
        pipeline_kwargs (`dict[str, Any]`, *optional*):
            Further arguments of the pipeline's call, e.g. `{"height": 512, "width": 512}`.

        > Parameters that control the gradient, see [`RewardGradientCallback`]

        method (`str`, *optional*, defaults to `"refl"`):
            `"refl"` for gradient in one late step drawn at random (Section 3.3.1 of the
            [RewardDance paper](https://huggingface.co/papers/2509.08826)), `"draft"` for gradient in the last
            `num_gradient_steps` steps. All samples of an update share the drawn step.
        step_index_range (`list[int]`, *optional*):
            First step that `"refl"` may draw, and the step after the last one.
        step_ratio_range (`list[float]`, *optional*):
            The same as ratios of the number of steps. Defaults to the last quarter if neither is given.
        num_gradient_steps (`int`, *optional*, defaults to `1`):
            Number of steps with gradient of `"draft"`.
        vae_checkpointing (`bool`, *optional*, defaults to `False`):
            Whether to compute the VAE's activations again in the backward pass.
        vae_slicing (`bool`, *optional*, defaults to `False`):
            Whether to decode images one by one.
        vae_scale (`float`, *optional*, defaults to `1.0`):
            Factor by which width and height of the latents shrink before they are decoded.

        > Parameters that control the reward

        reward_weights (`list[float]`, *optional*):
            Weight of each reward. Defaults to `1.0` for all. A reward of weight 0 is computed for the logs only and
            needs no gradient.
        reward_transform (`str`, *optional*, defaults to `"none"`):
            What is maximised: the reward itself (`"none"`, Eq. 2), its logarithm (`"log"`) or its log-odds
            (`"log_odds"`). The last two keep a gradient where a probability is close to 0. At a probability close to 1 the
            log-odds still push: on shapes this led to reward hacking sooner.
        reward_clip (`float`, *optional*):
            Reward above which a sample gives no gradient any more.
        saturation (`float`, *optional*, defaults to `0.01`):
            How near to 0 or 1 a reward counts as saturated in the logs, as in [`RewardDynamics`].
        beta (`float`, *optional*, defaults to `0.0`):
            Weight of the squared distance of the denoiser's output from that of the un-tuned denoiser, in the steps with
            gradient: up to a factor that depends on the noise level, the KL divergence of that step. Costs one more call
            of the denoiser, and with full tuning a second copy of its weights.

        > Parameters that control weights and samples

        use_ema (`bool`, *optional*, defaults to `False`):
            Whether to average the trained weights exponentially. Samples, evaluation and `save_model` then use the
            average; checkpoints hold both.
        ema_decay (`float`, *optional*, defaults to `0.99`):
            Largest decay of the average. It starts lower, as in [`~diffusers.training_utils.EMAModel`].
        sample_steps (`int`, *optional*, defaults to `0`):
            Number of updates between two grids of samples in `output_dir/samples`. 0 for none.
        sample_prompts (`list[str]`, *optional*):
            Prompts of the grids. Defaults to the first 8 of the training rows.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `logging_steps`: Defaults to `1` instead of `500`.
    > - `gradient_checkpointing`: Defaults to `True` instead of `False`.
    > - `bf16`: Defaults to `True` on an accelerator that supports it if `fp16` is not set, instead of `False`.
    > - `learning_rate`: Defaults to `1e-4` instead of `5e-5`.
    > - `remove_unused_columns`: Defaults to `False` instead of `True`; the trainer picks the columns itself.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "pipeline_kwargs"]

    # Parameters whose default values are overridden from TrainingArguments
    learning_rate: float = field(default=1e-4, metadata={"help": "The initial learning rate for AdamW."})
    logging_steps: float = field(
        default=1,
        metadata={
            "help": "Log every X updates steps. Should be an integer or a float in range `[0,1)`. If smaller than 1, "
            "will be interpreted as ratio of total training steps."
        },
    )

    # Parameters that control the sampler
    num_inference_steps: int | None = field(
        default=None, metadata={"help": "Number of steps of the sampler. Defaults to that of the pipeline."}
    )
    guidance_scale: float | None = field(
        default=None, metadata={"help": "Guidance scale of the sampler. Defaults to that of the pipeline."}
    )
    pipeline_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further arguments of the pipeline's call, e.g. `{height: 512}` in YAML."}
    )

    # Parameters that control the gradient
    method: str = field(
        default="refl",
        metadata={
            "help": "'refl' for gradient in one late step drawn at random, 'draft' for gradient in the last steps.",
            "choices": ["refl", "draft"],
        },
    )
    step_index_range: list[int] | None = field(
        default=None, metadata={"help": "First step that 'refl' may draw, and the step after the last one."}
    )
    step_ratio_range: list[float] | None = field(
        default=None, metadata={"help": "The same as ratios of the number of steps. Defaults to the last quarter."}
    )
    num_gradient_steps: int = field(default=1, metadata={"help": "Number of steps with gradient of 'draft'."})
    vae_checkpointing: bool = field(
        default=False, metadata={"help": "Whether to compute the VAE's activations again in the backward pass."}
    )
    vae_slicing: bool = field(default=False, metadata={"help": "Whether to decode images one by one."})
    vae_scale: float = field(
        default=1.0,
        metadata={"help": "Factor by which width and height of the latents shrink before they are decoded."},
    )

    # Parameters that control the reward
    reward_weights: list[float] | None = field(
        default=None,
        metadata={"help": "Weight of each reward. Defaults to 1 for all. A weight of 0 is for the logs only."},
    )
    reward_transform: str = field(
        default="none",
        metadata={
            "help": "What is maximised: the reward itself, its logarithm or its log-odds.",
            "choices": list(REWARD_TRANSFORMS),
        },
    )
    reward_clip: float | None = field(
        default=None, metadata={"help": "Reward above which a sample gives no gradient any more."}
    )
    saturation: float = field(
        default=0.01, metadata={"help": "How near to 0 or 1 a reward counts as saturated in the logs."}
    )
    beta: float = field(
        default=0.0,
        metadata={"help": "Weight of the squared distance of the denoiser's output from that of the un-tuned one."},
    )

    # Parameters that control weights and samples
    use_ema: bool = field(
        default=False, metadata={"help": "Whether to average the trained weights for samples and `save_model`."}
    )
    ema_decay: float = field(default=0.99, metadata={"help": "Largest decay of the average."})
    sample_steps: int = field(
        default=0, metadata={"help": "Number of updates between two grids of samples. 0 for none."}
    )
    sample_prompts: list[str] | None = field(
        default=None, metadata={"help": "Prompts of the grids. Defaults to the first 8 of the training rows."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reward_transform not in REWARD_TRANSFORMS:
            raise ValueError(
                f"`reward_transform` is {self.reward_transform!r}, but must be one of {REWARD_TRANSFORMS}."
            )
        if self.beta < 0.0:
            raise ValueError(
                f"`beta` is {self.beta}, but must be 0 or more: it weighs a distance that shall be small."
            )
        if not 0.0 < self.ema_decay < 1.0:
            raise ValueError(f"`ema_decay` is {self.ema_decay}, but must be between 0 and 1, e.g. 0.99.")
        if self.sample_steps < 0:
            raise ValueError(f"`sample_steps` is {self.sample_steps}, but must be 0 (no samples) or more.")
        reserved = {"prompt", "generator", "output_type", "num_images_per_prompt", "num_videos_per_prompt"}
        clash = sorted(reserved & set(self.pipeline_kwargs or {}))
        if clash:
            raise ValueError(
                f"`pipeline_kwargs` has {clash}, which the trainer sets itself. Leave them out; prompts come from "
                "`train_dataset`, one image each."
            )
