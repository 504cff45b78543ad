"""Distance of a denoiser that is being tuned from the un-tuned one."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F


class BaseDistance:
    """
    Mean squared distance between the outputs of a denoiser and of its un-tuned self, in the calls that carry gradient. The
    un-tuned one is a copy (`with_copy`), or the denoiser with its adapters turned off. A pipeline may have two denoisers.

    For a sampler that adds Gaussian noise, the KL divergence between a step of both is this distance times a factor that
    depends on the noise level only.
    """

    def __init__(self, denoisers: Sequence[Any], with_copy: bool = False) -> None:
        self.denoisers = denoisers
        self.bases: dict[Any, Any] = {denoiser: _frozen_copy(denoiser) for denoiser in denoisers if with_copy}
        self._distances: list[torch.Tensor] = []
        self._running = False

    def to(self, device: torch.device) -> None:
        """Move the copies."""
        for base in self.bases.values():
            base.to(device)

    @contextmanager
    def measured(self) -> Iterator["BaseDistance"]:
        """Measure every call of a denoiser that carries gradient within the block."""
        self._distances.clear()
        with ExitStack() as stack:
            for denoiser in self.denoisers:
                stack.callback(denoiser.register_forward_hook(self._compare, with_kwargs=True).remove)
            yield self

    def mean(self) -> torch.Tensor:
        """Mean over the calls that were measured."""
        return torch.stack(self._distances).mean()

    def _compare(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._running or not torch.is_grad_enabled():
            return
        self._running = True
        try:
            with torch.no_grad():
                base_output = self._base_output(module, *args, **kwargs)
        finally:
            self._running = False
        pairs = zip(_tensors(output), _tensors(base_output), strict=True)
        self._distances.append(
            torch.stack([F.mse_loss(ours.float(), theirs.float()) for ours, theirs in pairs]).mean()
        )

    def _base_output(self, denoiser: Any, /, *args: Any, **kwargs: Any) -> Any:
        if self.bases:
            return self.bases[denoiser](*args, **kwargs)
        denoiser.disable_adapters()
        try:
            return denoiser(*args, **kwargs)
        finally:
            denoiser.enable_adapters()


def _frozen_copy(denoiser: Any) -> Any:
    """A second copy of the weights, by way of the configuration: hooks and adapters stay behind."""
    copy = type(denoiser).from_config(denoiser.config)
    copy.load_state_dict(denoiser.state_dict())
    return copy.to(device=denoiser.device, dtype=denoiser.dtype).eval().requires_grad_(False)


def _tensors(output: Any) -> list[torch.Tensor]:
    """Prediction of a denoiser: the first entry of its output, which some give as a list with one for each sample."""
    prediction = output[0]
    return [prediction] if isinstance(prediction, torch.Tensor) else list(prediction)
