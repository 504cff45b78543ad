"""
What the latents of a schedule are made of: noise levels and clean predictions, for flow-matching and noise-prediction
schedulers. A new kind of scheduler is added in `_level` and `_clean`.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    PNDMScheduler,
)


FLOW_MATCH_SCHEDULERS: Any = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler)


def _flow_sign(scheduler: Any) -> int | None:
    """Which way the velocity of a flow points: -1 from the image to the noise, 1 to the image (inverted noise levels)."""
    if not isinstance(scheduler, FLOW_MATCH_SCHEDULERS):
        return None
    return 1 if scheduler.config.get("invert_sigmas", False) else -1


def _level(scheduler: Any, sigma: torch.Tensor | None, timestep: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """`(signal, noise)` of `latents = signal * clean + noise * standard_normal`, if the scheduler is of a known kind."""
    if (sign := _flow_sign(scheduler)) is not None and sigma is not None:
        return (1 - sigma, sigma) if sign < 0 else (sigma, 1 - sigma)
    if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):  # DPM-Solver(++), UniPC, DEIS, SA-Solver
        return scheduler._sigma_to_alpha_sigma_t(sigma)
    if "prediction_type" not in scheduler.config:
        return None
    if sigma is not None:  # Euler, EDM and others, whose latents are not scaled down
        return torch.ones_like(sigma), sigma
    if hasattr(scheduler, "alphas_cumprod"):  # DDIM, DDPM, PNDM, LCM, TCD
        alpha_cumprod = scheduler.alphas_cumprod[int(timestep)]
        return alpha_cumprod.sqrt(), (1 - alpha_cumprod).sqrt()
    return None


def _clean(
    scheduler: Any, sigma: torch.Tensor | None, timestep: Any, model_output: torch.Tensor, sample: torch.Tensor
) -> torch.Tensor:
    """Clean prediction from one model output, for schedulers whose step does not return it."""
    if sigma is not None:
        sigma = sigma.to(sample.device)
    if hasattr(scheduler, "precondition_outputs"):  # EDM and cosine DPM-Solver++
        return scheduler.precondition_outputs(sample, model_output, sigma)
    level = _level(scheduler, sigma, timestep)
    if level is None:
        raise NotImplementedError(
            f'The scheduler is a `{type(scheduler).__name__}`, but `method="refl"` requires one that predicts the '
            'clean sample (flow matching, or noise prediction with known noise levels). Use `method="draft"`, which '
            "works with any scheduler, or set `pipeline.scheduler` to another one."
        )
    signal, noise = (share.to(sample.device) for share in level)
    if (sign := _flow_sign(scheduler)) is not None:
        return sample + sign * noise * model_output
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        clean = (sample - noise * model_output) / signal
    elif prediction_type == "v_prediction":
        clean = signal * sample - noise * model_output
    elif prediction_type == "flow_prediction":
        clean = sample - noise * model_output
    elif prediction_type == "sample":
        clean = model_output
    else:
        raise NotImplementedError(
            f"`scheduler.config.prediction_type` is {prediction_type!r}, but `method=\"refl\"` requires 'epsilon', "
            "'v_prediction', 'flow_prediction' or 'sample'. Use `method=\"draft\"`."
        )
    if scheduler.config.get("thresholding", False) and hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
        clean = scheduler._threshold_sample(clean)
    return clean


def noise_levels(scheduler: Any) -> list[tuple[float, float]]:
    """`(signal, noise)` of `latents = signal * clean + noise * standard_normal` before each step of a schedule that is set."""
    wanted = "Set `pipeline.scheduler` to a flow-matching Euler, DDIM, Euler, DPM++ multistep or UniPC one."
    name = type(scheduler).__name__
    if getattr(scheduler, "order", 1) != 1 or isinstance(scheduler, PNDMScheduler):
        raise NotImplementedError(
            f"The scheduler is a `{name}`, which makes one step of several timesteps, but a part of a schedule requires "
            f"one timestep a step. {wanted}"
        )
    levels = []
    for index, timestep in enumerate(scheduler.timesteps):
        sigma = (
            torch.tensor(float(scheduler.sigmas[index]), dtype=torch.float64) if hasattr(scheduler, "sigmas") else None
        )
        level = _level(scheduler, sigma, timestep)
        if level is None:
            raise NotImplementedError(f"The scheduler is a `{name}`, whose noise levels are not known. {wanted}")
        levels.append((float(level[0]), float(level[1])))
    return levels


def place_of(scheduler: Any, timestep: Any) -> tuple[int, float] | None:
    """
    Where a scheduler stands before a step, if it knows. The first Cosmos pipelines make each step twice, once for its clean
    prediction, and set the scheduler back in between: both times it stands at the same place.
    """
    if not hasattr(scheduler, "_step_index") or torch.as_tensor(timestep).numel() != 1:
        return None
    return scheduler._step_index or 0, float(timestep)


def step_to_clean(scheduler: Any, step: Callable[..., Any], arguments: inspect.BoundArguments) -> Any:
    """
    Make a step of a scheduler, with the clean prediction as `prev_sample` of its output. It is the scheduler's own where its
    step returns one, so that `clip_sample` and `thresholding` hold, and else follows from the noise level.
    """
    arguments.arguments["return_dict"] = True
    inputs = arguments.arguments
    timestep, sigma = inputs["timestep"], None
    if hasattr(scheduler, "sigmas") and hasattr(scheduler, "_init_step_index"):
        if scheduler.step_index is None:  # a step moves the scheduler on, so the level is read before
            scheduler._init_step_index(timestep)
        sigma = scheduler.sigmas[scheduler.step_index]
    output = step(*arguments.args, **arguments.kwargs)
    # `denoised` is the name in `LCMScheduler`
    clean = getattr(output, "pred_original_sample", getattr(output, "denoised", None))
    if clean is None:
        if inputs.get("per_token_timesteps") is not None:  # some image-to-video pipelines
            sigma = (inputs["per_token_timesteps"] / scheduler.config.num_train_timesteps)[..., None]
        clean = _clean(scheduler, sigma, timestep, inputs["model_output"], inputs["sample"].float())
    output["prev_sample"] = clean.to(output.prev_sample.dtype)
    return output


def detach_state(scheduler: Any) -> None:
    """Cut the autograd graph out of what a multistep scheduler remembers of earlier steps."""
    for name, value in vars(scheduler).items():
        if isinstance(value, torch.Tensor) and value.requires_grad:
            setattr(scheduler, name, value.detach())
        elif isinstance(value, list):
            value[:] = [item.detach() if isinstance(item, torch.Tensor) else item for item in value]
