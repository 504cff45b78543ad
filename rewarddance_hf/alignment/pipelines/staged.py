"""
Parts of a schedule, run by an unmodified pipeline.

A search denoises to some noise level, goes on from there with the best, or goes back to more noise. Each of these stages is
one ordinary call of the pipeline, with its own prompt encoding, denoising loop, guidance and decoding. Two methods are
wrapped on their instances for the time of the call: `scheduler.set_timesteps`, so that the loop runs over the steps of the
stage only, and `pipeline.prepare_latents`, so that it starts where the paths stand. `scheduler.step` is wrapped to see where
they end. This is one route for all pipelines: it needs neither a step-end callback nor an argument `sigmas` or `latents`,
and those of the user's own keep their meaning.
"""

import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...import_utils import require_extra


require_extra("diffusers", "diffusers")

from diffusers import PNDMScheduler  # noqa: E402

from ..gradient import _replaced  # noqa: E402
from .clean_prediction import FLOW_MATCH_SCHEDULERS, step_to_clean  # noqa: E402


DENOISERS = ("transformer", "transformer_2", "unet")
# Arguments with one entry for each prompt, beside all whose name contains "prompt"
IMAGE_ARGUMENTS = ("image", "mask_image", "control_image", "last_image", "image_embeds")
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
        latents (`torch.Tensor` of shape `(1, ...)`, *optional*):
            Latents at the present noise level, in the layout of the pipeline's loop. None before the first step.
        initial (`torch.Tensor` of shape `(1, ...)`, *optional*):
            Pure noise that the path began with.
        pivot (`torch.Tensor` of shape `(1, ...)`, *optional*):
            Pure noise near which the path shall begin.
        strength (`float`, *optional*, defaults to `1.0`):
            Distance from `pivot`: share of fresh noise, from 0 to 1.
        scheduler_state (`dict`, *optional*):
            What a multistep scheduler remembers of the earlier steps.
    """

    prompt_index: int
    generator: torch.Generator
    latents: torch.Tensor | None = None
    initial: torch.Tensor | None = None
    pivot: torch.Tensor | None = None
    strength: float = 1.0
    scheduler_state: Mapping[str, Any] | None = None


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
            Largest number of paths per call of the pipeline.

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
        self.batch_size = batch_size
        self.arguments = {
            name: self._per_prompt(name, value) for name, value in arguments.items() if name != "output_type"
        }
        if arguments.get("prompt_embeds") is None:
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
        set_timesteps = scheduler.set_timesteps

        @functools.wraps(set_timesteps)
        def probe(*args: Any, **kwargs: Any) -> None:
            set_timesteps(*args, **kwargs)
            raise _ProbedError

        try:
            with _replaced(scheduler, "set_timesteps", probe):
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
            self._check_parts()
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
        latents = trajectory.latents
        assert latents is not None
        (signal, noise), (new_signal, new_noise) = self.noise_levels[step], self.noise_levels[back_to]
        scale = new_signal / signal
        added = math.sqrt(max(new_noise**2 - (scale * noise) ** 2, 0.0))
        fresh = torch.randn(latents.shape, generator=generator).to(latents.device)
        noisy = (scale * latents.float() + added * fresh).to(latents.dtype)
        return replace(trajectory, generator=generator, latents=noisy, scheduler_state=None)

    def _call_arguments(self, prompt_indices: Sequence[int]) -> dict[str, Any]:
        arguments = {}
        for name, (is_per_prompt, value) in self.arguments.items():
            if is_per_prompt and isinstance(value, torch.Tensor):
                value = value[torch.tensor(prompt_indices, device=value.device)]
            elif is_per_prompt:
                value = [value[i] for i in prompt_indices]
            arguments[name] = value
        return arguments

    def _check_parts(self) -> None:
        """Refuse pipelines that take a part of the schedule out by themselves."""
        parameter = inspect.signature(type(self.pipeline).__call__).parameters.get("strength")
        strength = None if parameter is None else self.arguments.get("strength", (False, parameter.default))[1]
        if isinstance(strength, float) and strength < 1.0:
            raise NotImplementedError(
                f"`strength` is {strength}, so that `{type(self.pipeline).__name__}` leaves out the first steps of its "
                "schedule, but a search that stops in between requires all of them. Pass `strength=1.0`, or use `best_of_n` "
                "without `preview_step`."
            )

    def _run(self, trajectories: Sequence[Trajectory], start: int, stop: int) -> tuple[list[Trajectory], torch.Tensor]:
        prompt_indices = [trajectory.prompt_index for trajectory in trajectories]
        stage = _Stage(self.pipeline, trajectories, start, stop, self.num_steps)
        with stage.run(), _counted(self.pipeline) as passes, torch.no_grad():
            images = self.pipeline(
                **self._call_arguments(prompt_indices),
                generator=[trajectory.generator for trajectory in trajectories],
                output_type="pt",
            )[0]
        for index in prompt_indices:
            self.evaluations[index] += stage.num_steps_made
            self.forward_passes[index] += passes[0] // len(prompt_indices)
        if not isinstance(images, torch.Tensor):
            images = torch.stack(list(images))
        return stage.end(), images


class _ProbedError(Exception):
    """The schedule is known."""


class _Stage:
    """
    One call of a pipeline: what is changed for its time, and what it leaves.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            Pipeline that is called.
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
        self, pipeline: Any, trajectories: Sequence[Trajectory], start: int, stop: int, num_steps: int
    ) -> None:
        self.pipeline = pipeline
        self.scheduler = pipeline.scheduler
        self.trajectories = trajectories
        self.start = start
        self.stop = stop
        self.is_last = stop == num_steps
        self.is_part = stop - start < num_steps
        self.num_steps_made = 0
        self.timesteps: Any = None
        self.initial: torch.Tensor | None = None
        self.latents: Any = None
        self.before: dict[str, Any] | None = None

    @contextmanager
    def run(self) -> Iterator[None]:
        """Change scheduler and pipeline for one call."""
        with ExitStack() as changes:
            for owner, name, wrap in (
                (self.pipeline, "prepare_latents", self._prepare_latents),
                (self.scheduler, "set_timesteps", self._set_timesteps),
                (self.scheduler, "scale_model_input", self._scale_model_input),
                (self.scheduler, "step", self._step),
            ):
                if hasattr(owner, name):
                    changes.enter_context(_replaced(owner, name, wrap(getattr(owner, name))))
            yield

    def end(self) -> list[Trajectory]:
        """Paths after the call."""
        if self.is_part and self.num_steps_made != self.stop - self.start:
            raise NotImplementedError(
                f"`{type(self.pipeline).__name__}` made {self.num_steps_made} of the {self.stop - self.start} steps that it "
                "was told to make, but a search that stops in between requires all of them. Use `best_of_n` without "
                "`preview_step`."
            )
        if self.initial is None or self.initial.shape != self.latents.shape:
            wanted = None if self.initial is None else tuple(self.initial.shape)
            raise NotImplementedError(
                f"`{type(self.pipeline).__name__}` has latents of shape {wanted} from `prepare_latents` and of shape "
                f"{tuple(self.latents.shape)} in `scheduler.step`, but a search requires that they are the same. Use another "
                "pipeline."
            )
        count = len(self.trajectories)
        states: list[Any] = [None] * count if self.is_last else _split_state(self.scheduler, self.before or {}, count)
        return [
            replace(
                trajectory,
                latents=self.latents[i : i + 1],
                initial=self.initial[i : i + 1] if trajectory.latents is None else trajectory.initial,
                pivot=None,
                scheduler_state=states[i],
            )
            for i, trajectory in enumerate(self.trajectories)
        ]

    def _prepare_latents(self, prepare_latents: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(prepare_latents)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            goes_on = self.trajectories[0].latents is not None
            random_states = [trajectory.generator.get_state() for trajectory in self.trajectories]
            output = prepare_latents(*args, **kwargs)
            fresh = output[0] if isinstance(output, tuple) else output
            latents = fresh
            if goes_on:
                # The noise that was just drawn is not used.
                for trajectory, state in zip(self.trajectories, random_states, strict=True):
                    trajectory.generator.set_state(state)
                latents = torch.cat([t.latents for t in self.trajectories if t.latents is not None])
            elif self.trajectories[0].pivot is not None:
                pivots = torch.cat([t.pivot for t in self.trajectories if t.pivot is not None])
                strength = self.trajectories[0].strength
                latents = math.sqrt(1 - strength**2) * pivots + strength * fresh
            self.initial = latents
            return (latents, *output[1:]) if isinstance(output, tuple) else latents

        return wrapper

    def _set_timesteps(self, set_timesteps: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(set_timesteps)
        def wrapper(*args: Any, **kwargs: Any) -> None:
            set_timesteps(*args, **kwargs)
            if self.is_part:
                self.timesteps = self.scheduler.timesteps
                self.scheduler.timesteps = self.timesteps[self.start : self.stop]

        return wrapper

    def _begin(self) -> None:
        """The pipeline has taken its timesteps: give the scheduler the whole schedule back, at the right place."""
        if self.before is not None:
            return
        if self.is_part:
            self.scheduler.timesteps = self.timesteps
        self.before = {
            name: list(value) if isinstance(value, list) else value for name, value in vars(self.scheduler).items()
        }
        if self.start == 0:
            return
        states = [trajectory.scheduler_state for trajectory in self.trajectories]
        if states[0] is not None:
            for name in states[0]:
                setattr(self.scheduler, name, _join([state[name] for state in states if state is not None]))
        if hasattr(self.scheduler, "_step_index"):
            self.scheduler._step_index = self.start

    def _scale_model_input(self, scale_model_input: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(scale_model_input)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self._begin()
            return scale_model_input(*args, **kwargs)

        return wrapper

    def _step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(step)

        @functools.wraps(step)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            output = step(*args, **kwargs)
            self.latents = output[0]
            return output

        @functools.wraps(step)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self._begin()
            self.num_steps_made += 1
            if self.is_last or self.num_steps_made < self.stop - self.start:
                return recorded(*args, **kwargs)
            # The pipeline decodes what the last step of a stage gives it: the clean prediction.
            arguments = signature.bind(*args, **kwargs)
            return_dict = arguments.arguments.get("return_dict", True)
            clean = step_to_clean(self.scheduler, recorded, arguments)
            return clean if return_dict else clean.to_tuple()

        return wrapper


def noise_levels(scheduler: Any) -> list[tuple[float, float]]:
    """
    Tell how much of the clean image and how much noise is in the latents before each step of a schedule.

    Args:
        scheduler ([`~diffusers.SchedulerMixin`]):
            Scheduler whose timesteps are set.

    Returns:
        `list[tuple[float, float]]`: For each step `(signal, noise)` of `latents = signal * clean + noise * standard_normal`.

    Raises:
        `NotImplementedError`: If the scheduler makes steps of higher order within several timesteps, or is of unknown kind.
    """
    name = type(scheduler).__name__
    if getattr(scheduler, "order", 1) != 1 or isinstance(scheduler, PNDMScheduler):
        raise NotImplementedError(
            f"The scheduler is a `{name}`, which makes one step of several timesteps, but a part of a schedule requires "
            "one timestep a step. Set `pipeline.scheduler` to a flow-matching Euler, DDIM, Euler, DPM++ multistep or UniPC one."
        )
    is_flow_match = isinstance(scheduler, FLOW_MATCH_SCHEDULERS)
    if is_flow_match:
        sigmas = scheduler.sigmas.tolist()[: len(scheduler.timesteps)]
        if scheduler.config.get("invert_sigmas", False):
            return [(sigma, 1 - sigma) for sigma in sigmas]
        return [(1 - sigma, sigma) for sigma in sigmas]
    if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):  # DPM-Solver(++), UniPC, DEIS, SA-Solver
        pairs = [scheduler._sigma_to_alpha_sigma_t(sigma) for sigma in scheduler.sigmas[: len(scheduler.timesteps)]]
        return [(float(alpha), float(sigma)) for alpha, sigma in pairs]
    if hasattr(scheduler, "sigmas"):  # Euler and others, whose latents are not scaled down
        return [(1.0, sigma) for sigma in scheduler.sigmas.tolist()[: len(scheduler.timesteps)]]
    if hasattr(scheduler, "alphas_cumprod"):  # DDIM, DDPM, LCM, TCD
        alphas = [float(scheduler.alphas_cumprod[int(timestep)]) for timestep in scheduler.timesteps]
        return [(alpha**0.5, (1 - alpha) ** 0.5) for alpha in alphas]
    raise NotImplementedError(
        f"The scheduler is a `{name}`, whose noise levels are not known. Set `pipeline.scheduler` to a flow-matching Euler, DDIM, "
        "Euler, DPM++ multistep or UniPC one."
    )


@contextmanager
def _counted(pipeline: Any) -> Iterator[list[int]]:
    """Count the samples that go through the denoiser."""
    count = [0]

    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        count[0] += len(args[0] if args else kwargs["hidden_states"])

    modules = [getattr(pipeline, name, None) for name in DENOISERS]
    handles = [
        module.register_forward_pre_hook(hook, with_kwargs=True)
        for module in modules
        if isinstance(module, torch.nn.Module)
    ]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()


def _split_state(scheduler: Any, before: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """What the steps of a batch have changed in a scheduler, for each of its paths."""
    changed = {
        name: value
        for name, value in vars(scheduler).items()
        if name not in ("timesteps", "sigmas") and (isinstance(value, list) or value is not before.get(name))
    }
    return [{name: _pick(value, i, count) for name, value in changed.items()} for i in range(count)]


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
