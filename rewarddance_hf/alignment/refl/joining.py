"""
Encodings of single prompts, put together as those of a batch. Pipelines do this in many ways: along some dimension, padded to
the longest, with a mask that is left out where nothing is padded, as lists, once for all prompts. Which one it is follows from an
encoding of the same prompts at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F


# Largest difference between encodings alone and in a batch, relative to their length: other kernels round otherwise.
ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-8}
ROUNDING_OF_HALF = 0.05


class NotJoinedError(ValueError):
    """Encodings cannot be put together in this way."""


@dataclass(frozen=True)
class Shared:
    """One for all prompts."""


@dataclass(frozen=True)
class Listed:
    """Lists with an entry for each prompt, one after the other."""


@dataclass(frozen=True)
class Each:
    """A sequence whose entries are put together in their own ways."""

    kind: Any
    ways: tuple[Any, ...]


@dataclass(frozen=True)
class Along:
    """Along a dimension, padded with zeros to the largest. `padded` tells whether padding was seen."""

    dim: int
    padded: bool


@dataclass(frozen=True)
class LengthMask:
    """Mask of what is padded in the tensor before it, None where nothing is."""

    dtype: torch.dtype


def learn_to_join(parts: Sequence[Any], together: Any) -> Any:
    """How encodings of single prompts become one that was made of all of them at once."""
    return _learn(list(parts), together, None)


def join(parts: Sequence[Any], way: Any) -> Any:
    """Encodings of single prompts as that of all of them."""
    if way is None:
        raise NotJoinedError("not learned yet")
    return _join(list(parts), way, None)


def _learn(parts: list[Any], together: Any, before: list[Any] | None) -> Any:
    if isinstance(together, torch.Tensor):
        ways: list[Any] = []
        if all(isinstance(part, torch.Tensor) for part in parts):
            padded = len({part.shape for part in parts}) > 1
            ways = [Shared(), *(Along(dim, padded) for dim in range(together.ndim))]
        elif all(part is None for part in parts):
            ways = [LengthMask(together.dtype)]
        for way in ways:
            try:
                if _is_close(_join(parts, way, before), together):
                    return way
            except NotJoinedError:
                pass
        shapes = [tuple(part.shape) if isinstance(part, torch.Tensor) else part for part in parts]
        raise NotJoinedError(f"tensors of the shapes {shapes} became one of the shape {tuple(together.shape)}")
    kind: Any = type(together)
    if isinstance(together, (list, tuple)) and all(isinstance(part, kind) for part in parts):
        if all(len(part) == len(together) for part in parts):
            columns = [list(column) for column in zip(*parts, strict=True)]
            ways = []
            for index, column in enumerate(columns):
                ways.append(_learn(column, together[index], columns[index - 1] if index else None))
            return Each(kind, tuple(ways))
        joined = _join(parts, Listed(), before)
        if len(joined) == len(together) and all(map(_is_close, joined, together)):
            return Listed()
    elif not isinstance(together, (list, tuple)) and all(part == together for part in parts):
        return Shared()
    raise NotJoinedError(f"{[type(part).__name__ for part in parts]} became `{type(together).__name__}`")


def _join(parts: list[Any], way: Any, before: list[Any] | None) -> Any:
    if isinstance(way, Shared):
        if all(_is_same(part, parts[0]) for part in parts):
            return parts[0]
    elif isinstance(way, Listed):
        return type(parts[0])(item for part in parts for item in part)
    elif isinstance(way, Each):
        if all(isinstance(part, way.kind) and len(part) == len(way.ways) for part in parts):
            columns = [list(column) for column in zip(*parts, strict=True)]
            joined = []
            for index, (column, own) in enumerate(zip(columns, way.ways, strict=True)):
                joined.append(_join(column, own, columns[index - 1] if index else None))
            return way.kind(joined)
    elif isinstance(way, LengthMask):
        if before is not None and all(isinstance(part, torch.Tensor) and part.ndim > 1 for part in before):
            lengths = torch.tensor([part.shape[1] for part in before])
            if len(set(lengths.tolist())) == 1:
                return None
            return (torch.arange(int(lengths.max())) < lengths[:, None]).to(way.dtype)
    elif isinstance(way, Along) and all(isinstance(part, torch.Tensor) and part.ndim > way.dim for part in parts):
        ranks = {part.ndim for part in parts}
        if len(ranks) == 1:
            others = [[size for dim, size in enumerate(part.shape) if dim != way.dim] for part in parts]
            if all(sizes == others[0] for sizes in others) or way.padded:
                return torch.cat([_pad(part, way.dim, parts) for part in parts], dim=way.dim)
            raise NotJoinedError("these are padded, which was not seen yet")
    raise NotJoinedError(f"{[type(part).__name__ for part in parts]} do not fit {way}")


def _pad(part: torch.Tensor, dim: int, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    missing: list[int] = []
    for place in reversed(range(part.ndim)):
        largest = max(other.shape[place] for other in parts)
        missing += [0, 0 if place == dim else largest - part.shape[place]]
    return F.pad(part, missing)


def _is_same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        return ours.shape == theirs.shape and ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    return type(ours) is type(theirs) and ours == theirs


def _is_close(ours: Any, theirs: Any) -> bool:
    if not isinstance(ours, torch.Tensor) or not isinstance(theirs, torch.Tensor):
        return _is_same(ours, theirs)
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    if not theirs.is_floating_point():
        return torch.equal(ours, theirs)
    difference = (ours.double() - theirs.double()).norm()
    return bool(difference <= ROUNDING.get(theirs.dtype, ROUNDING_OF_HALF) * theirs.double().norm())
