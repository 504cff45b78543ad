"""Clean image or clip that a scheduler's step implies, for flow-matching and noise-prediction schedulers."""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from ...import_utils import require_extra


require_extra("diffusers", "diffusers")

from diffusers import (  # noqa: E402
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
)


FLOW_MATCH_SCHEDULERS = (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
)


def step_to_clean(scheduler: Any, step: Callable[..., Any], arguments: inspect.BoundArguments) -> Any:
    """
    Run one step of a scheduler and put the clean prediction in place of the next, less noisy sample.

    The scheduler's own prediction is taken where its step returns one, so that `clip_sample` and `thresholding` hold.
    Elsewhere the prediction follows from the model output and the noise level.

    Args:
        scheduler ([`~diffusers.SchedulerMixin`]):
            Scheduler that is about to make a step.
        step (`Callable`):
            Its `step` method.
        arguments (`inspect.BoundArguments`):
            Arguments that the pipeline gave to `step`.

    Returns:
        [`~diffusers.utils.BaseOutput`]: What `step` returns, with the clean prediction as `prev_sample`.

    Raises:
        `NotImplementedError`: If the scheduler neither returns a clean prediction nor is of a known kind.
    """
    arguments.arguments["return_dict"] = True
    inputs = arguments.arguments
    sigma = _current_sigma(scheduler, inputs["timestep"])  # a step moves the scheduler on, so it is read before
    output = step(*arguments.args, **arguments.kwargs)
    # `denoised` is the name in `LCMScheduler`
    clean = getattr(output, "pred_original_sample", getattr(output, "denoised", None))
    if clean is None:
        if inputs.get("per_token_timesteps") is not None:  # some image-to-video pipelines
            sigma = (inputs["per_token_timesteps"] / scheduler.config.num_train_timesteps)[..., None]
        clean = _clean_from(scheduler, sigma, inputs["model_output"], inputs["timestep"], inputs["sample"].float())
    output["prev_sample"] = clean.to(output.prev_sample.dtype)
    return output


def _current_sigma(scheduler: Any, timestep: Any) -> torch.Tensor | None:
    """Noise level at which the model was asked, of schedulers that count in noise levels."""
    if not hasattr(scheduler, "sigmas") or not hasattr(scheduler, "_init_step_index"):
        return None
    if scheduler.step_index is None:
        scheduler._init_step_index(timestep)
    return scheduler.sigmas[scheduler.step_index]


def _clean_from(
    scheduler: Any,
    sigma: Any,
    model_output: torch.Tensor,
    timestep: Any,
    sample: torch.Tensor,
) -> torch.Tensor:
    """Clean prediction from one model output."""
    config = scheduler.config
    if sigma is not None:
        sigma = sigma.to(sample.device)
    if isinstance(scheduler, FLOW_MATCH_SCHEDULERS):
        # A path with inverted noise levels ends at 1 instead of 0.
        end = 1.0 if config.get("invert_sigmas", False) else 0.0
        return sample + (end - sigma) * model_output
    if hasattr(scheduler, "precondition_outputs"):  # EDM and cosine DPM-Solver++
        return scheduler.precondition_outputs(sample, model_output, sigma)
    if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):  # DPM-Solver(++), UniPC, DEIS, SA-Solver
        alpha, sigma = scheduler._sigma_to_alpha_sigma_t(sigma)
    elif hasattr(scheduler, "alphas_cumprod"):  # PNDM, TCD
        alpha_cumprod = scheduler.alphas_cumprod.to(sample.device)[int(timestep)]
        alpha, sigma = alpha_cumprod.sqrt(), (1 - alpha_cumprod).sqrt()
    else:
        raise NotImplementedError(
            f'The scheduler is a `{type(scheduler).__name__}`, but `method="refl"` requires one that predicts the '
            'clean sample (flow matching, or noise prediction with known noise levels). Use `method="draft"`, which '
            "works with any scheduler, or set `pipeline.scheduler` to another one."
        )

    prediction_type = config.prediction_type
    if prediction_type == "epsilon":
        clean = (sample - sigma * model_output) / alpha
    elif prediction_type == "v_prediction":
        clean = alpha * sample - sigma * model_output
    elif prediction_type == "flow_prediction":
        clean = sample - sigma * model_output
    elif prediction_type == "sample":
        clean = model_output
    else:
        raise NotImplementedError(
            f"`scheduler.config.prediction_type` is {prediction_type!r}, but `method=\"refl\"` requires 'epsilon', "
            "'v_prediction', 'flow_prediction' or 'sample'. Use `method=\"draft\"`."
        )
    if config.get("thresholding", False) and hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
        clean = scheduler._threshold_sample(clean)
    return clean


def detach_state(scheduler: Any) -> None:
    """
    Cut the autograd graph out of what a multistep scheduler remembers of earlier steps.

    Args:
        scheduler ([`~diffusers.SchedulerMixin`]):
            Scheduler whose attributes are changed in place.
    """
    for name, value in vars(scheduler).items():
        if isinstance(value, torch.Tensor) and value.requires_grad:
            setattr(scheduler, name, value.detach())
        elif isinstance(value, list):
            value[:] = [item.detach() if isinstance(item, torch.Tensor) else item for item in value]
