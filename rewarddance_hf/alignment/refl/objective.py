"""What a run maximises: a reward, its logarithm or its log-odds, and the gradient of that to the samples."""

from collections.abc import Callable
from typing import Any

import torch

from ...rewards import AdaptedReward
from .arguments import ReFLTrainingArguments


EPS = 1e-6  # probabilities are kept this far from 0 and 1 before logarithms


def choose_transform(reward_transform: str, reward: AdaptedReward) -> str:
    """The transform that `"auto"` stands for: that of probabilities for one judge."""
    if reward_transform != "auto":
        return reward_transform
    return "log" if reward.is_probability else "none"


def objective(rewards: torch.Tensor, args: ReFLTrainingArguments) -> torch.Tensor:
    """What is maximised."""
    if args.reward_clip is not None:
        rewards = rewards.clamp(max=args.reward_clip)
    if args.reward_transform == "none":
        return rewards
    if rewards.min() < 0.0 or rewards.max() > 1.0:
        raise ValueError(
            f"`reward_transform` is {args.reward_transform!r}, but rewards reach from {rewards.min().item():.3g} to "
            f"{rewards.max().item():.3g}: it requires probabilities. Set it to 'none', or scale `reward_weights`."
        )
    if args.reward_transform == "log":
        return rewards.clamp(min=EPS).log()
    return torch.logit(rewards, eps=EPS)


def with_gradient_at_once(
    function: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, scale: float = 1.0
) -> torch.Tensor:
    """
    Value of a scalar function of images. Its gradient to them alone is computed here, times `scale`, which half precision needs. A
    later backward pass goes on from the images: models that the function asks get no gradients, and are not needed any more.
    """
    leaf = images.detach().requires_grad_(images.requires_grad)
    value = function(leaf)
    if not value.requires_grad:
        return value
    (gradient,) = torch.autograd.grad(value * scale, leaf, allow_unused=True)
    if gradient is None:
        return value.detach()
    return _KnownGradient.apply(images, value.detach(), gradient, scale)


class _KnownGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, images: torch.Tensor, value: torch.Tensor, gradient: torch.Tensor, scale: float
    ) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        ctx.scale = scale
        return value.clone()

    @staticmethod
    def backward(ctx: Any, outer: torch.Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return (outer / ctx.scale).to(gradient.device) * gradient, None, None, None
