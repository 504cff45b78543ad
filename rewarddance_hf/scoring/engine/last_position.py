"""The last layer of a judge where only the answer is wanted."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def last_position_only(text_model: Any) -> Iterator[None]:
    """
    Let the last layer compute all that follows its attention for the last position alone. Nobody reads what it gives elsewhere:
    there, the same is added to each position.
    """
    layer = text_model.layers[-1]
    hooks = [part.register_forward_pre_hook(_keep_last) for part in (layer.self_attn.o_proj, layer.mlp)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _keep_last(module: nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
    (states,) = given  # (rows, length, width), right-aligned
    return (states[:, -1:],)
