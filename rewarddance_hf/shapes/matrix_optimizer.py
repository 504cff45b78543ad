"""The optimizer that the ladder of base models is trained by: Muon for matrices, AdamW for all else."""

import re
from collections import defaultdict
from typing import Any

import torch


class Float32Muon(torch.optim.Muon):
    """
    torch's [Muon](https://kellerjordan.github.io/posts/muon/), calculated in float32 and for all matrices of one shape at once.

    torch's own calculates in bfloat16, for which most CPUs have no instructions: it took up to half of an update there.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all matrices that have a gradient."""
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape[weight.shape].append(weight)
            for (rows, columns), weights in by_shape.items():
                gradients = [weight.grad for weight in weights]
                momenta = [self._momentum(weight) for weight in weights]
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])
                updates = orthogonal(torch.stack(ahead), group["ns_coefficients"], group["ns_steps"], group["eps"])
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(weights, updates.unbind(), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)

    def _momentum(self, weight: torch.Tensor) -> torch.Tensor:
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        return state["momentum_buffer"]


def orthogonal(
    matrices: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float = 1e-7
) -> torch.Tensor:
    """
    Matrices (`(number, rows, columns)`) with about the same singular vectors and singular values near 1, by a Newton-Schulz
    iteration of the fifth order.
    """
    a, b, c = coefficients
    is_tall = matrices.shape[1] > matrices.shape[2]
    wide = matrices.mT if is_tall else matrices
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.mT if is_tall else wide


class MatrixOptimizer(torch.optim.Optimizer):
    """
    Muon for the matrices of a model, AdamW for its embeddings, head and vectors. It keeps no state dict: trainings with it are not
    resumed.
    """

    def __init__(self, model: torch.nn.Module, lr: float, weight_decay: float) -> None:
        named = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        matrices = [
            name for name, weight in named.items() if weight.ndim == 2 and not re.search("embed|lm_head", name)
        ]
        others = [weight for name, weight in named.items() if name not in set(matrices)]
        self.parts = (
            Float32Muon([named[name] for name in matrices], lr=10 * lr, weight_decay=weight_decay),
            torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98)),
        )
        super().__init__(named.values(), {"lr": lr})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all weights."""
        for part in self.parts:
            part.step()
