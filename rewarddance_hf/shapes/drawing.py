"""Scenes of shapes as images: where objects stand, and how they are drawn."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .scenes import COLORS, COMPARISONS, POSITIONS, PlacedObject, Scene


# Half extents as shares of the image's side. No object is drawn between the sizes that "small" and "large" mean.
RADIUS_RANGES = {None: (0.16, 0.2), "small": (0.13, 0.15), "large": (0.25, 0.31)}
LARGER_RADIUS_RANGE = (0.195, 0.22)
SMALLER_RADIUS_RANGE = (0.13, 0.145)
LARGE_RADIUS = 0.2
# Objects stand on a loose grid of two by two, one in each quarter at most: a tiny vision encoder that reads an image in
# few patches can learn their shapes quickly. Only a large object is too big for a quarter and lies around the middle.
QUARTERS = (0.26, 0.74)
QUARTER_REACH = 0.225
# A square as wide as a circle looks bigger than it: this factor gives both the same area.
SQUARE_SIDE = 0.88
TRIANGLE_BASE = 0.85

DRAWING_SCALE = 4


@dataclass(frozen=True)
class Nuisance:
    """What may vary in an image without changing what it shows. Pairs are ranges from which an image's value is drawn."""

    background: tuple[float, float] = (0.08, 0.24)
    tint: float = 0.02
    color_jitter: float = 0.06
    position_jitter: float = 0.6
    noise: tuple[float, float] = (0.0, 0.02)
    blur: tuple[float, float] = (0.0, 0.3)
    resolution: tuple[float, float] = (0.95, 1.0)


IN_DOMAIN = Nuisance()
# Lighter, tinted grounds, stronger jitter and noise: no training image looks like this.
OUT_OF_DOMAIN = Nuisance(
    background=(0.25, 0.3),
    tint=0.03,
    color_jitter=0.07,
    position_jitter=0.7,
    noise=(0.022, 0.03),
    blur=(0.3, 0.4),
    resolution=(0.9, 0.95),
)

# Of what generators are trained on: calm grounds, little jitter and no noise, so that a short training gives crisp shapes.
GENERATOR_STYLE = Nuisance(
    background=(0.12, 0.2),
    tint=0.01,
    color_jitter=0.03,
    position_jitter=0.3,
    noise=(0.0, 0.0),
    blur=(0.0, 0.0),
    resolution=(1.0, 1.0),
)


def place_objects(scene: Scene, rng: random.Random, nuisance: Nuisance = IN_DOMAIN) -> tuple[PlacedObject, ...]:
    """Choose a size and a place for each object so that the scene holds and no two objects touch."""
    radii = _draw_radii(scene, rng)
    if scene.objects[0].size == "large":
        room = (0.5 - radii[0] - 0.04) * nuisance.position_jitter
        centers = [(0.5 + rng.uniform(-room, room), 0.5 + rng.uniform(-room, room))]
    else:
        quarters = _choose_quarters(scene, rng)
        rooms = [max(0.0, QUARTER_REACH - radius) * nuisance.position_jitter for radius in radii]
        centers = [
            (x + rng.uniform(-room, room), y + rng.uniform(-room, room))
            for (x, y), room in zip(quarters, rooms, strict=True)
        ]
    return tuple(
        PlacedObject(item.color, item.shape, x, y, radius)
        for item, (x, y), radius in zip(scene.objects, centers, radii, strict=True)
    )


def _draw_radii(scene: Scene, rng: random.Random) -> list[float]:
    if scene.relation not in COMPARISONS:
        return [rng.uniform(*RADIUS_RANGES[item.size]) for item in scene.objects]
    radii = [rng.uniform(*LARGER_RADIUS_RANGE), rng.uniform(*SMALLER_RADIUS_RANGE)]
    return radii if scene.relation == "larger than" else radii[::-1]


def _choose_quarters(scene: Scene, rng: random.Random) -> list[tuple[float, float]]:
    """Centers of a quarter for each object; two objects that differ stand side by side or one above the other."""
    if len(set(scene.objects)) == 1:
        return rng.sample([(x, y) for x in QUARTERS for y in QUARTERS], len(scene.objects))
    direction = scene.relation if scene.kind == "relation" else rng.choice(POSITIONS)
    across = rng.choice(QUARTERS)
    along = QUARTERS if direction in ("left of", "above") else QUARTERS[::-1]
    return [(place, across) if direction in ("left of", "right of") else (across, place) for place in along]


def draw_objects(
    objects: Sequence[PlacedObject], rng: random.Random, nuisance: Nuisance = IN_DOMAIN, size: int = 32
) -> Image.Image:
    """Paint objects of known color and shape as an RGB image of `size` x `size` pixels."""
    gray = rng.uniform(*nuisance.background)
    ground = _jittered_color((255 * gray,) * 3, rng, nuisance.tint)
    drawn_size = round(size * rng.uniform(*nuisance.resolution))
    canvas = Image.new("RGB", (drawn_size * DRAWING_SCALE,) * 2, ground)
    drawing = ImageDraw.Draw(canvas)
    for item in objects:
        _draw_object(drawing, item, _jittered_color(COLORS[item.color], rng, nuisance.color_jitter), canvas.width)
    image = canvas.reduce(DRAWING_SCALE)
    if drawn_size != size:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    blur = rng.uniform(*nuisance.blur) * size / 32
    if blur > 0:
        image = image.filter(ImageFilter.GaussianBlur(blur))
    return add_noise(image, rng.uniform(*nuisance.noise), rng)


def _jittered_color(color: Sequence[float], rng: random.Random, jitter: float) -> tuple[int, ...]:
    return tuple(min(255, max(0, round(channel + 255 * rng.uniform(-jitter, jitter)))) for channel in color)


def _draw_object(drawing: ImageDraw.ImageDraw, item: PlacedObject, color: tuple[int, ...], side: int) -> None:
    x, y, radius = item.x * side - 0.5, item.y * side - 0.5, item.radius * side
    if item.shape == "circle":
        drawing.ellipse([x - radius, y - radius, x + radius, y + radius], fill=color)
    elif item.shape == "square":
        half = SQUARE_SIDE * radius
        drawing.rectangle([x - half, y - half, x + half, y + half], fill=color)
    else:
        base = y + TRIANGLE_BASE * radius
        drawing.polygon([(x, y - radius), (x - radius, base), (x + radius, base)], fill=color)


def add_noise(image: Image.Image, noise: float, rng: random.Random) -> Image.Image:
    """Add normal noise of this standard deviation, as a share of the range of values, to an image."""
    if noise <= 0:
        return image
    pixels = np.asarray(image, dtype=np.float32)
    grain = np.random.default_rng(rng.getrandbits(64)).standard_normal(pixels.shape, dtype=np.float32)
    return Image.fromarray((pixels + 255 * noise * grain + 0.5).clip(0, 255).astype(np.uint8))


def render_scene(scene: Scene, rng: random.Random, nuisance: Nuisance = IN_DOMAIN, size: int = 32) -> Image.Image:
    """Lay out a scene and paint it as an RGB image of `size` x `size` pixels, 16 or more."""
    if size < 16:
        raise ValueError(f"`size` is {size}, but shapes need images of 16 pixels or more. Use 32.")
    return draw_objects(place_objects(scene, rng, nuisance), rng, nuisance, size)
