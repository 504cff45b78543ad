"""Trainer of generators: reward fine-tuning of diffusers pipelines, on `transformers.Trainer`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ...import_utils import require_extra


require_extra("train", "accelerate", "datasets")
require_extra("diffusers", "diffusers", "peft")

from ...parallel import Processes, run_split  # noqa: E402
from ...rewards import AdaptedReward, as_reward  # noqa: E402
from ...trainer.common import SetEpochCallback  # noqa: E402
from ..gradient import RewardGradientCallback  # noqa: E402
from ..pipelines.models import listed  # noqa: E402
from .arguments import ReFLTrainingArguments  # noqa: E402
from .callbacks import TellCallbacks  # noqa: E402
from .card import tuned_generator_card  # noqa: E402
from .conditions import ConditionTrial, check_conditions  # noqa: E402
from .objective import choose_transform, objective, with_gradient_at_once  # noqa: E402
from .offload import Offload  # noqa: E402
from .regularizer import BaseDistance  # noqa: E402
from .rows import DrawSampler, PromptRows, collate_rows, context_of, seed_of  # noqa: E402
from .samples import SampleGridCallback  # noqa: E402
from .sampling import SamplingTrainer  # noqa: E402
from .sharding import refuse_split_judges  # noqa: E402
from .summary import record_rewards, summarize_rewards  # noqa: E402
from .weights import denoiser_names  # noqa: E402


class ReFLTrainer(SamplingTrainer):
    r"""
    Tune the denoiser of a diffusers pipeline, or its two, by the gradient of a reward (Section 3.3.1 of the
    [RewardDance paper](https://huggingface.co/papers/2509.08826)).

    Each batch of prompts is sampled by the pipeline itself, under [`RewardGradientCallback`]. The loss is minus the mean
    reward, which is the mean over its references for a prompt that has several. The reward model stays as it is and may be
    on another device than the pipeline.

    The noise of a sample follows from `seed` and the number of its draw, the drawn step from `seed` and the number of
    the update. An update of as many samples is therefore the same however it is split into processes and accumulation
    steps (up to rounding), and a resumed run makes the same updates as one that was not interrupted. Gradients are
    averaged over processes by the trainer, or by FSDP2 with `shard_denoiser`; wrappers (FSDP1, DeepSpeed) are not supported.

    After an error in an update, the state before that update is saved as a checkpoint before the error is raised.

    Logged are `reward` (mean), `reward_std`, `reward_saturated` (share within `saturation` of 0 or 1), `rewards/{name}` (mean
    of each reward), `step_index` (first step with gradient) and, with `beta`, `base_distance`, all of the latest update. A
    [`ReFLCallback`] is called after every update, also after those that `logging_steps` leaves out.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            Pipeline to tune, changed in place: its `transformer` or `unet` is trained, everything else is frozen. Of two
            denoisers (Wan 2.2), those in `args.denoisers` are trained, each by the gradient in the steps that it makes. Moved to
            the device of the run.
        reward (`Callable`, `list[Callable]` or `dict[str, Callable]`):
            Functions `reward(images, prompts, **context) -> Tensor (n,)`, e.g. a [`RewardDanceScorer`]. `images` are
            floats in `[0, 1]` of shape `(n, 3, height, width)` or `(n, frames, 3, height, width)`; `context` are those
            further columns of the rows that the function takes, see [`~rewarddance_hf.rewards.as_reward`].
        args ([`ReFLTrainingArguments`], *optional*):
            Arguments of the run. Defaults to those with `output_dir="refl_output"`.
        train_dataset (`datasets.Dataset`, `list[dict]` or `torch.utils.data.Dataset`, *optional*):
            Rows with `prompt` and what the rewards need, such as `references`; see [`PromptRows`]. The `condition` of a row
            (first frame of image-to-video, source image of an edit) is given to the pipeline as `image` too. Pipelines disagree
            about lists of images: such rows are sampled in batches where a trial at the beginning gives the samples that each row
            gives alone, and the images of a batch have one size; else, and with `shard_denoiser`, one by one.
        eval_dataset (the same, or a `dict` of them by name, *optional*):
            Held-out rows. Each is sampled from one fixed noise, without gradient.
        callbacks (`list`, *optional*):
            Callbacks beside the default ones.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and scheduler.
        peft_config (`peft.LoraConfig`, *optional*):
            Adapter to train in place of the whole denoiser. Without `target_modules`, the attention of the denoiser gets it.

    Attributes:
        last_rewards (`torch.Tensor` of shape `(samples,)`):
            Rewards of the latest update over all processes, as float32 on the CPU, before clip and transform.
        last_prompts (`list[str]`):
            Their prompts.
        last_logs (`dict[str, float]`):
            What is logged of that update.

    Raises:
        `ValueError`: If pipeline, rewards, rows and arguments do not fit together.
        `TypeError`: If one of them is of the wrong type.

    Example:

    ```python
    import torch
    from diffusers import DiffusionPipeline
    from peft import LoraConfig
    from rewarddance_hf import ReFLTrainer, ReFLTrainingArguments, RewardDanceScorer

    trainer = ReFLTrainer(
        pipeline=DiffusionPipeline.from_pretrained("stabilityai/stable-diffusion-3.5-medium", torch_dtype=torch.bfloat16),
        reward=RewardDanceScorer.from_pretrained("org/my-judge"),
        args=ReFLTrainingArguments(
            "my-generator",
            num_inference_steps=20,
            pipeline_kwargs={"height": 512, "width": 512},
            max_steps=200,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=8,
        ),
        train_dataset=references,  # rows with `prompt` and `references`
        peft_config=LoraConfig(r=32, lora_alpha=32),
    )
    trainer.train()
    trainer.save_model()
    ```
    """

    _tag_names = ["rewarddance", "refl", "reward-fine-tuning"]
    learning_rates = (5e-5, 1e-5)

    def __init__(
        self,
        pipeline: Any,
        reward: Any,
        args: ReFLTrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        args = args or ReFLTrainingArguments(output_dir="refl_output")
        self.rewards = as_reward(reward, args.reward_weights)
        refuse_split_judges(self.rewards)
        args.reward_transform = choose_transform(args.reward_transform, self.rewards)
        self.pipeline = pipeline
        self._settings = dict(args.pipeline_kwargs or {})
        for name in ("num_inference_steps", "guidance_scale"):
            if getattr(args, name) is not None:
                self._settings[name] = getattr(args, name)
        train_dataset = self._prepare_rows(train_dataset, "train_dataset")
        # Before anything is trained, as it may copy the denoiser
        denoisers = [getattr(pipeline, name) for name in denoiser_names(pipeline, args.denoisers)]
        self.base_distance = BaseDistance(denoisers, with_copy=peft_config is None) if args.beta else None
        super().__init__(
            pipeline,
            args,
            peft_config,
            data_collator=collate_rows,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
            optimizers=optimizers,
            **kwargs,
        )
        if self.base_distance is not None:
            self.base_distance.to(args.device)
        self.gradient_callback = RewardGradientCallback(
            method=args.method,
            step_index_range=_pair(args.step_index_range),
            step_ratio_range=_pair(args.step_ratio_range),
            num_gradient_steps=args.num_gradient_steps,
            vae_checkpointing=args.vae_checkpointing,
            vae_slicing=args.vae_slicing,
            vae_scale=args.vae_scale,
        )

        self.condition_trial = ConditionTrial(pipeline)
        self.offload = Offload(args.device) if args.offload else None
        if self.offload is not None:
            self.offload.take(self.rewards)

        self.last_rewards = torch.zeros(0)
        self.last_prompts: list[str] = []
        self.last_logs: dict[str, float] = {}
        self.output_fields: tuple[str, ...] = ()
        self._records: list[dict[str, Any]] = []
        self._sampler: DrawSampler | None = None
        self.add_callback(SetEpochCallback(self._set_epoch))
        self.add_callback(TellCallbacks(self))
        if args.sample_steps:
            self.add_callback(self._sample_grid())

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """
        Train. See [`~transformers.Trainer.train`].

        The first rows are sampled, scored and differentiated once before anything is changed, so that a reward that
        does not fit fails at once. `resume_from_checkpoint=True` takes the newest complete checkpoint.
        """
        if self.train_dataset is None:
            raise ValueError(
                "`train_dataset` is None, but `train` needs rows with a `prompt`. Pass some to the trainer."
            )
        held_out = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        for rows in (self.train_dataset, *held_out.values()):
            if rows is not None:
                self.encode_prompts(rows.prompts(), rows[0].get("condition"))
        self._check_first_rows()
        with self.rewards.reuse():  # of references, which come again in each epoch
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, list[Any]],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        error: BaseException | None = None
        try:
            loss, record = self._loss(inputs)
        except Exception as caught:
            error = caught
        self._raise_together(error)
        self._records.append(record)
        return (loss, record) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._average_gradients()
            self._finish_update()
        return loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """
        Measure the rewards of held-out prompts, each sampled from one fixed noise.

        Returns:
            `dict[str, float]`: `eval_reward`, `eval_reward_std`, `eval_reward_saturated` and `eval_rewards/{name}`.
        """
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(rows, dict):
            parts = [self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}") for name, part in rows.items()]
            return {key: value for part in parts for key, value in part.items()}
        rows = self._prepare_rows(rows, "eval_dataset")
        if rows is None:
            raise ValueError("`eval_dataset` is None, but `evaluate` needs rows with a `prompt`. Pass some.")

        def work(indices: Sequence[int]) -> list[dict[str, Any]]:
            records = []
            for start in range(0, len(indices), self.args.eval_batch_size):
                part = indices[start : start + self.args.eval_batch_size]
                columns = collate_rows([rows[index] for index in part])
                prompts, seeds = columns["prompt"], [seed_of(self.args.seed, "eval", index) for index in part]
                images = self.sample(prompts, seeds, "pt", columns.get("condition"))
                with self.judges_on_device(self.rewards), torch.no_grad():
                    values = self.rewards.by_name(images.float(), prompts, **context_of(columns))
                for i, prompt in enumerate(prompts):
                    records.append(
                        record_rewards([prompt], {name: value[i : i + 1] for name, value in values.items()})
                    )
            return records

        metrics = summarize_rewards(self.work_on_rows(work, len(rows)), self.args.saturation)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def work_on_rows(self, work: Callable[[Sequence[int]], Sequence[Any]], num_rows: int) -> list[Any]:
        """
        Results of all rows on every process, see [`~rewarddance_hf.parallel.run_split`]. Processes that share a denoiser call it at
        the same times, and work on all rows.
        """
        return list(work(range(num_rows))) if self.args.shard_denoiser else run_split(work, num_rows)

    @contextmanager
    def judges_on_device(self, reward: AdaptedReward) -> Iterator[None]:
        """Judges are where they can be asked within the block. With `offload`, they are on the CPU before and after it."""
        with nullcontext() if self.offload is None else self.offload.in_use(reward):
            yield

    # What one batch costs and gives

    def _loss(self, columns: dict[str, list[Any]]) -> tuple[torch.Tensor, dict[str, Any]]:
        """Loss of a batch, and what is logged of it."""
        prompts = columns["prompt"]
        seeds = [seed_of(self.args.seed, "latents", number) for number in columns["draw"]]
        distance = self.base_distance.measured() if self.base_distance is not None else nullcontext()
        with self.gradient_callback.attach(self.pipeline), distance:
            images = self._generate(prompts, seeds, columns.get("condition"), "pt")
        values: dict[str, torch.Tensor] = {}

        def loss_of(images: torch.Tensor) -> torch.Tensor:
            values.update(self.rewards.by_name(images.float(), prompts, **context_of(columns)))
            return -objective(values["reward"], self.args).mean()

        with self.judges_on_device(self.rewards):
            scaler = self.accelerator.scaler
            loss = with_gradient_at_once(loss_of, images, 1.0 if scaler is None else scaler.get_scale())
        record = record_rewards(prompts, values)
        if self.base_distance is not None:
            base_distance = self.base_distance.mean()
            loss = loss + self.args.beta * base_distance
            record["base_distance"] = base_distance.item()
        return loss, record

    def _finish_update(self) -> None:
        """Gather what is known of the samples of an update."""
        records = Processes.current().gather(self._records)
        self._records = []
        self.last_prompts = [prompt for record in records for prompt in record["prompts"]]
        self.last_rewards = torch.tensor([value for record in records for value in record["rewards"]["reward"]])
        self.last_logs = summarize_rewards(records, self.args.saturation)
        self.last_logs["step_index"] = float(self.gradient_callback.last_step or 0)

    def _training_logs(self) -> dict[str, float]:
        return self.last_logs

    def _card(self, model_name: str) -> str:
        return tuned_generator_card(self, model_name, self._tag_names)

    # Errors

    def _check_first_rows(self) -> None:
        """Sample, score and differentiate the first rows, without any effect on the run."""
        count = min(self.args.train_batch_size, 2)
        rows = [self.train_dataset[(index % len(self.train_dataset), index)] for index in range(count)]
        with torch.random.fork_rng(devices=[self.args.device] if self.args.device.type == "cuda" else []):
            was_training = self.model.training
            self.model.train()
            loss = self.compute_loss(self.model, self._prepare_inputs(collate_rows(rows)))
            self._records = []
            error = None
            if loss.requires_grad:  # in the same mode, as checkpointing computes layers with dropout again
                reached = self._reaches_weights(loss)
            self.model.train(was_training)
            idle = [name for name in self.denoiser_names if self.gradient_callback.steps_of.get(name) == []]
            if idle:
                error = ValueError(
                    f"{listed(idle)} is to be tuned, but makes none of the steps with gradient (steps by denoiser: "
                    f"{self.gradient_callback.steps_of}). Widen the range of steps, leave it out, or name the other one in "
                    "`denoisers`."
                )
            elif not loss.requires_grad or not reached:
                error = ValueError(
                    f"No gradient of the reward reaches {listed(self.denoiser_names)} on the first rows. The reward may be "
                    "constant there, all pixels may be clamped to 0 or 1, or `reward_clip` may be too low."
                )
        self._raise_together(error)

    def _reaches_weights(self, loss: torch.Tensor) -> bool:
        """Whether a weight gets a gradient that is not zero. Those of a denoiser that is split come by hooks."""
        if self.args.shard_denoiser:
            loss.backward()
            local = [parameter.grad.to_local() for parameter in self.trained_parameters if parameter.grad is not None]
            self.model.zero_grad()
            return any(Processes.current().gather([any(bool(gradient.any()) for gradient in local)]))
        gradients = torch.autograd.grad(loss, self.trained_parameters, allow_unused=True)
        return any(gradient is not None and bool(gradient.any()) for gradient in gradients)

    # Data and callbacks

    def _prepare_rows(self, dataset: Any, name: str) -> PromptRows | None:
        if dataset is None or isinstance(dataset, PromptRows):
            return dataset
        rows = PromptRows(dataset, name, needs_references=self.rewards.is_pairwise)
        if rows.has_conditions:
            check_conditions(self.pipeline, name, self._settings)
        return rows

    def _get_train_sampler(self, train_dataset: Any = None) -> DrawSampler:
        rows = self.train_dataset if train_dataset is None else train_dataset
        batch_size = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        self._sampler = DrawSampler(len(rows), batch_size, self.args.seed)
        return self._sampler

    def _set_epoch(self, epoch: int) -> None:
        if self._sampler is not None:
            self._sampler.epoch = epoch

    def _sample_grid(self) -> SampleGridCallback:
        prompts, conditions = self.args.sample_prompts, None
        if prompts is None and self.train_dataset is not None:
            columns = collate_rows([self.train_dataset[index] for index in range(min(8, len(self.train_dataset)))])
            prompts, conditions = columns["prompt"], columns.get("condition")
        if not prompts:
            raise ValueError(
                f"`sample_steps` is {self.args.sample_steps}, but there is no prompt to sample. Pass `sample_prompts`."
            )
        return SampleGridCallback(prompts, conditions)


def _pair(values: Any) -> tuple[Any, Any] | None:
    """Range from the command line or a YAML file."""
    if values is None:
        return None
    if len(values) != 2:
        raise ValueError(
            f"A range of steps is {list(values)}, but must have two entries: first step, step after the last."
        )
    return values[0], values[1]
