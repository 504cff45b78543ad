"""Layers of a judge that are computed again in the backward pass, in place of being kept."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ...models.modeling_rewarddance import CACHE_NAME


@contextmanager
def layers_computed_again(model: nn.Module) -> Iterator[None]:
    """
    Keep the inputs only of all layers that are called inside. transformers' own checkpointing is for training mode, and gives
    up the cache; here, what a layer adds to the cache is dropped after it.
    """
    changed = [(layer, "forward" in vars(layer), layer.forward) for layer in layers_of(model)]
    for layer, _, forward in changed:
        layer.forward = partial(_forward, forward)
    try:
        yield
    finally:
        for layer, had_own, forward in changed:
            if had_own:  # e.g. of accelerate's hooks
                layer.forward = forward
            else:
                del layer.forward


def layers_of(model: nn.Module) -> list[Any]:
    """Layers that can be computed again."""
    return [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]


def _forward(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    cache = kwargs.get(CACHE_NAME)
    prefix = [] if cache is None else [(layer, layer.keys, layer.values) for layer in cache.layers]

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return forward(*args, **kwargs)
        finally:
            for layer, keys, values in prefix:
                layer.keys, layer.values = keys, values

    return checkpoint(run, *args, use_reentrant=False, **kwargs)
