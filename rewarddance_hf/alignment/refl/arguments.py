"""Arguments of a run that tunes a generator by the gradient of a reward."""

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from ...trainer.common import CommonTrainingArguments, with_help
from ...trainer.sharding import engines_asked_for


REWARD_TRANSFORMS = ("auto", "none", "log", "log_odds")


@with_help
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
        precompute_prompts (`bool`, *optional*, defaults to `False`):
            Whether to encode all prompts once, before the first update, and to keep the text encoders on the CPU, from
            where they come back for a prompt that was not among the rows. Samples and updates stay the same. What each process
            keeps on the CPU grows with the number of prompts: in bfloat16 2 MB each for FLUX with `max_sequence_length=256`,
            2.7 MB for Stable Diffusion 3.5, 4 MB for Wan. Nothing is saved: a resumed run encodes them again. The text
            encoders are still on the CPU when the run has ended.
        offload (`bool`, *optional*, defaults to `False`):
            Whether text encoders and judges are on the CPU while they are not in use: the encoders, unless they have left for
            good with `precompute_prompts`, come for each batch of prompts, and judges for each batch of samples. Judges have
            left again when the backward pass goes through VAE and denoiser, which stay where they are. Updates stay the same. It
            costs the time of moving them. Judges on other devices are left alone.

        > Parameters that control the gradient, see [`RewardGradientCallback`]

        method (`str`, *optional*, defaults to `"refl"`):
            `"refl"` for gradient in one late step drawn at random (Section 3.3.1 of the
            [RewardDance paper](https://huggingface.co/papers/2509.08826)), `"draft"` for gradient in the last
            `num_gradient_steps` steps. All samples of an update share the drawn step.
        denoisers (`list[str]`, *optional*):
            Names of the denoisers to tune of a pipeline with two (Wan 2.2: `transformer` makes the noisy steps, `transformer_2`
            the late ones). Defaults to all. Steps are drawn among those that they make.
        step_index_range (`list[int]`, *optional*):
            First step that `"refl"` may draw, and the step after the last one.
        step_ratio_range (`list[float]`, *optional*):
            The same as ratios of the number of steps. Defaults to the last quarter if neither is given, and to the last
            quarter of the steps of each if two denoisers are tuned, or the first of two.
        num_gradient_steps (`int`, *optional*, defaults to `1`):
            Number of steps with gradient of `"draft"`.
        vae_checkpointing (`bool`, *optional*, defaults to `True`):
            Whether to compute the VAE's activations again in the backward pass, so that they are not kept beside those of
            the reward.
        vae_slicing (`bool`, *optional*, defaults to `True`):
            Whether to decode images one by one.
        vae_scale (`float`, *optional*, defaults to `1.0`):
            Factor by which width and height of the latents shrink before they are decoded.

        > Parameters that control the reward

        reward_weights (`list[float]`, *optional*):
            Weight of each reward. Defaults to `1.0` for all. A reward of weight 0 is computed for the logs only and
            needs no gradient.
        reward_transform (`str`, *optional*, defaults to `"auto"`):
            What is maximised: the reward itself (`"none"`, Eq. 2), its logarithm (`"log"`) or its log-odds
            (`"log_odds"`). The last two keep a gradient where a probability is close to 0. At a probability close to 1 the
            log-odds still push: on shapes this led to reward hacking sooner. `"auto"` is `"log"` for one judge
            ([`RewardDanceScorer`]) of weight 1, else `"none"`.
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
        shard_denoiser (`bool`, *optional*, defaults to `False`):
            Whether to split the denoiser, its gradients and the optimizer over the processes of the run, layer by layer
            (FSDP2), for a generator that does not fit one GPU. Launch as for plain data parallelism. The pipeline is loaded on
            the CPU. All processes make the samples of evaluations, so that these take as long as on one. Not together with
            `use_ema`, `beta` and `restore_best`.
        sample_steps (`int`, *optional*, defaults to `0`):
            Number of updates between two grids of samples in `output_dir/samples`. 0 for none.
        sample_prompts (`list[str]`, *optional*):
            Prompts of the grids. Defaults to the first 8 of the training rows.

        > Parameters with other defaults than in [`~transformers.TrainingArguments`]; see also
        > [`~rewarddance_hf.trainer.common.CommonTrainingArguments`]

        learning_rate (`float`, *optional*):
            Initial learning rate for AdamW. Defaults to `5e-5` for an adapter, and to `1e-5` for the whole denoiser.
        logging_steps (`float`, *optional*, defaults to `1`):
            Number of updates between two logs; below 1, a ratio of all updates.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "pipeline_kwargs"]

    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    pipeline_kwargs: dict[str, Any] | str | None = None
    precompute_prompts: bool = False
    offload: bool = False
    method: str = field(default="refl", metadata={"choices": ["refl", "draft"]})
    denoisers: list[str] | None = None
    step_index_range: list[int] | None = None
    step_ratio_range: list[float] | None = None
    num_gradient_steps: int = 1
    vae_checkpointing: bool = True
    vae_slicing: bool = True
    vae_scale: float = 1.0
    reward_weights: list[float] | None = None
    reward_transform: str = field(default="auto", metadata={"choices": list(REWARD_TRANSFORMS)})
    reward_clip: float | None = None
    saturation: float = 0.01
    beta: float = 0.0
    use_ema: bool = False
    ema_decay: float = 0.99
    shard_denoiser: bool = False
    sample_steps: int = 0
    sample_prompts: list[str] | None = None
    logging_steps: float = 1

    def __post_init__(self) -> None:
        if engines := engines_asked_for(self):
            raise NotImplementedError(
                f"{engines[0]} was asked for, but the pipeline calls its denoiser outside of its wrapper. Launch with plain data "
                "parallelism, e.g. `accelerate launch --multi_gpu`, and set `shard_denoiser=True` to split the denoiser over the "
                "GPUs."
            )
        super().__post_init__()
        if self.reward_transform not in REWARD_TRANSFORMS:
            raise ValueError(
                f"`reward_transform` is {self.reward_transform!r}, but must be one of {REWARD_TRANSFORMS}."
            )
        if self.beta < 0.0:
            raise ValueError(
                f"`beta` is {self.beta}, but must be 0 or more: it weighs a distance that should be small."
            )
        if not 0.0 < self.ema_decay < 1.0:
            raise ValueError(f"`ema_decay` is {self.ema_decay}, but must be between 0 and 1, e.g. 0.99.")
        together = [name for name in ("use_ema", "beta") if getattr(self, name)]
        if self.shard_denoiser and together:
            raise ValueError(
                f"`shard_denoiser` is True, but does not go together with `{together[0]}`, which needs a second copy of the weights. "
                "Leave one of the two out."
            )
        if self.sample_steps < 0:
            raise ValueError(f"`sample_steps` is {self.sample_steps}, but must be 0 (no samples) or more.")
        reserved = {"prompt", "generator", "output_type", "num_images_per_prompt", "num_videos_per_prompt"}
        clash = sorted(reserved & set(self.pipeline_kwargs or {}))
        if clash:
            raise ValueError(
                f"`pipeline_kwargs` has {clash}, which the trainer sets itself. Leave them out; prompts come from "
                "`train_dataset`, one image each."
            )
