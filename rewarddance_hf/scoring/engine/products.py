"""Matrix products of a judge by oneDNN, on CPUs on which torch's own take twice as long."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional


@contextmanager
def products_by_onednn(model: nn.Module) -> Iterator[None]:
    """
    Let linear layers in float32 on the CPU call oneDNN where no gradient is wanted. torch takes MKL for these, which runs at less
    than half the speed on processors of AMD. Results differ by rounding. Elsewhere nothing changes.
    """
    layers: list[Any] = [layer for layer in model.modules() if _is_plain(layer)] if is_slow_otherwise() else []
    for layer in layers:
        layer.forward = partial(_linear, layer)
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


@cache
def is_slow_otherwise() -> bool:
    """Whether torch multiplies matrices by MKL on a processor of AMD, and has oneDNN."""
    # The same in all processes on a machine, which a measurement would not be: scores are to be the same too.
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    described = Path("/proc/cpuinfo")
    return "AuthenticAMD" in (described.read_text() if described.exists() else platform.processor())


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer is a linear one in float32 on the CPU, whose call nobody has replaced, and whose weights are not quantized."""
    if type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter or "forward" in vars(layer):
        return False
    weight = layer.weight
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.is_contiguous()


def _linear(layer: nn.Linear, given: torch.Tensor) -> torch.Tensor:
    is_taken = given.dtype == torch.float32 and given.numel() and given.shape[-1] == layer.in_features
    if not is_taken or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return functional.linear(given, layer.weight, layer.bias)
    return torch.ops.mkldnn._linear_pointwise(given, layer.weight, layer.bias, "none", [], "")
