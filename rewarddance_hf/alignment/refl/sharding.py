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


def whole(values: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors put together from the shares of all processes, on the CPU. All processes must call it."""

    def collect(value: torch.Tensor) -> torch.Tensor:
        return (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu()  # one by one

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


def optimizer_state(optimizer: Any) -> dict[str, Any]:
    """State of an optimizer as it would be in one process, on the CPU. All processes must call it."""
    state = optimizer.state_dict()
    tensors = {index: whole(values) for index, values in state["state"].items()}
    return {**state, "state": tensors}


def load_optimizer_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Give an optimizer of split weights the state of one process. All processes must call it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def shared(value: Any, parameter: torch.Tensor) -> Any:
        if not isinstance(value, torch.Tensor) or value.shape != parameter.shape or not isinstance(parameter, DTensor):
            return value  # such as the number of its steps
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)

    tensors = {
        index: {name: shared(value, parameters[index]) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": tensors})
