"""Samples of the pipeline that is tuned: from noise of their own, with prompts that may be encoded already."""

from collections.abc import Sequence
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
from .base_trainer import DenoiserTrainer  # noqa: E402
from .drawing import check_range, draw  # noqa: E402
from .rows import seed_of  # noqa: E402


class SamplingTrainer(DenoiserTrainer):
    """Trainer that samples from its pipeline, with its own settings of the call."""

    model: nn.Module
    gradient_callback: RewardGradientCallback
    output_fields: tuple[str, ...]
    _settings: dict[str, Any]

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], condition: Any = None) -> None:
        """
        Encode prompts once and for all, those of the rows beside others that will be sampled. Without `precompute_prompts`
        nothing is done.

        Args:
            prompts (`list[str]`):
                Prompts.
            condition (*optional*):
                Image that the pipeline is given, if it needs one; any will do.
        """
        if self.encoded_prompts is None or not self.encoded_prompts.keeps:
            return
        conditions = None if condition is None else [condition]
        is_alone = condition is not None or differs_in_batches(self.pipeline, self._settings, prompts)
        batch_size = 1 if is_alone else max(self.args.train_batch_size, self.args.eval_batch_size)
        with torch.random.fork_rng(devices=[self.args.device] if self.args.device.type == "cuda" else []):
            self.encoded_prompts.fill(
                prompts,
                lambda batch: self._generate(batch, [0] * len(batch), conditions, "pt"),
                batch_size,
                show_progress=not self.args.disable_tqdm and self.is_local_process_zero(),
            )

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
        size = 1 if conditions is not None or differs_in_batches(self.pipeline, arguments, prompts) else len(prompts)
        batches = []
        encoded = self.encoded_prompts.in_use() if self.encoded_prompts is not None else nullcontext()
        # Casts of trained weights, cached in steps without gradient, would be used again in those that need it.
        with self.accelerator.autocast(AutocastKwargs(cache_enabled=False)), encoded:
            for start in range(0, len(prompts), size):
                # All samples of an update share the step that is drawn.
                self.gradient_callback.generator.manual_seed(seed_of(self.args.seed, "step", self.state.global_step))
                condition = None if conditions is None else conditions[start]
                part = slice(start, start + size)
                output = draw(self.pipeline, prompts[part], seeds[part], condition, **arguments)
                self.output_fields = tuple(output)
                samples = output[0]
                if output_type == "pt":
                    samples = scaled(self.pipeline, samples)
                    check_range(self.pipeline, samples)
                batches.append(samples)
        return self._together(batches, output_type)

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
