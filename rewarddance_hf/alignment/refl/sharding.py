"""
Denoisers split over the processes of a run (FSDP2), for generators that do not fit one GPU. `fully_shard` changes modules in
place, and its hooks gather the weights of a block for the time of its call, so that an unmodified pipeline calls the denoiser.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from ...parallel import Processes
from ...rewards import AdaptedReward
from ...scoring.loading import is_sharded
from .offload import models_of


def shard(denoisers: Mapping[str, nn.Module], device: torch.device) -> None:
    """
    Split denoisers over all processes, block by block: each holds its share of every weight, of its gradient and of the optimizer.

    Raises:
        `ValueError`: If there is one process, or the weights that are trained differ between processes.
    """
    processes = Processes.current()
    if processes.count < 2:
        raise ValueError(
            "`shard_denoiser` is True, but there is one process to split the denoiser over. Launch several, e.g. `accelerate "
            "launch --config_file examples/accelerate_configs/multi_gpu.yaml`, or set it to False."
        )
    mesh = init_device_mesh(device.type, (processes.count,))
    for name, denoiser in denoisers.items():
        trained = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
        sums = [parameter.detach().double().sum().item() for parameter in trained]
        if any(other != sums for other in processes.gather([sums])):
            raise ValueError(
                f"The weights of `pipeline.{name}` differ between processes, but each takes its share of the same ones. Load "
                "them from the same files, and set the same seed."
            )
        blocks = set(getattr(denoiser, "_no_split_modules", None) or ())
        for module in reversed(list(denoiser.modules())):  # inner ones first
            if type(module).__name__ in blocks and module is not denoiser:
                fully_shard(module, mesh=mesh)
        # By default the outermost weights stay whole after a call until a backward pass, which most calls of a pipeline have not:
        # the optimizer would be given those, or later calls would not see its step.
        fully_shard(denoiser, mesh=mesh, reshard_after_forward=True)


def refuse_split_judges(reward: AdaptedReward) -> None:
    """
    Refuse judges whose weights are split over the processes of a run: each asks about other samples, and remembers others, so that
    one would wait for weights that the others do not send.
    """
    if any(is_sharded(model) for model in models_of(reward)):
        raise ValueError(
            f"The weights of a judge (of {reward.names}) are split over processes, which ask it about different samples and would "
            "wait for each other. Load it whole in each process, or put it behind `rewarddance serve` and pass its address."
        )


def whole(values: Mapping[Any, Any], is_kept: bool) -> dict[Any, Any]:
    """
    Tensors put together from the shares of all processes, on the CPU where they are kept, else None. All processes must call it.
    """

    def collect(value: torch.Tensor) -> torch.Tensor | None:  # one by one
        value = value.full_tensor() if isinstance(value, DTensor) else value
        return value.detach().cpu() if is_kept else None

    return tree_map_only(torch.Tensor, collect, dict(values))


@torch.no_grad()
def fill(target: torch.Tensor, value: torch.Tensor) -> None:
    """Write a whole tensor into one that may be split. All processes must call it, with the same value."""
    value = value.to(target.device, target.dtype)
    if isinstance(target, DTensor):
        value = distribute_tensor(value, target.device_mesh, target.placements)
    target.copy_(value)


def are_finite(gradients: Sequence[torch.Tensor]) -> bool:
    """Whether gradients are finite, in the shares of all processes if they are split."""
    local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    found = bool(torch.stack([gradient.isfinite().all() for gradient in local]).all())
    is_split = any(isinstance(gradient, DTensor) for gradient in gradients)
    return all(Processes.current().gather([found])) if is_split else found


def optimizer_state(optimizer: Any, is_kept: bool) -> dict[str, Any]:
    """State of an optimizer as it would be in one process, see [`whole`]."""
    state = optimizer.state_dict()
    return {**state, "state": whole(state["state"], is_kept)}
