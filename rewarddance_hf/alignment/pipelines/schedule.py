"""How many steps of its schedule a pipeline makes: not the first ones with `strength`, nor the last noise level (Sana Sprint)."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .hooks import Hooks, argument_of
from .models import DENOISERS


@dataclass(frozen=True)
class Schedule:
    """A schedule as a pipeline has set it up for a call."""

    scheduler: Any
    num_steps: int  # that the pipeline makes


def steps_announced(
    pipeline: Any, scheduler: Any, progress_bar: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> int:
    """Number of steps that a pipeline is about to make, as it calls its `progress_bar`."""
    iterable, total = (argument_of(progress_bar, args, kwargs, name) for name in ("iterable", "total"))
    if isinstance(iterable, torch.Tensor):  # its timesteps; Marigold has a bar of its batches too
        return len(iterable)
    known = steps_known(pipeline, scheduler)
    asked = getattr(scheduler, "num_inference_steps", None)
    if getattr(pipeline, "_num_timesteps", None) or total is None or asked is None:
        return known
    return known - max(asked - total, 0) * getattr(scheduler, "order", 1)


def steps_known(pipeline: Any, scheduler: Any) -> int:
    """Number of steps that a pipeline makes, as far as it tells after it has set up its schedule."""
    # Pipelines set `_num_timesteps` if they may leave out some of the schedule.
    return getattr(pipeline, "_num_timesteps", None) or len(scheduler.timesteps)


def probe(pipeline: Any, call: Callable[[], Any]) -> Schedule:
    """Schedule of a call of a pipeline, which ends where the denoising would begin."""
    found: list[Any] = []

    def keep(scheduler: Any, set_timesteps: Callable[..., Any], /, *args: Any, **kwargs: Any) -> None:
        set_timesteps(*args, **kwargs)
        found.append(scheduler)  # the pipeline's own, or a copy that it made

    def stop(owner: Any, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if not found:  # a bar around it all
            return method(*args, **kwargs)
        in_bar = owner is pipeline
        known = (
            steps_announced(pipeline, found[0], method, args, kwargs) if in_bar else steps_known(pipeline, found[0])
        )
        raise _ProbedError(Schedule(copy.copy(found[0]), known))

    def denoise(*_: Any) -> None:
        if found:  # a pipeline that has no bar (AnyFlow), or does more before it (GLM-Image)
            raise _ProbedError(Schedule(copy.copy(found[0]), steps_known(pipeline, found[0])))

    try:
        with Hooks(pipeline) as hooks:
            hooks.wrap(pipeline.scheduler, set_timesteps=keep, step=stop)
            hooks.wrap(pipeline, progress_bar=stop)
            for name in DENOISERS:
                if isinstance(getattr(pipeline, name, None), torch.nn.Module):
                    hooks.callback(getattr(pipeline, name).register_forward_pre_hook(denoise, prepend=True).remove)
            call()
    except _ProbedError as probed:
        pipeline.maybe_free_model_hooks()
        return probed.args[0]
    raise ValueError(
        f"`{type(pipeline).__name__}` did not call `scheduler.set_timesteps` and `scheduler.step`, but the search needs to know "
        "its schedule. Use another pipeline."
    )


class _ProbedError(Exception):
    """The schedule is known."""
