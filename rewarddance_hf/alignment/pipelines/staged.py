"""
Parts of a schedule, run by an unmodified pipeline.

A search denoises to some noise level, goes on from there with the best, or goes back to more noise. Each of these
stages is one ordinary call of the pipeline, with its own prompt encoding, denoising loop, guidance and decoding.
Methods are hooked for the time of the call: `scheduler.set_timesteps`, so that the loop runs over the steps of the
stage only; `pipeline.prepare_latents`, so that it starts where the paths stand; and `scheduler.step`, to see where
they end. This one route serves all pipelines that have these methods: it needs neither a step-end callback nor an
argument `sigmas` or `latents`, and those of the user's own keep their meaning.
"""

import functools
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import PIL.Image
import torch

from .hooks import Hooks
from .models import check_caches
from .noise_levels import noise_levels
from .output import check_count, has_processor
from .prompts import call, differs_in_batches
from .schedule import Schedule, probe
from .stage import Stage, Trajectory


# Arguments with one entry for each prompt, beside all whose name contains "prompt"
IMAGE_ARGUMENTS = ("image", "mask_image", "control_image", "last_image", "image_embeds", "negative_image_embeds")
REFUSED_ARGUMENTS = {
    "generator": "the search makes a generator for each path, from `seed`",
    "latents": "the search draws the noise of each path, from `seed`",
    "num_images_per_prompt": "the search decides how many images it makes",
    "num_videos_per_prompt": "the search decides how many clips it makes",
    "return_dict": "the search reads what the pipeline returns",
}


class StagedPipeline:
    """
    Pipeline that runs any part of its schedule, for a batch of paths. Steps count from 0, which is pure noise.

    Running steps 0 to k and then k to the end gives the images of a plain call bit for bit. Arguments whose name contains
    "prompt", and images such as `image`, may have one entry for each prompt, which is a list if a prompt has several images. With
    an input image or clip, batches have one path: pipelines may draw noise for the image from the first generator of a batch, so
    that no seed but the first would make its image again.
    """

    def __init__(
        self, pipeline: Any, prompts: Sequence[str], arguments: Mapping[str, Any], batch_size: int = 8
    ) -> None:
        for name, reason in REFUSED_ARGUMENTS.items():
            if name in arguments:
                raise ValueError(f"`{name}` was given, but {reason}. Leave it out.")
        if not hasattr(pipeline, "prepare_latents") or not hasattr(pipeline, "scheduler"):
            raise ValueError(
                f"`pipeline` is a `{type(pipeline).__name__}`, but it must have a scheduler and draw its noise in "
                "`prepare_latents`. Use a diffusers pipeline that does."
            )
        self.pipeline = pipeline
        self.prompts = list(prompts)
        self.takes = inspect.signature(type(pipeline).__call__).parameters
        is_alone = differs_in_batches(pipeline, arguments, prompts) or any(
            _is_pixels(*argument) for argument in arguments.items()
        )
        self.batch_size = 1 if is_alone else batch_size
        self.arguments = {
            name: self._per_prompt(name, value.clone() if isinstance(value, torch.Tensor) else value)
            for name, value in arguments.items()
            if name != "output_type"
        }
        if arguments.get("prompt_embeds") is None and "prompt" in self.takes:
            self.arguments["prompt"] = (True, self.prompts)
        # For each prompt: one for each path and step, and samples that went through the denoiser (twice as many with guidance)
        self.evaluations = [0] * len(self.prompts)
        self.forward_passes = [0] * len(self.prompts)

    def _per_prompt(self, name: str, value: Any) -> tuple[bool, Any]:
        """Whether an argument has one entry for each prompt, and its value."""
        about_prompts = "prompt" in name
        if about_prompts and isinstance(value, str):
            return True, [value] * len(self.prompts)
        if not (about_prompts or name in IMAGE_ARGUMENTS) or not isinstance(value, (list, tuple, torch.Tensor)):
            return False, value
        if name == self._control_argument and isinstance(value, (list, tuple)):
            return False, value
        if name in IMAGE_ARGUMENTS and len(self.prompts) == 1 and _is_pixels(name, value):
            return False, value  # of which one prompt may have several (Flux 2, Qwen-Image Edit Plus)
        if len(value) != len(self.prompts):
            raise ValueError(
                f"`{name}` has {len(value)} entries for {len(self.prompts)} prompts, but must have one for each. Make both "
                "equally long; several images of a prompt are a list."
            )
        return True, value

    @property
    def _control_argument(self) -> str | None:
        """Argument with one image for each of several ControlNets or adapters, if the pipeline has several."""
        has_several = any(
            hasattr(getattr(self.pipeline, part, None), several)
            for part, several in (("controlnet", "nets"), ("adapter", "adapters"))
        )
        if not has_several:
            return None
        return "control_image" if "control_image" in self.takes else "image"

    @functools.cached_property
    def _schedule(self) -> Schedule:
        """Schedule of this call, as the pipeline sets it up."""
        arguments = self._call_arguments([0])
        return probe(self.pipeline, lambda: call(self.pipeline, [torch.Generator().manual_seed(0)], **arguments))

    @property
    def num_steps(self) -> int:
        """Number of steps, which is that of denoiser evaluations of one plain image."""
        return self._schedule.num_steps

    @functools.cached_property
    def noise_levels(self) -> list[tuple[float, float]]:
        """Shares of the clean image and of noise in the latents before each step."""
        return noise_levels(self._schedule.scheduler)

    def check_parts(self) -> None:
        """Refuse schedules of which no part can be run."""
        check_caches(self.pipeline, "a search that stops in between")
        in_schedule = len(self._schedule.scheduler.timesteps)
        if self.num_steps != in_schedule:
            raise NotImplementedError(
                f"`{type(self.pipeline).__name__}` makes {self.num_steps} of the {in_schedule} steps of its schedule, but a search "
                "that stops in between requires all of them. Pass `strength=1.0` if it takes one, or use `best_of_n` without "
                "`preview_step`."
            )
        self.noise_levels  # noqa: B018 (raises for unknown schedulers)

    def advance(
        self, trajectories: Sequence[Trajectory], start: int, stop: int
    ) -> Iterator[tuple[list[Trajectory], torch.Tensor]]:
        """
        Run steps `start` to `stop - 1` of each path.

        Yields for each batch the paths before step `stop`, and images `(n, 3, height, width)` or clips `(n, num_frames, 3, height,
        width)` in `[0, 1]`: the finished ones, or the clean predictions of the last step, which cost no evaluation.
        """
        if stop - start < self.num_steps:
            self.check_parts()
            self._check_first_stage(start, stop)
        for first in range(0, len(trajectories), self.batch_size):
            yield self._run(trajectories[first : first + self.batch_size], start, stop)

    def _check_first_stage(self, start: int, stop: int) -> None:
        """Refuse to begin from an image with one step: only a second step shows what the pipeline did after the first."""
        images = [name for name, (_, value) in self.arguments.items() if _is_pixels(name, value)]
        if images and (start, stop) == (0, 1):
            raise NotImplementedError(
                f"`{images[0]}` was given, and `{type(self.pipeline).__name__}` may put it into the latents after each step, "
                "which a search that stops after the first would lose. Stop after two steps or more, or use `best_of_n` "
                "without `preview_step`."
            )

    def renoise(self, trajectory: Trajectory, step: int, back_to: int, generator: torch.Generator) -> Trajectory:
        """
        Add noise to a path before step `step`, so that it is distributed as paths before step `back_to` are. All later random
        numbers come from `generator`; a multistep scheduler begins anew.
        """
        if back_to == step:
            return replace(trajectory, generator=generator)
        assert trajectory.latents is not None
        (signal, noise), (new_signal, new_noise) = self.noise_levels[step], self.noise_levels[back_to]
        scale = new_signal / signal
        added = math.sqrt(max(new_noise**2 - (scale * noise) ** 2, 0.0))
        noisy = []
        for latents in trajectory.latents:
            fresh = torch.randn(latents.shape, generator=generator).to(latents.device)
            noisy.append((scale * latents.float() + added * fresh).to(latents.dtype))
        return replace(trajectory, generator=generator, latents=tuple(noisy), scheduler_states=None)

    def _call_arguments(self, prompt_indices: Sequence[int]) -> dict[str, Any]:
        arguments = {}
        for name, (is_per_prompt, value) in self.arguments.items():
            if is_per_prompt and isinstance(value, torch.Tensor):
                value = value[torch.tensor(prompt_indices, device=value.device)]
            elif is_per_prompt:
                value = [value[i] for i in prompt_indices]
                if len(value) == 1 and isinstance(value[0], (list, tuple)):  # several images of one prompt
                    value = value[0]
            arguments[name] = value
        return arguments

    def _run(self, trajectories: Sequence[Trajectory], start: int, stop: int) -> tuple[list[Trajectory], torch.Tensor]:
        prompt_indices = [trajectory.prompt_index for trajectory in trajectories]
        scales_tensors = has_processor(self.pipeline)
        with Hooks(self.pipeline) as hooks, torch.no_grad():
            stage = Stage(self.pipeline, hooks, trajectories, start, stop, self.num_steps)
            images = call(
                self.pipeline,
                [trajectory.generator for trajectory in trajectories],
                **self._call_arguments(prompt_indices),
                output_type="pt" if scales_tensors else "np",
            )[0]
        check_count(self.pipeline, images, len(prompt_indices))
        for index in prompt_indices:
            self.evaluations[index] += stage.num_steps_made
            self.forward_passes[index] += stage.num_passes // len(prompt_indices)
        if isinstance(images, np.ndarray):  # also of some pipelines that were asked for tensors
            images = torch.from_numpy(images).movedim(-1, -3)
        elif not isinstance(images, torch.Tensor):
            images = torch.stack(list(images))
        return stage.end(), images


def _is_pixels(name: str, value: Any) -> bool:
    """Whether an argument of a pipeline is an image or a clip."""
    if isinstance(value, (list, tuple)):
        return any(_is_pixels(name, item) for item in value)
    if "embeds" in name or "prompt" in name:
        return False
    return isinstance(value, (PIL.Image.Image, np.ndarray)) or (isinstance(value, torch.Tensor) and value.ndim >= 3)
