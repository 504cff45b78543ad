"""
An exact oracle: which facts of a caption does an image show?

It reads pixels only. A pixel is taken as a mixture of the ground and the nearest color of the world, so that blurred
edges count by their share. Connected pixels make an object, whose shape is the best of three fitted templates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations, product

import numpy as np
from PIL import Image

from .captions import parse_caption
from .drawing import LARGE_RADIUS, SQUARE_SIDE, TRIANGLE_BASE
from .scenes import COLORS, COMPARISONS, SHAPES, PlacedObject, Scene


# Larger images are reduced to this side first: that is enough for every object, and takes noise away.
WORKING_SIZE = 32
# Components with fewer pixels than this are noise, and so is all beyond the largest few.
SMALLEST_AREA = 12
MOST_OBJECTS = 8
# Farther than this from its nearest color (as RGB distance, channels in [0, 1]) an object has no color of this world.
COLOR_TOLERANCE = 0.42
# A shape whose best template leaves more than this share of its area unexplained is none of this world. In renderings with
# the defects of a small generator it is at most 0.19.
SHAPE_TOLERANCE = 0.2
# So is one with a larger radius, as a share of the image's side: the largest that is drawn has 0.31.
LARGEST_RADIUS = 0.36
SMOOTHING_NOISE = 0.045
EDGE_WIDTHS = (1.0, 2.5, 4.0)

_PALETTE = np.array(list(COLORS.values()), dtype=np.float32) / 255
_COLOR_NAMES = tuple(COLORS)
# Area and height of the center of mass above the center, for radius 1.
_AREAS = {"circle": np.pi, "square": 4 * SQUARE_SIDE**2, "triangle": 1 + TRIANGLE_BASE}
_TRIANGLE_CENTROID = (2 * TRIANGLE_BASE - 1) / 3


@dataclass(frozen=True)
class OracleResult:
    """
    Whether each fact of a caption holds, and the objects that the image shows.

    Facts are `"number"`, `"color 1"`, `"shape 1"`, then by caption `"color 2"`, `"shape 2"`, `"size"`, `"relation"`.
    """

    facts: dict[str, bool]
    objects: tuple[PlacedObject, ...]

    @property
    def all_hold(self) -> bool:
        """Whether the image shows all that the caption says."""
        return all(self.facts.values())

    @property
    def broken(self) -> int:
        """Number of facts that do not hold."""
        return sum(not holds for holds in self.facts.values())

    @property
    def share(self) -> float:
        """Share of the facts that hold, from 0 to 1."""
        return 1 - self.broken / len(self.facts)


def check(image: Image.Image | np.ndarray, caption: str) -> OracleResult:
    """Which facts of a caption an RGB image shows; an array `(height, width, 3)` holds integers up to 255 or floats in [0, 1]."""
    scene = parse_caption(caption)
    objects = detect_objects(image)
    return OracleResult(check_facts(scene, objects), objects)


def check_facts(scene: Scene, objects: Sequence[PlacedObject]) -> dict[str, bool]:
    """
    Which facts of a scene hold for placed objects, named as in [`OracleResult`].

    Two objects of a scene are matched with the two placed ones that make most facts hold.
    """
    facts = {"number": len(objects) == len(scene.objects)}
    if len(set(scene.objects)) == 1:
        wanted = scene.objects[0]
        facts["color 1"] = bool(objects) and all(item.color == wanted.color for item in objects)
        facts["shape 1"] = bool(objects) and all(item.shape == wanted.shape for item in objects)
        if wanted.size is not None:
            facts["size"] = bool(objects) and all(
                (item.radius > LARGE_RADIUS) == (wanted.size == "large") for item in objects
            )
        return facts
    matches: list[tuple[PlacedObject | None, PlacedObject | None]] = [*permutations(objects, 2)]
    if not matches:
        matches = [match for item in objects for match in ((item, None), (None, item))] or [(None, None)]
    candidates = [_match_facts(scene, match) for match in matches]
    return facts | max(candidates, key=lambda candidate: sum(candidate.values()))


def count_broken(scene: Scene, objects: Sequence[PlacedObject]) -> int:
    """Number of facts of a scene that do not hold for placed objects."""
    return sum(not holds for holds in check_facts(scene, objects).values())


def _match_facts(scene: Scene, match: tuple[PlacedObject | None, PlacedObject | None]) -> dict[str, bool]:
    facts = {}
    for number, (wanted, item) in enumerate(zip(scene.objects, match, strict=True), start=1):
        facts[f"color {number}"] = item is not None and item.color == wanted.color
        facts[f"shape {number}"] = item is not None and item.shape == wanted.shape
    if scene.relation is not None:
        name = "size" if scene.relation in COMPARISONS else "relation"
        first, second = match
        facts[name] = first is not None and second is not None and relation_holds(scene.relation, first, second)
    return facts


def relation_holds(relation: str, first: PlacedObject, second: PlacedObject) -> bool:
    """Whether the first object stands in a relation to the second; a position must hold more along its axis than across."""
    if relation in COMPARISONS:
        return (first.radius > second.radius) == (relation == "larger than")
    along, across = second.x - first.x, second.y - first.y
    if relation in ("above", "below"):
        along, across = across, along
    if relation in ("right of", "below"):
        along = -along
    return along > abs(across)


# ---- reading pixels ----


def detect_objects(image: Image.Image | np.ndarray) -> tuple[PlacedObject, ...]:
    """Objects in an image, as for [`check`], largest first."""
    pixels = _read_pixels(image)
    if _estimate_noise(pixels) > SMOOTHING_NOISE:
        pixels = _smooth(pixels)
    ground = np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]), axis=0)
    components = _connected_components(_label_pixels(pixels, ground))
    objects = [_describe_component(component, pixels, ground) for component in components]
    return tuple(sorted(objects, key=lambda item: -item.radius)[:MOST_OBJECTS])


def _read_pixels(image: Image.Image | np.ndarray) -> np.ndarray:
    if not isinstance(image, Image.Image):
        array = np.asarray(image)
        if array.ndim != 3 or array.shape[2] != 3:
            raise ValueError(
                f"`image` has shape {array.shape}, but an RGB image of shape (height, width, 3) is required. "
                "Move the channels last and drop the batch dimension."
            )
        if array.dtype.kind == "f":
            array = (255 * array.clip(0, 1)).round()
        image = Image.fromarray(array.astype(np.uint8))
    image = image.convert("RGB")
    if image.size != (WORKING_SIZE, WORKING_SIZE):
        image = image.resize((WORKING_SIZE, WORKING_SIZE), Image.Resampling.BOX)
    return np.asarray(image, dtype=np.float32) / 255


def _estimate_noise(pixels: np.ndarray) -> float:
    """Standard deviation of the noise, from second differences, of which most see no edge."""
    differences = pixels[1:-1, :-2] + pixels[1:-1, 2:] - 2 * pixels[1:-1, 1:-1]
    return float(np.median(np.abs(differences))) / (0.6745 * np.sqrt(6))


def _smooth(pixels: np.ndarray) -> np.ndarray:
    for axis in (0, 1):
        padded = np.pad(pixels, [(1, 1) if axis == k else (0, 0) for k in range(3)], mode="edge")
        pieces = [padded.take(range(start, start + pixels.shape[axis]), axis=axis) for start in range(3)]
        pixels = (pieces[0] + 2 * pieces[1] + pieces[2]) / 4
    return pixels


def _label_pixels(pixels: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """Give each pixel the number of its color, from 1, or 0 for the ground."""
    directions = _PALETTE - ground
    lengths = (directions**2).sum(1)
    differences = (pixels - ground).reshape(-1, 3)
    shares = (differences @ directions.T / lengths).clip(0, 1.1)
    residuals = shares**2 * lengths - 2 * shares * (differences @ directions.T)
    nearest = residuals.argmin(1)
    share = shares[np.arange(len(nearest)), nearest]
    return np.where(share > 0.5, nearest + 1, 0).reshape(pixels.shape[:2])


def _connected_components(labels: np.ndarray) -> list[np.ndarray]:
    """Masks of the connected areas of equal label, found by spreading the largest pixel number of each."""
    height, width = labels.shape
    padded = np.zeros((height + 2, width + 2), dtype=labels.dtype)
    padded[1:-1, 1:-1] = labels
    same_below = (padded[1:-1, 1:-1] == padded[2:, 1:-1])[:-1]
    same_right = (padded[1:-1, 1:-1] == padded[1:-1, 2:])[:, :-1]
    numbers = np.where(labels > 0, np.arange(1, height * width + 1).reshape(height, width), 0)
    while True:
        before = numbers.copy()
        for upper, lower, same in (
            (numbers[:-1], numbers[1:], same_below),
            (numbers[:, :-1], numbers[:, 1:], same_right),
        ):
            larger = np.maximum(upper, lower)
            # The two views overlap: taking the maximum again keeps what the first line wrote.
            np.maximum(upper, larger, out=upper, where=same)
            np.maximum(lower, larger, out=lower, where=same)
        if np.array_equal(before, numbers):
            break
    found, counts = np.unique(numbers[numbers > 0], return_counts=True)
    return [numbers == number for number, count in zip(found, counts, strict=True) if count >= SMALLEST_AREA]


def _describe_component(component: np.ndarray, pixels: np.ndarray, ground: np.ndarray) -> PlacedObject:
    color = np.median(pixels[component], axis=0)
    distances = ((_PALETTE - color) ** 2).sum(1) ** 0.5
    nearest = int(distances.argmin())
    top, bottom, left, right = _window(component)
    window = np.s_[top:bottom, left:right]
    near = _grow(component[window])
    direction = color - ground
    share = ((pixels[window] - ground) @ direction / max(float(direction @ direction), 1e-6)).clip(0, 1) * near
    shape, x, y, radius, error = _fit_shape(share)
    return PlacedObject(
        _COLOR_NAMES[nearest] if distances[nearest] <= COLOR_TOLERANCE else None,
        shape if error <= SHAPE_TOLERANCE and radius <= LARGEST_RADIUS * WORKING_SIZE else None,
        float(x + left) / WORKING_SIZE,
        float(y + top) / WORKING_SIZE,
        radius / WORKING_SIZE,
    )


def _window(component: np.ndarray) -> tuple[int, int, int, int]:
    """Bounds of a component with a rim of two pixels."""
    rows, columns = np.flatnonzero(component.any(1)), np.flatnonzero(component.any(0))
    height, width = component.shape
    return max(rows[0] - 2, 0), min(rows[-1] + 3, height), max(columns[0] - 2, 0), min(columns[-1] + 3, width)


def _grow(mask: np.ndarray) -> np.ndarray:
    """The mask with all pixels that touch it, so that soft edges are counted."""
    grown = np.pad(mask, 1)
    grown = grown[:-2] | grown[1:-1] | grown[2:]
    return grown[:, :-2] | grown[:, 1:-1] | grown[:, 2:]


def _fit_shape(share: np.ndarray) -> tuple[str, float, float, float, float]:
    """Best template of equal area and center of mass: shape, center, radius and unexplained share of the area."""
    height, width = share.shape
    rows, columns = np.arange(height, dtype=np.float32) + 0.5, np.arange(width, dtype=np.float32) + 0.5
    area = float(share.sum())
    x, y = float(share.sum(0) @ columns) / area, float(share.sum(1) @ rows) / area
    best = ("", x, y, 0.0, math.inf)
    for shape, edge in product(SHAPES, EDGE_WIDTHS):
        radius = (area / _AREAS[shape]) ** 0.5
        middle = y - _TRIANGLE_CENTROID * radius if shape == "triangle" else y
        outside = _signed_distance(shape, columns[None] - x, rows[:, None] - middle, radius)
        template = (0.5 - outside / edge).clip(0, 1)
        error = float(np.abs(share - template).sum()) / area
        if error < best[-1]:
            best = (shape, x, middle, radius, error)
    return best


def _signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Distance of each pixel from the outline, negative inside."""
    if shape == "circle":
        return np.sqrt(x**2 + y**2) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - SQUARE_SIDE * radius
    slope = 1 + TRIANGLE_BASE
    sides = (slope * np.abs(x) - y - radius) / (1 + slope**2) ** 0.5
    return np.maximum(sides, y - TRIANGLE_BASE * radius)
