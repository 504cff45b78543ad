"""
Scenes of colored shapes: what they may show.

A [`Scene`] says what an image must show; `captions` describes it, `drawing` chooses where and paints it. Every random choice
comes from the `random.Random` that the caller gives, so an image is the same in every process.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


# The RGB values are far apart from each other and from every background that `Nuisance` settings below can give.
COLORS = {
    "red": (225, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 235),
    "yellow": (235, 215, 45),
    "purple": (165, 55, 205),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle")
SIZES = ("small", "large")
NUMBERS = ("one", "two", "three", "four")
POSITIONS = ("left of", "right of", "above", "below")
COMPARISONS = ("larger than", "smaller than")
OPPOSITES = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
    "larger than": "smaller than",
    "smaller than": "larger than",
    "small": "large",
    "large": "small",
}
KINDS = ("single", "count", "binding", "relation", "size")

# Each color and each shape is seen in training, these pairs of them are not: they belong to the out-of-domain split.
HELD_OUT_COMPOSITIONS = frozenset({("green", "triangle"), ("yellow", "square")})
ALL_COMPOSITIONS = tuple((color, shape) for color in COLORS for shape in SHAPES)
TRAINING_COMPOSITIONS = tuple(pair for pair in ALL_COMPOSITIONS if pair not in HELD_OUT_COMPOSITIONS)


@dataclass(frozen=True)
class SceneObject:
    """One object that a scene must show; of any ordinary size without `size`."""

    color: str
    shape: str
    size: str | None = None

    def __post_init__(self) -> None:
        require_member("color", self.color, COLORS)
        require_member("shape", self.shape, SHAPES)
        if self.size is not None:
            require_member("size", self.size, SIZES)

    @property
    def composition(self) -> tuple[str, str]:
        """The pair that the out-of-domain split holds out."""
        return self.color, self.shape


@dataclass(frozen=True)
class Scene:
    """
    What an image must show; a caption names `objects` in their order, and `relation` is between the first and the second.

    Kinds are `"single"` (one object), `"count"` (one to four objects that look alike), `"binding"` (two objects that differ),
    `"relation"` (two objects and where the first lies) and `"size"` (one object with a size, or two and which is larger).
    """

    kind: str
    objects: tuple[SceneObject, ...]
    relation: str | None = None

    def __post_init__(self) -> None:
        require_member("kind", self.kind, KINDS)
        compared = self.kind == "size" and len(self.objects) == 2
        if self.kind == "relation" or compared:
            require_member("relation", self.relation, COMPARISONS if compared else POSITIONS)
        elif self.relation is not None:
            raise ValueError(f"`relation` is {self.relation!r}, but a {self.kind!r} scene has none. Leave it out.")
        wanted = {"single": (1,), "count": (1, 2, 3, 4), "binding": (2,), "relation": (2,), "size": (1, 2)}[self.kind]
        if len(self.objects) not in wanted:
            raise ValueError(
                f"`objects` has {len(self.objects)} objects, but a {self.kind!r} scene has one of {wanted}. "
                "Change the kind or the objects."
            )
        if self.kind == "count" and len(set(self.objects)) != 1:
            raise ValueError("`objects` differ, but the objects of a 'count' scene are alike. Repeat one object.")
        sized = [item.size is not None for item in self.objects]
        if sized != [self.kind == "size" and len(self.objects) == 1] * len(sized):
            raise ValueError(
                f"`objects` has the sizes {[item.size for item in self.objects]}, but a size is given in a 'size' "
                "scene of one object and nowhere else. Add or remove `size`."
            )

    @property
    def compositions(self) -> frozenset[tuple[str, str]]:
        """The pairs of color and shape in this scene."""
        return frozenset(item.composition for item in self.objects)


@dataclass(frozen=True)
class PlacedObject:
    """
    An object at its place in an image, drawn there or detected there: center and half extent as shares of the image's side.
    Color or shape are None where what was detected is none of this world.
    """

    color: str | None
    shape: str | None
    x: float
    y: float
    radius: float


def require_member(name: str, value: object, allowed: Iterable[object]) -> None:
    """Raise a `ValueError` which names the argument unless its value is allowed."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"`{name}` is {value!r}, but must be one of {allowed}. Choose one of them.")


def sample_scene(
    rng: random.Random, kind: str, compositions: Sequence[tuple[str, str]] = TRAINING_COMPOSITIONS
) -> Scene:
    """Draw a scene of a kind, with pairs of color and shape out of `compositions`."""
    require_member("kind", kind, KINDS)
    first, second = (SceneObject(*pair) for pair in rng.sample(compositions, 2))
    if kind == "single":
        return Scene(kind, (first,))
    if kind == "count":
        return Scene(kind, (first,) * rng.randint(1, len(NUMBERS)))
    if kind == "binding":
        return Scene(kind, (first, second))
    if kind == "relation":
        return Scene(kind, (first, second), rng.choice(POSITIONS))
    if rng.random() < 0.5:
        return Scene(kind, (SceneObject(first.color, first.shape, rng.choice(SIZES)),))
    return Scene(kind, (first, second), rng.choice(COMPARISONS))
