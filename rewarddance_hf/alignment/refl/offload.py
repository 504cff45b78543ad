"""
Models on the CPU while they are not in use. The backward pass needs the denoiser and the VAE where the forward pass left them; text
encoders have no part in it, and judges have done theirs as soon as the gradient of the samples is known.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ...rewards import AdaptedReward


class Offload:
    """Judges that are on a device only while they are asked: models among reward functions, and those inside of scorers."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._taken: set[nn.Module] = set()

    def take(self, reward: AdaptedReward) -> None:
        """Move the judges of a reward to the CPU, if they are on this device. Those elsewhere, or in parts, are left alone."""
        for model in models_of(reward):
            if {parameter.device for parameter in model.parameters()} == {self.device}:
                self._taken.add(model.to("cpu"))

    @contextmanager
    def in_use(self, reward: AdaptedReward) -> Iterator[None]:
        """Judges of a reward are on the device within the block."""
        with ExitStack() as stack:
            for model in models_of(reward):
                if model in self._taken:
                    stack.callback(model.to, "cpu")
                    model.to(self.device)
            yield


def models_of(reward: AdaptedReward) -> list[nn.Module]:
    """Models among reward functions, and those inside of scorers."""
    models = [getattr(function, "model", function) for function in reward.functions]
    return [model for model in models if isinstance(model, nn.Module) and next(model.parameters(), None) is not None]


def with_gradient_at_once(function: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """
    Value of a scalar function of images. Its gradient is computed here, so that a later backward pass goes on from the images and
    does not come to the function again.
    """
    leaf = images.detach().requires_grad_(images.requires_grad)
    value = function(leaf)
    if not value.requires_grad:
        return value
    (gradient,) = torch.autograd.grad(value, leaf, allow_unused=True)
    if gradient is None:
        return value.detach()
    return _KnownGradient.apply(images, value.detach(), gradient)


class _KnownGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: torch.Tensor, value: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, outer: torch.Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return outer.to(gradient.device) * gradient, None, None
