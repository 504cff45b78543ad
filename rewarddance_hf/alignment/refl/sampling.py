"""Samples of the pipeline that is tuned: from noise of their own, with prompts that may be encoded already."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from ...import_utils import require_extra


require_extra("train", "accelerate")
require_extra("diffusers", "diffusers")

from accelerate.utils import AutocastKwargs  # noqa: E402

from ..gradient import RewardGradientCallback  # noqa: E402
from ..pipelines.output import scaled  # noqa: E402
from ..pipelines.prompts import differs_in_batches  # noqa: E402
from .arguments import ReFLTrainingArguments  # noqa: E402
from .base_trainer import DenoiserTrainer  # noqa: E402
from .conditions import ConditionTrial, fit_together, load_conditions  # noqa: E402
from .drawing import check_range, draw  # noqa: E402
from .rows import seed_of  # noqa: E402


class SamplingTrainer(DenoiserTrainer):
    """Trainer that samples from its pipeline, with its own settings of the call."""

    args: ReFLTrainingArguments
    model: nn.Module
    gradient_callback: RewardGradientCallback
    output_fields: tuple[str, ...]
    condition_trial: ConditionTrial
    _settings: dict[str, Any]

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], condition: Any = None) -> None:
        """
        Encode prompts once and for all, those of the rows beside others that will be sampled. Without `precompute_prompts`
        no more is done than to find out, if there is a condition, whether the pipeline takes several at once.

        Args:
            prompts (`list[str]`):
                Prompts.
            condition (*optional*):
                Image that the pipeline is given, if it needs one; any will do.
        """
        if condition is not None:
            self._try_conditions(prompts, condition)
        if self.encoded_prompts is None or not self.encoded_prompts.keeps:
            return
        conditions = None if condition is None else load_conditions([condition])
        is_alone = self._are_alone(conditions, self._settings, prompts)
        batch_size = 1 if is_alone else max(self.args.train_batch_size, self.args.eval_batch_size)

        def conditions_of(batch: Sequence[str]) -> Any:
            return None if condition is None else [condition] * len(batch)

        with self._without_trace():
            self.encoded_prompts.fill(
                prompts,
                lambda batch: self._generate(batch, [0] * len(batch), conditions_of(batch), "pt"),
                batch_size,
                show_progress=not self.args.disable_tqdm and self.is_local_process_zero(),
            )

    @torch.no_grad()
    def _try_conditions(self, prompts: Sequence[str], condition: Any) -> None:
        """
        Find out whether the pipeline takes several conditions at once, unless it is known or of no use. Before it is, rows with a
        condition are sampled one by one.
        """
        is_single = max(self.args.train_batch_size, self.args.eval_batch_size) == 1
        if is_single or self.args.shard_denoiser or differs_in_batches(self.pipeline, self._settings, prompts):
            return  # processes that share a denoiser call it equally often
        two = [prompts[0], prompts[-1]]

        def draw_some(indices: Sequence[int], conditions: Any) -> torch.Tensor:
            some = [two[index] for index in indices]
            return self._draw(some, list(indices), conditions, {**self._settings, "output_type": "pt"}).float()

        was_training = self.model.training
        with self._without_trace():
            self.model.eval()
            try:
                self.condition_trial.run(condition, draw_some)
            finally:
                self.model.train(was_training)

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int] | None = None,
        output_type: str = "pil",
        conditions: Sequence[Any] | None = None,
        **pipeline_kwargs: Any,
    ) -> Any:
        """
        Generate from the current weights, or from their average with `use_ema`.

        Args:
            prompts (`list[str]`):
                Prompts.
            seeds (`list[int]`, *optional*):
                Seed of the noise of each. Defaults to fixed ones, so that samples can be compared over time.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, or `"pt"` for a tensor.
            conditions (`list`, *optional*):
                Image that the pipeline is given for each, or None.
            pipeline_kwargs:
                Arguments of the pipeline in place of those of `args`.

        Returns:
            `list[PIL.Image.Image]`, a `list` of those for each clip, or a `torch.Tensor`.
        """
        if seeds is None:
            seeds = [seed_of(self.args.seed, "sample", index) for index in range(len(prompts))]
        if len(seeds) != len(prompts):
            raise ValueError(
                f"`seeds` has {len(seeds)} entries, but there are {len(prompts)} prompts. Give one for each."
            )
        self.encode_prompts(prompts, None if conditions is None else conditions[0])
        was_training, size = self.model.training, self.args.eval_batch_size
        batches = []
        with self._averaged_weights():
            self.model.eval()
            try:
                for start in range(0, len(prompts), size):
                    part = slice(start, start + size)
                    some = None if conditions is None else conditions[part]
                    batches.append(self._generate(prompts[part], seeds[part], some, output_type, **pipeline_kwargs))
            finally:
                self.model.train(was_training)
        return self._together(batches, output_type)

    def _generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        conditions: Sequence[Any] | None,
        output_type: str,
        **pipeline_kwargs: Any,
    ) -> Any:
        """Samples of the pipeline, each from its own noise."""
        arguments = {**self._settings, **pipeline_kwargs, "output_type": output_type}
        if conditions is not None:
            conditions = load_conditions(conditions)
        size = 1 if self._are_alone(conditions, arguments, prompts) else len(prompts)
        batches = []
        for start in range(0, len(prompts), size):
            part = slice(start, start + size)
            some = None if conditions is None else conditions[part]
            batches.append(self._draw(prompts[part], seeds[part], some, arguments))
        return self._together(batches, output_type)

    def _draw(
        self, prompts: Sequence[str], seeds: Sequence[int], conditions: Any, arguments: Mapping[str, Any]
    ) -> Any:
        """Samples of one call of the pipeline."""
        # All samples of an update share the step that is drawn.
        self.gradient_callback.generator.manual_seed(seed_of(self.args.seed, "step", self.state.global_step))
        encoded = self.encoded_prompts.in_use() if self.encoded_prompts is not None else nullcontext()
        # Casts of trained weights, cached in steps without gradient, would be used again in those that need it.
        with self.accelerator.autocast(AutocastKwargs(cache_enabled=False)), encoded:
            output = draw(self.pipeline, prompts, seeds, conditions, **arguments)
        self.output_fields = tuple(output)
        samples = output[0]
        if arguments["output_type"] == "pt":
            samples = scaled(self.pipeline, samples)
            check_range(self.pipeline, samples)
        return samples

    def _are_alone(
        self, conditions: Sequence[Any] | None, arguments: Mapping[str, Any], prompts: Sequence[str]
    ) -> bool:
        """Whether each sample needs a call of the pipeline of its own."""
        if conditions is not None and not (self.condition_trial.holds and fit_together(conditions)):
            return True
        return differs_in_batches(self.pipeline, arguments, prompts)

    def _without_trace(self) -> Any:
        """Leave the state of random numbers alone."""
        return torch.random.fork_rng(devices=[self.args.device] if self.args.device.type == "cuda" else [])

    def _together(self, batches: list[Any], output_type: str) -> Any:
        if output_type != "pt":
            return [sample for batch in batches for sample in batch]
        sizes = sorted({tuple(batch.shape[1:]) for batch in batches})
        if len(sizes) > 1:
            raise ValueError(
                f"`{type(self.pipeline).__name__}` made samples of the shapes {sizes}, as it takes the size of each from its "
                "`condition`, but rewards get those of a batch as one tensor. Set `height` and `width` in `pipeline_kwargs`, or "
                "`per_device_train_batch_size` and `per_device_eval_batch_size` to 1."
            )
        return torch.cat(batches)
