"""
Scenes of colored shapes: what they may show, how they are described, how they are drawn.

A [`Scene`] says what an image must show; [`place_objects`] chooses where, [`draw_objects`] paints it. Every random
choice comes from the `random.Random` that the caller gives, so an image is the same in every process.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter


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
class SceneObject:
    """
    One object that a scene must show.

    Args:
        color (`str`):
            A key of `COLORS`.
        shape (`str`):
            One of `SHAPES`.
        size (`str`, *optional*):
            One of `SIZES`; any ordinary size when left out.

    Raises:
        `ValueError`: If a value is not of this world.
    """

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
        """`tuple[str, str]`: Color and shape, the pair that the out-of-domain split holds out."""
        return self.color, self.shape


@dataclass(frozen=True)
class Scene:
    """
    What an image must show.

    Args:
        kind (`str`):
            `"single"` (one object), `"count"` (one to four objects that look alike), `"binding"` (two objects that
            differ), `"relation"` (two objects and where the first lies) or `"size"` (one object with a size, or two
            objects and which is larger).
        objects (`tuple[SceneObject, ...]`):
            The objects, in the order in which a caption names them.
        relation (`str`, *optional*):
            One of `POSITIONS` or `COMPARISONS`, between the first object and the second.

    Raises:
        `ValueError`: If kind, objects and relation do not fit together.
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
        """`frozenset[tuple[str, str]]`: The pairs of color and shape in this scene."""
        return frozenset(item.composition for item in self.objects)


@dataclass(frozen=True)
class PlacedObject:
    """
    An object at its place in an image, drawn there or detected there.

    Args:
        color (`str`, *optional*):
            A key of `COLORS`; `None` for a detected color that is not of this world.
        shape (`str`, *optional*):
            One of `SHAPES`; `None` for a detected shape that is not of this world.
        x (`float`):
            Center from the left, as a share of the image's width.
        y (`float`):
            Center from the top, as a share of the image's height.
        radius (`float`):
            Half extent as a share of the image's side.
    """

    color: str | None
    shape: str | None
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Nuisance:
    """
    What may vary in an image without changing what it shows. Pairs are ranges from which an image's value is drawn.

    Args:
        background (`tuple[float, float]`, *optional*, defaults to `(0.08, 0.24)`):
            Gray level of the ground, 0 is black.
        tint (`float`, *optional*, defaults to `0.02`):
            Largest departure of each of the ground's channels from gray.
        color_jitter (`float`, *optional*, defaults to `0.06`):
            Largest departure of each channel of an object's color.
        position_jitter (`float`, *optional*, defaults to `0.6`):
            Share of the free room that objects may wander.
        noise (`tuple[float, float]`, *optional*, defaults to `(0.0, 0.02)`):
            Standard deviation of the noise on each pixel's channel.
        blur (`tuple[float, float]`, *optional*, defaults to `(0.0, 0.3)`):
            Standard deviation of the blur in pixels of an image of side 32; larger ones are blurred in proportion.
        resolution (`tuple[float, float]`, *optional*, defaults to `(0.95, 1.0)`):
            Share of the side at which the image is drawn before it is enlarged.
    """

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


# ---- captions ----

# Each field of a template, with what its words mean.
_FIELD_WORDS: dict[str, dict[str, str]] = {
    "color_a": {color: color for color in COLORS},
    "color_b": {color: color for color in COLORS},
    "shape_a": {shape: shape for shape in SHAPES},
    "shape_b": {shape: shape for shape in SHAPES},
    "plural": {"": "", "s": "s"},
    "number": {number: number for number in NUMBERS},
    "size": {size: size for size in SIZES},
    "position": {position: position for position in POSITIONS},
    "toward": {
        "to the left of": "left of",
        "to the right of": "right of",
        "just above": "above",
        "just below": "below",
    },
    "beside": {"on its left": "left of", "on its right": "right of", "above it": "above", "below it": "below"},
    "comparison": {comparison: comparison for comparison in COMPARISONS},
    "comparative": {"larger": "larger than", "smaller": "smaller than"},
}
_RELATION_FIELDS = ("position", "toward", "beside", "comparison", "comparative")
_A = "a {color_a} {shape_a}"
_B = "a {color_b} {shape_b}"
_ALIKE = "{color_a} {shape_a}{plural}"

# The first template of each row of training templates is the canonical caption.
_TRAINING_TEMPLATES = {
    "single": (_A, "a {shape_a} in {color_a}", f"a picture of {_A}", f"there is {_A}"),
    "count": (f"{{number}} {_ALIKE}", f"a picture of {{number}} {_ALIKE}", "{number} {shape_a}{plural} in {color_a}"),
    "binding": (f"{_A} and {_B}", f"a picture of {_A} and {_B}", f"{_A} with {_B}"),
    "relation": (f"{_A} {{position}} {_B}", f"{_A} {{toward}} {_B}", f"{_B} with {_A} {{beside}}"),
    "size": ("a {size} {color_a} {shape_a}", "a picture of a {size} {color_a} {shape_a}", f"{_A} that is {{size}}"),
    "comparison": (
        f"{_A} {{comparison}} {_B}",
        f"a picture of {_A} {{comparison}} {_B}",
        f"{_B} with a {{comparative}} {{color_a}} {{shape_a}}",
    ),
}
# New orders of known words, so that a model which reads words one by one can understand them.
_OUT_OF_DOMAIN_TEMPLATES = {
    "single": ("a picture of a {shape_a} in {color_a}", "there is a {shape_a} in {color_a}"),
    "count": ("a picture of {number} {shape_a}{plural} in {color_a}",),
    "binding": (f"there is {_A} and {_B}", f"a picture of {_A} with {_B}"),
    "relation": (f"a picture of {_A} {{position}} {_B}", f"there is {_A} {{toward}} {_B}"),
    "size": ("there is a {size} {color_a} {shape_a}", f"a picture of {_A} that is {{size}}"),
    "comparison": (f"there is {_A} {{comparison}} {_B}", f"{_A} that is {{comparison}} {_B}"),
}


def require_member(name: str, value: object, allowed: Iterable[object]) -> None:
    """
    Raise an error which names the argument unless its value is allowed.

    Args:
        name (`str`):
            Name of the argument.
        value (`object`):
            Its value.
        allowed (`Iterable`):
            Values that it may have.

    Raises:
        `ValueError`: If it has another one.
    """
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"`{name}` is {value!r}, but must be one of {allowed}. Choose one of them.")


def _template_group(scene: Scene) -> str:
    return "comparison" if scene.kind == "size" and scene.relation is not None else scene.kind


def _template_pattern(template: str) -> re.Pattern[str]:
    """Turn a template into a pattern with one named group for each field."""

    def field_pattern(match: re.Match[str]) -> str:
        words = sorted(_FIELD_WORDS[match[1]], key=len, reverse=True)
        return f"(?P<{match[1]}>{'|'.join(words)})"

    return re.compile(re.sub(r"\{(\w+)\}", field_pattern, template))


_PATTERNS = tuple(
    (group, _template_pattern(template))
    for templates in (_TRAINING_TEMPLATES, _OUT_OF_DOMAIN_TEMPLATES)
    for group, group_templates in templates.items()
    for template in group_templates
)


def _fill_template(template: str, scene: Scene) -> str:
    fields = {"number": NUMBERS[len(scene.objects) - 1], "plural": "" if len(scene.objects) == 1 else "s"}
    for name, item in zip("ab", scene.objects):  # noqa: B905 (a scene may have fewer or more than two objects)
        fields[f"color_{name}"], fields[f"shape_{name}"] = item.color, item.shape
    if scene.objects[0].size is not None:
        fields["size"] = scene.objects[0].size
    if scene.relation is not None:
        for field in _RELATION_FIELDS:
            fields[field] = next(
                (words for words, meant in _FIELD_WORDS[field].items() if meant == scene.relation), ""
            )
    return template.format(**fields)


def caption_paraphrases(scene: Scene, split: str = "train") -> tuple[str, ...]:
    """
    Give every caption that a split has for a scene.

    Args:
        scene (`Scene`):
            The scene to describe.
        split (`str`, *optional*, defaults to `"train"`):
            `"train"` or `"id"` for the training paraphrases, of which the first is the canonical caption; `"ood"` for
            those that are never seen in training.

    Returns:
        `tuple[str, ...]`: The captions.

    Raises:
        `ValueError`: If the split is unknown.

    Example:
    ```python
    >>> scene = Scene("relation", (SceneObject("red", "circle"), SceneObject("blue", "square")), "left of")
    >>> caption_paraphrases(scene)[2]
    'a blue square with a red circle on its left'
    ```
    """
    require_member("split", split, ("train", "id", "ood"))
    templates = _OUT_OF_DOMAIN_TEMPLATES if split == "ood" else _TRAINING_TEMPLATES
    return tuple(_fill_template(template, scene) for template in templates[_template_group(scene)])


def canonical_caption(scene: Scene) -> str:
    """
    Describe a scene in its plainest words.

    Args:
        scene (`Scene`):
            The scene to describe.

    Returns:
        `str`: The canonical caption.

    Example:
    ```python
    >>> canonical_caption(Scene("count", (SceneObject("red", "circle"),) * 3))
    'three red circles'
    ```
    """
    return caption_paraphrases(scene)[0]


def parse_caption(caption: str) -> Scene:
    """
    Read a caption, in any of its paraphrases, back into the scene that it describes.

    Args:
        caption (`str`):
            The caption. Case, outer spaces and a final full stop do not matter.

    Returns:
        `Scene`: The scene that the caption describes.

    Raises:
        `ValueError`: If the caption is not of this world's grammar.

    Example:
    ```python
    >>> parse_caption("a circle in red").objects
    (SceneObject(color='red', shape='circle', size=None),)
    ```
    """
    text = caption.strip().removesuffix(".").lower()
    for group, pattern in _PATTERNS:
        match = pattern.fullmatch(text)
        if match is not None:
            return _scene_from_fields(group, match.groupdict())
    raise ValueError(
        f"`caption` is {caption!r}, but only captions of the shapes world can be read. "
        "Write it as `caption_paraphrases` does, for example 'a red circle left of a blue square'."
    )


def _scene_from_fields(group: str, fields: dict[str, str]) -> Scene:
    objects = [SceneObject(fields["color_a"], fields["shape_a"], fields.get("size"))]
    if "color_b" in fields:
        objects.append(SceneObject(fields["color_b"], fields["shape_b"]))
    if "number" in fields:
        objects *= NUMBERS.index(fields["number"]) + 1
    relation = next((_FIELD_WORDS[field][fields[field]] for field in _RELATION_FIELDS if field in fields), None)
    return Scene("size" if group == "comparison" else group, tuple(objects), relation)


def caption_words() -> list[str]:
    """
    Give every word that a caption may hold, for building a tokenizer in which each is one token.

    Returns:
        `list[str]`: The words in alphabetical order.
    """
    templates = [*_TRAINING_TEMPLATES.values(), *_OUT_OF_DOMAIN_TEMPLATES.values()]
    texts = [re.sub(r"\{\w+\}", " ", template) for group in templates for template in group]
    texts += [words for field, phrases in _FIELD_WORDS.items() if field != "plural" for words in phrases]
    words = {word for text in texts for word in text.split()}
    return sorted(words | {f"{shape}s" for shape in SHAPES})


# ---- sampling ----


def sample_scene(
    rng: random.Random, kind: str, compositions: Sequence[tuple[str, str]] = TRAINING_COMPOSITIONS
) -> Scene:
    """
    Draw a scene.

    Args:
        rng (`random.Random`):
            Source of every choice.
        kind (`str`):
            One of `KINDS`.
        compositions (`Sequence[tuple[str, str]]`, *optional*, defaults to `TRAINING_COMPOSITIONS`):
            Pairs of color and shape to choose from, at least two.

    Returns:
        `Scene`: The scene.

    Raises:
        `ValueError`: If the kind is unknown.
    """
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


# ---- drawing ----


def place_objects(scene: Scene, rng: random.Random, nuisance: Nuisance = IN_DOMAIN) -> tuple[PlacedObject, ...]:
    """
    Choose a size and a place for each object so that the scene holds and no two objects touch.

    Args:
        scene (`Scene`):
            The scene to lay out.
        rng (`random.Random`):
            Source of every choice.
        nuisance (`Nuisance`, *optional*, defaults to `IN_DOMAIN`):
            Gives the position jitter.

    Returns:
        `tuple[PlacedObject, ...]`: The placed objects, in the scene's order.
    """
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
    """
    Paint placed objects.

    Args:
        objects (`Sequence[PlacedObject]`):
            The objects, with known color and shape.
        rng (`random.Random`):
            Source of every choice.
        nuisance (`Nuisance`, *optional*, defaults to `IN_DOMAIN`):
            What varies besides the objects.
        size (`int`, *optional*, defaults to `32`):
            Side of the image in pixels.

    Returns:
        `PIL.Image.Image`: An RGB image.
    """
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
    noise = rng.uniform(*nuisance.noise)
    return _add_noise(image, noise, rng) if noise > 0 else image


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


def _add_noise(image: Image.Image, noise: float, rng: random.Random) -> Image.Image:
    pixels = np.asarray(image, dtype=np.float32)
    grain = np.random.default_rng(rng.getrandbits(64)).standard_normal(pixels.shape, dtype=np.float32)
    return Image.fromarray((pixels + 255 * noise * grain + 0.5).clip(0, 255).astype(np.uint8))


def render_scene(scene: Scene, rng: random.Random, nuisance: Nuisance = IN_DOMAIN, size: int = 32) -> Image.Image:
    """
    Lay out a scene and paint it.

    Args:
        scene (`Scene`):
            What to show.
        rng (`random.Random`):
            Source of every choice.
        nuisance (`Nuisance`, *optional*, defaults to `IN_DOMAIN`):
            What varies besides the scene.
        size (`int`, *optional*, defaults to `32`):
            Side of the image in pixels, at least 16.

    Returns:
        `PIL.Image.Image`: An RGB image of `size` x `size` pixels.

    Raises:
        `ValueError`: If the size is too small to show a shape.
    """
    if size < 16:
        raise ValueError(f"`size` is {size}, but shapes need images of 16 pixels or more. Use 32.")
    return draw_objects(place_objects(scene, rng, nuisance), rng, nuisance, size)
