"""
Models on the CPU while they are not in use. The backward pass needs the denoiser and the VAE where the forward pass left them; text
encoders have no part in it, and judges have done theirs as soon as the gradient of the samples is known.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

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
