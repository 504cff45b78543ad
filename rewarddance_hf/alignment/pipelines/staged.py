"""
Parts of a schedule, run by an unmodified pipeline.

A search denoises to some noise level, goes on from there with the best, or goes back to more noise. Each of these stages is
one ordinary call of the pipeline, with its own prompt encoding, denoising loop, guidance and decoding. Methods are hooked
for the time of the call: `scheduler.set_timesteps`, so that the loop runs over the steps of the stage only;
`pipeline.prepare_latents`, so that it starts where the paths stand; and `scheduler.step`, to see where they end. This is one
route for all pipelines: it needs neither a step-end callback nor an argument `sigmas` or `latents`, and those of the user's
own keep their meaning.
"""

import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...import_utils import require_extra


require_extra("diffusers", "diffusers")

from diffusers import FlowMatchEulerDiscreteScheduler  # noqa: E402

from .hooks import Hooks  # noqa: E402
from .noise_levels import noise_levels, step_to_clean  # noqa: E402


DENOISERS = ("transformer", "transformer_2", "unet")
# Arguments with one entry for each prompt, beside all whose name contains "prompt"
PIXEL_ARGUMENTS = ("image", "mask_image", "control_image", "last_image")
IMAGE_ARGUMENTS = (*PIXEL_ARGUMENTS, "image_embeds", "negative_image_embeds")
# What draws the noise that `scheduler.step` takes away; the second one by pipelines that make sound beside the clip
PREPARE = ("prepare_latents", "prepare_audio_latents")
REFUSED_ARGUMENTS = {
    "generator": "the search makes a generator for each path, from `seed`",
    "latents": "the search draws the noise of each path, from `seed`",
    "num_images_per_prompt": "the search decides how many images it makes",
    "num_videos_per_prompt": "the search decides how many clips it makes",
    "return_dict": "the search reads what the pipeline returns",
}


@dataclass(frozen=True, eq=False)
class Trajectory:
    """
    One path through the noise levels.

    Args:
        prompt_index (`int`):
            Prompt that the path belongs to.
        generator (`torch.Generator`):
            Source of all random numbers of the path.
        latents (`tuple[torch.Tensor, ...]` of shapes `(1, ...)`, *optional*):
            Latents at the present noise level, in the layout of the pipeline's loop: one tensor, and a second one if the
            pipeline makes sound. None before the first step.
        initial (`tuple[torch.Tensor, ...]`, *optional*):
            Pure noise that the path began with.
        pivot (`tuple[torch.Tensor, ...]`, *optional*):
            Pure noise near which the path shall begin.
        strength (`float`, *optional*, defaults to `1.0`):
            Distance from `pivot`: share of fresh noise, from 0 to 1.
        scheduler_states (`tuple[dict, ...]`, *optional*):
            What the scheduler of each latents remembers of the earlier steps.
    """

    prompt_index: int
    generator: torch.Generator
    latents: tuple[torch.Tensor, ...] | None = None
    initial: tuple[torch.Tensor, ...] | None = None
    pivot: tuple[torch.Tensor, ...] | None = None
    strength: float = 1.0
    scheduler_states: tuple[Mapping[str, Any], ...] | None = None


class StagedPipeline:
    r"""
    Pipeline that runs any part of its schedule, for a batch of paths.

    Steps count from 0, which is pure noise. Running steps 0 to k and then k to the end gives the images of a plain call bit
    for bit; multistep schedulers get back what they remember.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            Any pipeline that draws its noise in `prepare_latents`.
        prompts (`list[str]`):
            Prompts. They are given to the pipeline unless `arguments` holds `prompt_embeds`.
        arguments (`dict`):
            Other arguments of the pipeline's call. Those whose name contains "prompt", and images such as `image`, may be
            a list or tensor with one entry for each prompt.
        batch_size (`int`):
            Largest number of paths per call of the pipeline. With an input image it is 1: pipelines may draw noise for the
            image from the first generator of a batch, so that no seed but the first would make its image again.

    Attributes:
        evaluations (`list[int]`):
            Denoiser evaluations for each prompt: one for each path and step, however many forward passes guidance takes.
        forward_passes (`list[int]`):
            Samples that went through the denoiser for each prompt, as counted by a hook on it: with classifier-free
            guidance twice the number of evaluations.

    Raises:
        `ValueError`: If an argument belongs to the search, or has another length than `prompts`.
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
        self.batch_size = 1 if any(arguments.get(name) is not None for name in PIXEL_ARGUMENTS) else batch_size
        self.arguments = {
            name: self._per_prompt(name, value) for name, value in arguments.items() if name != "output_type"
        }
        self.takes = inspect.signature(type(pipeline).__call__).parameters
        if arguments.get("prompt_embeds") is None and "prompt" in self.takes:
            self.arguments["prompt"] = (True, self.prompts)
        self.evaluations = [0] * len(self.prompts)
        self.forward_passes = [0] * len(self.prompts)

    def _per_prompt(self, name: str, value: Any) -> tuple[bool, Any]:
        """Whether an argument has one entry for each prompt, and its value."""
        about_prompts = "prompt" in name
        if about_prompts and isinstance(value, str):
            return True, [value] * len(self.prompts)
        if not (about_prompts or name in IMAGE_ARGUMENTS) or not isinstance(value, (list, tuple, torch.Tensor)):
            return False, value
        if len(value) != len(self.prompts):
            raise ValueError(
                f"`{name}` has {len(value)} entries for {len(self.prompts)} prompts, but must have one for each. Make both "
                "equally long."
            )
        return True, value

    @functools.cached_property
    def _probed_scheduler(self) -> Any:
        """Scheduler as the pipeline sets it up for this call, which ends there."""
        scheduler = self.pipeline.scheduler

        def probed(_: Any, set_timesteps: Callable[..., Any]) -> Callable[..., Any]:
            def wrapper(*args: Any, **kwargs: Any) -> None:
                set_timesteps(*args, **kwargs)
                raise _ProbedError

            return wrapper

        try:
            with Hooks(self.pipeline) as hooks:
                hooks.wrap(scheduler, set_timesteps=probed)
                self.pipeline(**self._call_arguments([0]), generator=[torch.Generator().manual_seed(0)])
        except _ProbedError:
            self.pipeline.maybe_free_model_hooks()
            return copy.copy(scheduler)
        raise ValueError(
            f"`{type(self.pipeline).__name__}` did not call `scheduler.set_timesteps`, but the search needs to know its "
            "schedule. Use another pipeline."
        )

    @property
    def num_steps(self) -> int:
        """`int`: Number of steps, which is that of denoiser evaluations of one plain image."""
        return len(self._probed_scheduler.timesteps)

    @functools.cached_property
    def noise_levels(self) -> list[tuple[float, float]]:
        """`list[tuple[float, float]]`: Shares of the clean image and of noise in the latents before each step."""
        return noise_levels(self._probed_scheduler)

    def advance(
        self, trajectories: Sequence[Trajectory], start: int, stop: int
    ) -> Iterator[tuple[list[Trajectory], torch.Tensor]]:
        """
        Run steps `start` to `stop - 1` of each path.

        Args:
            trajectories (`list[Trajectory]`):
                Paths that stand before step `start`.
            start (`int`):
                First step.
            stop (`int`):
                Step after the last one.

        Yields:
            `tuple[list[Trajectory], torch.Tensor]`: For each batch the paths before step `stop`, and images of shape `(n, 3,
            height, width)` or clips of shape `(n, num_frames, 3, height, width)` in `[0, 1]`: the clean prediction of step
            `stop - 1`, which costs no evaluation, or the finished images.

        Raises:
            `NotImplementedError`: If the pipeline cannot run a part of its schedule.
        """
        if stop - start < self.num_steps:
            self.check_parts()
        for first in range(0, len(trajectories), self.batch_size):
            yield self._run(trajectories[first : first + self.batch_size], start, stop)

    def renoise(self, trajectory: Trajectory, step: int, back_to: int, generator: torch.Generator) -> Trajectory:
        """
        Add noise to a path, so that it is distributed as paths before an earlier step are.

        Args:
            trajectory (`Trajectory`):
                Path that stands before step `step`.
            step (`int`):
                Where it stands.
            back_to (`int`):
                Step that it shall stand before.
            generator (`torch.Generator`):
                Source of the noise, and of all later random numbers of the new path.

        Returns:
            `Trajectory`: New path. A multistep scheduler begins anew in it.
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
            arguments[name] = value
        return arguments

    def check_parts(self) -> None:
        """
        Make sure that parts of the schedule can be run.

        Raises:
            `NotImplementedError`: If the scheduler's noise levels are not known, or the pipeline takes a part of the schedule
                out by itself.
        """
        self.noise_levels  # noqa: B018 (raises for unknown schedulers)
        default = self.takes["strength"].default if "strength" in self.takes else None
        strength = self.arguments.get("strength", (False, default))[1]
        if isinstance(strength, float) and strength < 1.0:
            raise NotImplementedError(
                f"`strength` is {strength}, so that `{type(self.pipeline).__name__}` leaves out the first steps of its "
                "schedule, but a search that stops in between requires all of them. Pass `strength=1.0`, or use `best_of_n` "
                "without `preview_step`."
            )

    def _run(self, trajectories: Sequence[Trajectory], start: int, stop: int) -> tuple[list[Trajectory], torch.Tensor]:
        prompt_indices = [trajectory.prompt_index for trajectory in trajectories]
        # Without a processor of its own, a pipeline may leave tensors in [-1, 1].
        has_processor = hasattr(self.pipeline, "image_processor") or hasattr(self.pipeline, "video_processor")
        with Hooks(self.pipeline) as hooks, torch.no_grad():
            stage = _Stage(self.pipeline, hooks, trajectories, start, stop, self.num_steps)
            images = self.pipeline(
                **self._call_arguments(prompt_indices),
                generator=[trajectory.generator for trajectory in trajectories],
                output_type="pt" if has_processor else "np",
            )[0]
        for index in prompt_indices:
            self.evaluations[index] += stage.num_steps_made
            self.forward_passes[index] += stage.num_passes // len(prompt_indices)
        if not has_processor:
            images = torch.from_numpy(images).movedim(-1, -3)
        elif not isinstance(images, torch.Tensor):
            images = torch.stack(list(images))
        return stage.end(), images


class _ProbedError(Exception):
    """The schedule is known."""


@dataclass
class _Stream:
    """Latents that one scheduler denoises: the pipeline's own, or a copy that it made."""

    scheduler: Any
    before: dict[str, Any]
    num_steps: int = 0
    latents: Any = None


class _Stage:
    """
    One call of a pipeline: what is changed for its time, and what it leaves.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            Pipeline that is called.
        hooks ([`Hooks`]):
            Hooks on it, for the time of the call.
        trajectories (`list[Trajectory]`):
            Paths before the call.
        start (`int`):
            First step.
        stop (`int`):
            Step after the last one.
        num_steps (`int`):
            Number of steps of the whole schedule.
    """

    def __init__(
        self, pipeline: Any, hooks: Hooks, trajectories: Sequence[Trajectory], start: int, stop: int, num_steps: int
    ) -> None:
        self.name = type(pipeline).__name__
        self.trajectories = trajectories
        self.start = start
        self.length = stop - start
        self.is_last = stop == num_steps
        self.is_part = self.length < num_steps
        self.num_passes = 0
        self.timesteps: Any = None
        self.prepared: list[torch.Tensor] = []
        self.streams: dict[int, _Stream] = {}
        hooks.wrap(pipeline, **dict.fromkeys(PREPARE, self._prepare_latents))
        hooks.wrap(
            pipeline.scheduler,
            set_timesteps=self._set_timesteps,
            scale_model_input=self._scale_model_input,
            step=self._step,
            **dict.fromkeys(("add_noise", "scale_noise"), self._noise),
        )
        for name in DENOISERS:
            if isinstance(getattr(pipeline, name, None), torch.nn.Module):
                hook = getattr(pipeline, name).register_forward_pre_hook(self._count, with_kwargs=True)
                hooks.callback(hook.remove)

    @property
    def num_steps_made(self) -> int:
        return max((stream.num_steps for stream in self.streams.values()), default=0)

    def end(self) -> list[Trajectory]:
        """Paths after the call."""
        streams = list(self.streams.values())
        if not streams:
            raise NotImplementedError(
                f"`{self.name}` did not call `scheduler.step`, but a search counts its steps. Use another pipeline."
            )
        if self.is_part and (
            len(streams) != len(self.prepared) or any(stream.num_steps != self.length for stream in streams)
        ):
            raise NotImplementedError(
                f"`{self.name}` made {[stream.num_steps for stream in streams]} of the {self.length} steps that it was told to "
                "make, but a search that stops in between requires all of them. Use `best_of_n` without `preview_step`."
            )
        ended = []
        for i, trajectory in enumerate(self.trajectories):
            changes: dict[str, Any] = {"pivot": None}
            if trajectory.latents is None:
                changes["initial"] = tuple(latents[i : i + 1] for latents in self.prepared)
            if self.is_part:
                changes["latents"] = tuple(stream.latents[i : i + 1] for stream in streams)
            if not self.is_last:
                changes["scheduler_states"] = tuple(_state(stream, i, len(self.trajectories)) for stream in streams)
            ended.append(replace(trajectory, **changes))
        return ended

    def _count(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count the samples that go through the denoiser."""
        named = [kwargs[name] for name in ("hidden_states", "sample", "x") if name in kwargs]
        self.num_passes += len([*args, *named, *kwargs.values()][0])

    def _prepare_latents(self, _: Any, prepare_latents: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            place = len(self.prepared)
            random_states = [trajectory.generator.get_state() for trajectory in self.trajectories]
            output = prepare_latents(*args, **kwargs)
            latents = output[0] if isinstance(output, tuple) else output
            if self.trajectories[0].latents is not None:
                # The noise that was just drawn is not used.
                for trajectory, state in zip(self.trajectories, random_states, strict=True):
                    trajectory.generator.set_state(state)
                latents = torch.cat([t.latents[place] for t in self.trajectories if t.latents is not None])
            elif self.trajectories[0].pivot is not None:
                pivots = torch.cat([t.pivot[place] for t in self.trajectories if t.pivot is not None])
                strength = self.trajectories[0].strength
                latents = math.sqrt(1 - strength**2) * pivots + strength * latents
            self.prepared.append(latents)
            return (latents, *output[1:]) if isinstance(output, tuple) else latents

        return wrapper

    def _set_timesteps(self, scheduler: Any, set_timesteps: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> None:
            set_timesteps(*args, **kwargs)
            if not self.is_part:
                return
            self.timesteps = scheduler.timesteps
            scheduler.timesteps = self.timesteps[self.start : self.start + self.length]
            if _is_sliced(scheduler):
                scheduler.sigmas = scheduler.sigmas[self.start :]

        return wrapper

    def _stream(self, scheduler: Any) -> _Stream:
        """The pipeline has taken its timesteps: give the scheduler the whole schedule back, at the right place."""
        if id(scheduler) in self.streams:
            return self.streams[id(scheduler)]
        place = len(self.streams)
        stream = self.streams[id(scheduler)] = _Stream(scheduler, dict(vars(scheduler)))
        if not self.is_part or _is_sliced(scheduler):
            return stream
        scheduler.timesteps = self.timesteps
        states = [t.scheduler_states[place] for t in self.trajectories if t.scheduler_states is not None]
        for name in states[0] if states else ():
            setattr(scheduler, name, _join([state[name] for state in states]))
        if self.start > 0 and hasattr(scheduler, "_step_index"):
            scheduler._step_index = self.start
        return stream

    def _scale_model_input(self, scheduler: Any, scale_model_input: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self._stream(scheduler)
            return scale_model_input(*args, **kwargs)

        return wrapper

    def _noise(self, scheduler: Any, method: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if self.is_part and id(scheduler) in self.streams:
                raise NotImplementedError(
                    f"`{self.name}` puts an image with noise into the latents after each step, as inpainting does, but a "
                    "search that stops in between would lose it. Use `best_of_n` without `preview_step`."
                )
            return method(*args, **kwargs)

        return wrapper

    def _step(self, scheduler: Any, step: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(step)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            stream = self._stream(scheduler)
            stream.num_steps += 1

            @functools.wraps(step)
            def recorded(*args: Any, **kwargs: Any) -> Any:
                output = step(*args, **kwargs)
                stream.latents = output[0]
                return output

            if self.is_last or stream.num_steps < self.length:
                output = recorded(*args, **kwargs)
            else:
                # The pipeline decodes what the last step of a stage gives it: the clean prediction.
                arguments = signature.bind(*args, **kwargs)
                return_dict = arguments.arguments.get("return_dict", True)
                clean = step_to_clean(scheduler, recorded, arguments)
                output = clean if return_dict else clean.to_tuple()
            if self.is_part:
                self._check_shape(list(self.streams).index(id(scheduler)), stream.latents)
            return output

        return wrapper

    def _check_shape(self, place: int, latents: torch.Tensor) -> None:
        prepared = self.prepared[place].shape if place < len(self.prepared) else None
        if prepared != latents.shape:
            raise NotImplementedError(
                f"`{self.name}` has latents of shape {prepared and tuple(prepared)} from `prepare_latents` and of shape "
                f"{tuple(latents.shape)} in `scheduler.step`, but a search that stops in between requires that they are the "
                "same. Use `best_of_n` without `preview_step`."
            )


def _is_sliced(scheduler: Any) -> bool:
    """Whether a stage has its own schedule from 0, as pipelines need that read `sigmas[i]` themselves (LTX2)."""
    return isinstance(scheduler, FlowMatchEulerDiscreteScheduler)


def _state(stream: _Stream, index: int, count: int) -> dict[str, Any]:
    """All that a scheduler remembers of one path of a batch. Tensors that no step has changed belong to the schedule."""
    return {
        name: _pick(value, index, count)
        for name, value in vars(stream.scheduler).items()
        if isinstance(value, (list, int, float, torch.Tensor, type(None)))
        and not (isinstance(value, torch.Tensor) and value is stream.before.get(name))
        and name not in ("timesteps", "sigmas")
    }


def _pick(value: Any, index: int, count: int) -> Any:
    """Part of a value that belongs to one path of a batch."""
    if isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == count:
        return value[index : index + 1]
    if isinstance(value, list):
        return [_pick(item, index, count) for item in value]
    return value


def _join(values: list[Any]) -> Any:
    """Values of the paths of a batch, together."""
    if isinstance(values[0], torch.Tensor) and values[0].ndim > 0:
        return torch.cat(values)
    if isinstance(values[0], list):
        return [_join([value[i] for value in values]) for i in range(len(values[0]))]
    return values[0]
