"""One stage of a search: part of the schedule, run by one call of the pipeline for a batch of paths."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from .hooks import Hooks, argument_of
from .models import DENOISERS
from .noise_levels import place_of, step_to_clean
from .output import check_count


# What draws the noise that `scheduler.step` takes away; the second one by pipelines that make sound beside the clip
PREPARE = ("prepare_latents", "prepare_audio_latents")


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One path through the noise levels: where it stands, and where its random numbers come from."""

    prompt_index: int
    generator: torch.Generator
    # Of shape `(1, ...)` in the layout of the pipeline's loop, with a second tensor if it makes sound; None before step 0
    latents: tuple[torch.Tensor, ...] | None = None
    initial: tuple[torch.Tensor, ...] | None = None  # pure noise that the path began with
    pivot: tuple[torch.Tensor, ...] | None = None  # pure noise near which the path shall begin
    strength: float = 1.0  # distance from it: share of fresh noise
    scheduler_states: tuple[Mapping[str, Any], ...] | None = None  # memory of earlier steps, for each of the latents
    # Of the generator when the path began: what is drawn before the loop, as for an input image, is the same in each stage
    random_state: torch.Tensor | None = None


@dataclass
class _Stream:
    """Latents that one scheduler denoises: the pipeline's own, or a copy that it made."""

    scheduler: Any
    before: dict[str, Any]
    num_steps: int = 0
    place: Any = None  # where the scheduler stood before the latest step
    latents: Any = None


class Stage:
    """One call of a pipeline that makes steps `start` to `stop - 1` of `num_steps`: its hooks, and what it leaves."""

    def __init__(
        self, pipeline: Any, hooks: Hooks, trajectories: Sequence[Trajectory], start: int, stop: int, num_steps: int
    ) -> None:
        self.name = type(pipeline).__name__
        self.trajectories = trajectories
        self.start = start
        self.length = stop - start
        self.is_last = stop == num_steps
        self.is_part = self.length < num_steps
        self.mixes = any(trajectory.pivot is not None for trajectory in trajectories)
        self.num_passes = 0
        self.hooks = hooks
        self.prepared: list[torch.Tensor] = []
        self.others: list[list[torch.Tensor]] = []  # what is prepared beside the latents
        self.streams: dict[int, _Stream] = {}
        self.random_states = [trajectory.generator.get_state() for trajectory in trajectories]
        for trajectory in trajectories:
            if trajectory.random_state is not None:
                trajectory.generator.set_state(trajectory.random_state)
        hooks.wrap(pipeline, **dict.fromkeys(PREPARE, self._prepare_latents))
        hooks.wrap(
            pipeline.scheduler,
            set_timesteps=self._set_timesteps,
            scale_model_input=self._scale_model_input,
            step=self._step,
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
                changes["random_state"] = self.random_states[i]
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

    def _prepare_latents(
        self, pipeline: Any, prepare_latents: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        place = len(self.prepared)
        output = prepare_latents(*args, **kwargs)
        latents = output[0] if isinstance(output, tuple) else output
        self.others.append(
            [other for other in output[1:] if isinstance(other, torch.Tensor)] if latents is not output else []
        )
        if self.trajectories[0].latents is not None:
            check_count(pipeline, latents, len(self.trajectories))
            latents = torch.cat([t.latents[place] for t in self.trajectories if t.latents is not None])
        elif self.mixes:
            check_count(pipeline, latents, len(self.trajectories))
            pairs = zip(self.trajectories, latents.split(1), strict=True)
            latents = torch.cat([_mixed(trajectory, place, fresh) for trajectory, fresh in pairs])
        self.prepared.append(latents)
        return (latents, *output[1:]) if isinstance(output, tuple) else latents

    def _set_timesteps(self, scheduler: Any, set_timesteps: Callable[..., Any], /, *args: Any, **kwargs: Any) -> None:
        set_timesteps(*args, **kwargs)
        if self.is_part:
            whole = {name: vars(scheduler)[name] for name in ("timesteps", "sigmas") if name in vars(scheduler)}
            self.hooks.set(scheduler, "_whole_schedule", whole)  # which copies have too
            scheduler.timesteps = whole["timesteps"][self.start : self.start + self.length]
            if "sigmas" in whole:
                scheduler.sigmas = whole["sigmas"][self.start :]

    @contextmanager
    def _whole_sigmas(self, scheduler: Any) -> Iterator[None]:
        """Noise levels of the whole schedule, for the scheduler alone: pipelines that read `sigmas[i]` count from 0."""
        whole = getattr(scheduler, "_whole_schedule", {})
        if "sigmas" not in whole:
            yield
            return
        of_stage, scheduler.sigmas = scheduler.sigmas, whole["sigmas"]
        try:
            yield
        finally:
            scheduler.sigmas = of_stage

    def _stream(self, scheduler: Any) -> _Stream:
        """The pipeline has taken its timesteps: give the scheduler the whole schedule back, at the right place."""
        if id(scheduler) in self.streams:
            return self.streams[id(scheduler)]
        place = len(self.streams)
        for trajectory, state in zip(self.trajectories, self.random_states, strict=True):
            if trajectory.random_state is not None and place == 0:  # the loop begins
                trajectory.generator.set_state(state)
        stream = self.streams[id(scheduler)] = _Stream(scheduler, dict(vars(scheduler)))
        if not self.is_part:
            return stream
        scheduler.timesteps = scheduler._whole_schedule["timesteps"]
        states = [t.scheduler_states[place] for t in self.trajectories if t.scheduler_states is not None]
        for name in states[0] if states else ():
            setattr(scheduler, name, _join([state[name] for state in states]))
        if self.start > 0 and hasattr(scheduler, "_step_index"):
            scheduler._step_index = self.start
        return stream

    def _scale_model_input(self, scheduler: Any, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        self._stream(scheduler)
        with self._whole_sigmas(scheduler):
            return method(*args, **kwargs)

    def _step(self, scheduler: Any, step: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        stream = self._stream(scheduler)
        with self._whole_sigmas(scheduler):
            return self._step_of(stream, step, *args, **kwargs)

    def _step_of(self, stream: _Stream, step: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        place = place_of(stream.scheduler, argument_of(step, args, kwargs, "timestep"))
        if place is not None and place == stream.place:
            self._refuse_repeated()
            return step(*args, **kwargs)
        stream.place = place
        if stream.num_steps == 0 and (self.is_part or self.mixes):
            self._check_first(
                list(self.streams).index(id(stream.scheduler)), argument_of(step, args, kwargs, "sample")
            )
        if (
            self.is_part
            and stream.num_steps
            and not torch.equal(argument_of(step, args, kwargs, "sample"), stream.latents)
        ):
            raise NotImplementedError(
                f"`{self.name}` changes the latents after each step, as inpainting does, but a search that stops in between "
                "would lose it. Use `best_of_n` without `preview_step`."
            )
        stream.num_steps += 1

        def recorded(*args: Any, **kwargs: Any) -> Any:
            output = step(*args, **kwargs)
            stream.latents = output[0]
            return output

        if self.is_last or stream.num_steps < self.length:
            output = recorded(*args, **kwargs)
        else:
            # The pipeline decodes what the last step of a stage gives it: the clean prediction.
            arguments = inspect.signature(step).bind(*args, **kwargs)
            return_dict = arguments.arguments.get("return_dict", True)
            clean = step_to_clean(stream.scheduler, recorded, arguments)
            output = clean if return_dict else clean.to_tuple()
        if self.is_part:
            self._check_shape(list(self.streams).index(id(stream.scheduler)), stream.latents)
        return output

    def _check_first(self, place: int, sample: torch.Tensor) -> None:
        """Refuse pipelines that prepare something else in the place of the latents (Marigold, those of the image)."""
        if place < len(self.prepared) and not torch.equal(sample, self.prepared[place]):
            if any(torch.equal(sample, other) for other in self.others[place]):
                raise NotImplementedError(
                    f"`{self.name}` does not denoise what `prepare_latents` gives first, but a search that stops in between or "
                    "mixes noise requires that. Use `best_of_n` without `preview_step`."
                )

    def _refuse_repeated(self) -> None:
        if self.is_part:
            raise NotImplementedError(
                f"`{self.name}` calls `scheduler.step` several times for each of its steps, but a search that stops in between "
                "requires one call for each. Use `best_of_n` without `preview_step`."
            )

    def _check_shape(self, place: int, latents: torch.Tensor) -> None:
        prepared = self.prepared[place].shape if place < len(self.prepared) else None
        if prepared != latents.shape:
            raise NotImplementedError(
                f"`{self.name}` has latents of shape {prepared and tuple(prepared)} from `prepare_latents` and of shape "
                f"{tuple(latents.shape)} in `scheduler.step`, but a search that stops in between requires that they are the "
                "same. Use `best_of_n` without `preview_step`."
            )


def _mixed(trajectory: Trajectory, place: int, fresh: torch.Tensor) -> torch.Tensor:
    """Noise that a path begins with: the fresh one, or near its pivot."""
    if trajectory.pivot is None:  # beside others, where all of its prompt were lost so far
        return fresh
    return math.sqrt(1 - trajectory.strength**2) * trajectory.pivot[place] + trajectory.strength * fresh


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
