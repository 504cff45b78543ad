"""Key/value states of shared prefixes: taken from one batch, expanded into others."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


@dataclass(eq=False)
class PrefixStates:
    """Key/value states of one row of a batch, whose first ones may be padding."""

    layers: list[tuple[torch.Tensor, ...]]
    row: int

    @property
    def num_bytes(self) -> int:
        """Size of the tensors, with those of other rows."""
        return sum(states.nbytes for layer in self.layers for states in layer)

    def alone(self, length: int) -> "PrefixStates":
        """The same without other rows and padding."""
        rows = slice(self.row, self.row + 1)
        return PrefixStates([tuple(states[rows, :, -length:].clone() for states in layer) for layer in self.layers], 0)


class PrefixesNotShareableError(RuntimeError):
    """A model keeps other states than keys and values of all tokens."""


def take_states(
    cache: Any, parts: list[tuple[int, int]], past: int, longest: int, copy: bool = False
) -> list[PrefixStates]:
    """
    States of each row of a cache, whose rows are `[padding, prefix, padding, part]`.

    `parts` are start and end of the part in the question of each row, `past` the number of states before the parts and
    `longest` that of the parts, with padding. `copy` is for caches whose tensors will be written to again.
    """
    length = past + longest
    layers: list[tuple[torch.Tensor, ...]] = []
    for layer in cache.layers:
        states = (layer.keys, layer.values)
        if type(layer) is not DynamicLayer or any(part.ndim != 4 or part.shape[2] != length for part in states):
            raise PrefixesNotShareableError(f"a cache layer is of type `{type(layer).__name__}`")
        layers.append(tuple(part.clone() for part in states) if copy else states)
    taken = []
    for row, (start, end) in enumerate(parts):
        if 0 < start and end - start < longest:  # take the padding between prefix and part out
            pieces = (slice(past - start, past), slice(length - (end - start), length))
            own = [
                tuple(torch.cat([states[row : row + 1, :, piece] for piece in pieces], dim=2) for states in layer)
                for layer in layers
            ]
            taken.append(PrefixStates(own, 0))
        else:
            taken.append(PrefixStates(layers, row))
    return taken


def expand_states(prefixes: list[PrefixStates], past: int) -> DynamicCache:
    """Cache whose rows are the key/value states of prefixes, padded on the left."""
    cache = DynamicCache()
    first = prefixes[0]
    is_one = all(prefix.layers is first.layers and prefix.row == first.row for prefix in prefixes)
    for i in range(len(first.layers)):
        layer = DynamicLayer()
        states = []
        for kind in range(2):
            rows = [_fit(p.layers[i][kind][p.row : p.row + 1], past) for p in (prefixes[:1] if is_one else prefixes)]
            states.append(rows[0].expand(len(prefixes), -1, -1, -1) if is_one else torch.cat(rows))
        layer.lazy_initialization(*states)
        layer.keys, layer.values = states
        cache.layers.append(layer)
    return cache


def _fit(states: torch.Tensor, past: int) -> torch.Tensor:
    """The last `past` states, after padding where there are fewer: the caller masks the padding."""
    missing = past - states.shape[2]
    return nn.functional.pad(states, (0, 0, missing, 0)) if missing > 0 else states[:, :, -missing:]
