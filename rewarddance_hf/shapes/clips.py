"""
Clips of colored shapes whose truth is known: motion, direction, speed and order of appearance, and faults in time.

A clip has [`NUM_FRAMES`] frames with one object each. What makes one clip better than the other is never in a single
frame: the faulty clip has the same places, colors and shapes at other times, or other ones of those that the prompt
leaves open. In the categories of [`ORDERED_CATEGORIES`] both clips even have the same frames, in another order. But who
knows that a frame is the first or the last can tell which object comes first, or where a motion starts; and beside the
given first frame of an image-to-video row, one later frame may show that the object is another, or has moved.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from .oracle import OracleResult, detect_objects
from .preferences import (
    ALIGNMENT_CRITERIA,
    SPLITS,
    ShapesPreferences,
    _check_arguments,
    _check_index,
    _draw_key,
    _row_rng,
)
from .scenes import (
    ALL_COMPOSITIONS,
    COLORS,
    HELD_OUT_COMPOSITIONS,
    IN_DOMAIN,
    OUT_OF_DOMAIN,
    QUARTERS,
    RADIUS_RANGES,
    SHAPES,
    TRAINING_COMPOSITIONS,
    Nuisance,
    PlacedObject,
    _require_member,
    draw_objects,
)


NUM_FRAMES = 4
# Rows of clips by the beginning of a split's name, e.g. "t2v-id".
CLIP_TASKS = {"video-": None, "t2v-": "text-to-video", "i2v-": "image-to-video"}

# What a caption says of time, with the words for it.
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
TURNS = {"left": -1, "right": 1}  # quarter turns around the middle of the image, a positive one is clockwise
PACES = {"fast": 1.0, "slow": 0.5}  # quarter turns a frame
MANNERS: dict[str, tuple[str, ...]] = {
    "move": tuple(DIRECTIONS),
    "turn": tuple(TURNS),
    "pace": tuple(PACES),
    "stay": ("",),
    "order": ("",),
}
KINDS = tuple(MANNERS)

# Category of a row -> its share, for each task. A first frame that is given decides where an object goes when it may
# go one way only, and what comes first: such rows are for text-to-video.
CATEGORY_SHARES = {
    "text-to-video": {
        "direction": 0.2,
        "turn": 0.2,
        "order": 0.15,
        "motion": 0.15,
        "pace": 0.1,
        "swap": 0.1,
        "flicker": 0.1,
    },
    "image-to-video": {"turn": 0.25, "motion": 0.2, "pace": 0.1, "swap": 0.1, "flicker": 0.1, "first frame": 0.25},
}
ORDERED_CATEGORIES = ("direction", "turn", "order")

# The four quarters of an image in the order of the clock.
_CLOCK = (
    (QUARTERS[0], QUARTERS[0]),
    (QUARTERS[1], QUARTERS[0]),
    (QUARTERS[1], QUARTERS[1]),
    (QUARTERS[0], QUARTERS[1]),
)
# Smaller steps than this are none, and larger ones are motion.
STEP_TOLERANCE = 0.06
# A first frame is kept if its object is as near to that of the given one.
PLACE_TOLERANCE = 0.06


@dataclass(frozen=True)
class ClipScene:
    """
    What a clip must show.

    Args:
        kind (`str`):
            `"move"` (along a line), `"turn"` (around the middle, one way), `"pace"` (around the middle, fast or slow),
            `"stay"` (no motion) or `"order"` (one object, then another).
        objects (`tuple[tuple[str | None, str | None], ...]`):
            Color and shape of the object, and of the second one of an `"order"` scene; None where the caption leaves
            it open, but it must stay the same all the time.
        manner (`str`, *optional*, defaults to `""`):
            Direction, side or pace, by the kind.

    Raises:
        `ValueError`: If kind, objects and manner do not fit together.
    """

    kind: str
    objects: tuple[tuple[str | None, str | None], ...]
    manner: str = ""

    def __post_init__(self) -> None:
        _require_member("kind", self.kind, KINDS)
        _require_member("manner", self.manner, MANNERS[self.kind])
        if len(self.objects) != (2 if self.kind == "order" else 1):
            raise ValueError(
                f"`objects` has {len(self.objects)} entries, but a {self.kind!r} scene has "
                f"{2 if self.kind == 'order' else 1}. Change the kind or the objects."
            )
        for color, shape in self.objects:
            _require_member("color", color, (*COLORS, None))
            _require_member("shape", shape, (*SHAPES, None))
            if color is None and shape is None:
                raise ValueError("`objects` has neither color nor shape, but one of them must be said. Name one.")


# ---- captions ----

_ACTIONS = {
    "move": {"left": "moves to the left", "right": "moves to the right", "up": "moves up", "down": "moves down"},
    "turn": {"left": "turns left", "right": "turns right"},
    "pace": {"fast": "turns fast", "slow": "turns slow"},
    "stay": {"": "stays"},
}
_TRAINING_TEMPLATES = {
    "action": ("{a} {action}", "{a} that {action}", "there is {a} that {action}"),
    "order": ("{a}, then {b}", "{a} and then {b}", "there is {a}, then {b}"),
}
_OUT_OF_DOMAIN_TEMPLATES = {
    "action": ("there is {a} and it {action}", "a picture of {a} that {action}"),
    "order": ("there is {a} and then {b}", "a picture of {a}, then {b}"),
}


def _noun(color: str | None, shape: str | None) -> str:
    if shape is None:
        return f"a {color} one"
    return f"a {shape}" if color is None else f"a {color} {shape}"


_NOUNS = {
    _noun(color, shape): (color, shape) for color in (*COLORS, None) for shape in (*SHAPES, None) if color or shape
}
_ACTION_MEANINGS = {words: (kind, manner) for kind, actions in _ACTIONS.items() for manner, words in actions.items()}
_FIELD_WORDS: dict[str, Iterable[str]] = {"a": _NOUNS, "b": _NOUNS, "action": _ACTION_MEANINGS}


def _template_pattern(template: str) -> re.Pattern[str]:
    def field_pattern(match: re.Match[str]) -> str:
        return f"(?P<{match[1]}>{'|'.join(sorted(_FIELD_WORDS[match[1]], key=len, reverse=True))})"

    return re.compile(re.sub(r"\{(\w+)\}", field_pattern, template))


_PATTERNS = tuple(
    _template_pattern(template)
    for templates in (_TRAINING_TEMPLATES, _OUT_OF_DOMAIN_TEMPLATES)
    for group in templates.values()
    for template in group
)


def clip_paraphrases(scene: ClipScene, split: str = "train") -> tuple[str, ...]:
    """
    Give every caption that a split has for a clip.

    Args:
        scene (`ClipScene`):
            What the clip must show.
        split (`str`, *optional*, defaults to `"train"`):
            `"train"` or `"id"` for the training paraphrases, of which the first is the plainest; `"ood"` for those that
            are never seen in training.

    Returns:
        `tuple[str, ...]`: The captions.

    Raises:
        `ValueError`: If the split is unknown.

    Example:
    ```python
    >>> clip_paraphrases(ClipScene("order", (("red", "circle"), ("blue", "square"))))[0]
    'a red circle, then a blue square'
    ```
    """
    _require_member("split", split, SPLITS)
    templates = _OUT_OF_DOMAIN_TEMPLATES if split == "ood" else _TRAINING_TEMPLATES
    fields = {name: _noun(*item) for name, item in zip("ab", scene.objects)}  # noqa: B905 (one object or two)
    if scene.kind != "order":
        fields["action"] = _ACTIONS[scene.kind][scene.manner]
    return tuple(t.format(**fields) for t in templates["order" if scene.kind == "order" else "action"])


def parse_clip_caption(caption: str) -> ClipScene:
    """
    Read a caption of a clip, in any of its paraphrases.

    Args:
        caption (`str`):
            The caption. Case, outer spaces and a final full stop do not matter.

    Returns:
        `ClipScene`: What the caption describes.

    Raises:
        `ValueError`: If the caption is not of this grammar.

    Example:
    ```python
    >>> parse_clip_caption("there is a circle that turns left")
    ClipScene(kind='turn', objects=((None, 'circle'),), manner='left')
    ```
    """
    text = caption.strip().removesuffix(".").lower()
    for pattern in _PATTERNS:
        match = pattern.fullmatch(text)
        if match is not None:
            fields = match.groupdict()
            if "b" in fields:
                return ClipScene("order", (_NOUNS[fields["a"]], _NOUNS[fields["b"]]))
            kind, manner = _ACTION_MEANINGS[fields["action"]]
            return ClipScene(kind, (_NOUNS[fields["a"]],), manner)
    raise ValueError(
        f"`caption` is {caption!r}, but only captions of clips of shapes can be read. Write it as `clip_paraphrases` does, "
        "for example 'a red circle moves to the left'."
    )


# ---- the oracle ----


@dataclass(frozen=True)
class ClipOracleResult(OracleResult):
    """
    What the oracle found in a clip.

    Args:
        facts (`dict[str, bool]`):
            Whether each fact of the caption holds: `"number"` (one object in each frame), `"color"`, `"shape"`,
            `"steady"` (the same object all the time, but in `"order"` scenes), then by caption `"direction"`, `"turn"`,
            `"pace"`, `"stay"` or `"order"`, and `"first frame"` where one was given.
        objects (`tuple[PlacedObject, ...]`):
            Objects of the first frame.
        frames (`tuple[tuple[PlacedObject, ...], ...]`):
            Objects of each frame.
    """

    frames: tuple[tuple[PlacedObject, ...], ...] = ()


def check_clip(
    frames: Sequence[Image.Image | np.ndarray], caption: str, condition: Image.Image | np.ndarray | None = None
) -> ClipOracleResult:
    """
    Tell which facts of a caption a clip shows. It reads pixels only.

    Args:
        frames (`Sequence` of `PIL.Image.Image` or `np.ndarray` of shape `(height, width, 3)`):
            Frames in their order, two or more; arrays hold integers up to 255 or floats in [0, 1].
        caption (`str`):
            A caption of a clip, in any paraphrase.
        condition (`PIL.Image.Image` or `np.ndarray`, *optional*):
            First frame that was given.

    Returns:
        [`ClipOracleResult`]: The facts, and the objects that were found.

    Raises:
        `ValueError`: If the caption is not of this grammar, there are fewer than two frames, or one is no RGB image.
    """
    scene = parse_clip_caption(caption)
    if len(frames) < 2:
        raise ValueError(f"`frames` has {len(frames)} entries, but a clip has two or more. Pass all of its frames.")
    shown = tuple(detect_objects(frame) for frame in frames)
    facts = check_clip_facts(scene, shown, None if condition is None else detect_objects(condition))
    return ClipOracleResult(facts, shown[0], shown)


def check_clip_facts(
    scene: ClipScene,
    frames: Sequence[Sequence[PlacedObject]],
    condition: Sequence[PlacedObject] | None = None,
) -> dict[str, bool]:
    """
    Tell which facts of a clip hold for placed objects.

    Args:
        scene (`ClipScene`):
            What is wanted.
        frames (`Sequence[Sequence[PlacedObject]]`):
            What each frame shows.
        condition (`Sequence[PlacedObject]`, *optional*):
            What the given first frame shows.

    Returns:
        `dict[str, bool]`: The facts, named as in [`ClipOracleResult`].
    """
    lone = [objects[0] for objects in frames if len(objects) == 1]
    facts = {"number": len(lone) == len(frames)}
    names = [(item.color, item.shape) for item in lone]
    if scene.kind == "order":
        first, second = scene.objects
        changes = [i for i, (a, b) in enumerate(zip(names, names[1:], strict=False)) if a != b]
        facts["color"] = {color for color, _ in names} == {first[0], second[0]}
        facts["shape"] = {shape for _, shape in names} == {first[1], second[1]}
        facts["order"] = facts["number"] and len(changes) == 1 and [names[0], names[-1]] == [first, second]
    else:
        ((color, shape),) = scene.objects
        facts["color"] = bool(names) and (color is None or all(name[0] == color for name in names))
        facts["shape"] = bool(names) and (shape is None or all(name[1] == shape for name in names))
        facts["steady"] = len(set(names)) == 1
        fact = {"move": "direction"}.get(scene.kind, scene.kind)
        path = np.array([(item.x, item.y) for item in lone])
        facts[fact] = facts["number"] and _MOTIONS[scene.kind](path, scene.manner)
    if condition is not None:
        facts["first frame"] = _same_objects(condition, frames[0])
    return facts


def _same_objects(wanted: Sequence[PlacedObject], shown: Sequence[PlacedObject]) -> bool:
    return len(wanted) == len(shown) and all(
        any(
            (a.color, a.shape) == (b.color, b.shape) and max(abs(a.x - b.x), abs(a.y - b.y)) <= PLACE_TOLERANCE
            for b in shown
        )
        for a in wanted
    )


def _moves(path: np.ndarray, direction: str) -> bool:
    steps = np.diff(path, axis=0)
    along = np.array(DIRECTIONS[direction])
    return bool((steps @ along > STEP_TOLERANCE).all() and (np.abs(steps @ along[::-1]) <= STEP_TOLERANCE).all())


def _quarter_turns(path: np.ndarray) -> np.ndarray:
    """Quarter turns from frame to frame: -1, 0, 1 or 2."""
    clock = np.array([_CLOCK.index((QUARTERS[int(x > 0.5)], QUARTERS[int(y > 0.5)])) for x, y in path])
    return (np.diff(clock) + 1) % 4 - 1


def _turns(path: np.ndarray, side: str) -> bool:
    turns = _quarter_turns(path)
    return bool(set(turns.tolist()) <= {0, TURNS[side]} and turns.any())


def _turns_at_pace(path: np.ndarray, pace: str) -> bool:
    turns = _quarter_turns(path)
    one_way = len(set(turns.tolist()) - {0}) == 1 and 2 not in turns
    return bool(one_way and (np.count_nonzero(turns) == len(turns)) == (pace == "fast"))


def _stays(path: np.ndarray, manner: str) -> bool:
    return bool((np.ptp(path, axis=0) <= STEP_TOLERANCE).all())


_MOTIONS: dict[str, Callable[[np.ndarray, str], bool]] = {
    "move": _moves,
    "turn": _turns,
    "pace": _turns_at_pace,
    "stay": _stays,
}


# ---- rows ----


class ShapesClipPreferences(Dataset):
    """
    Preference rows about clips of colored shapes, made when they are asked for.

    A row holds `prompt` (`str`), `chosen` and `rejected` (lists of [`NUM_FRAMES`] `PIL.Image.Image`), `task`, `criteria`
    (`str`), `rationale` (a `dict` with the texts that follow the verdicts `"yes"` and `"no"`) and `category`; rows of
    `"image-to-video"` also `condition`, the given first frame.

    Args:
        num_rows (`int`):
            Number of rows.
        split (`str`, *optional*, defaults to `"train"`):
            `"train"`; `"id"` for other rows of the same kind; `"ood"` for pairs of color and shape, paraphrases and
            drawing conditions that no training row has.
        task (`str`, *optional*):
            `"text-to-video"` or `"image-to-video"`. Rows take turns when left out.
        seed (`int`, *optional*, defaults to `0`):
            Rows depend on it, on the split and on their index, and on nothing else.
        size (`int`, *optional*, defaults to `32`):
            Side of the frames in pixels.
        shuffled (`bool`, *optional*, defaults to `False`):
            Whether the frames of each clip come in an order of their own, drawn at random. Rows of
            [`ORDERED_CATEGORIES`] cannot be decided then, and are the only ones.

    Raises:
        `TypeError`: If a number is no integer.
        `ValueError`: If a number is out of range, or split or task is unknown.

    Example:
    ```python
    >>> row = ShapesClipPreferences(100, "id", task="image-to-video")[0]
    >>> len(row["chosen"]), row["chosen"][0].size
    (4, (32, 32))
    ```
    """

    def __init__(
        self,
        num_rows: int,
        split: str = "train",
        task: str | None = None,
        seed: int = 0,
        size: int = 32,
        shuffled: bool = False,
    ) -> None:
        _check_arguments(num_rows, seed, size)
        _require_member("split", split, SPLITS)
        if task is not None:
            _require_member("task", task, CATEGORY_SHARES)
        self.num_rows = num_rows
        self.split = split
        self.tasks = (task,) if task else tuple(CATEGORY_SHARES)
        self.seed = seed
        self.size = size
        self.shuffled = shuffled

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = _check_index(index, self.num_rows)
        rng = _row_rng("clips", self.seed, self.split, index)
        task = self.tasks[index % len(self.tasks)]
        row = make_clip_preference(rng, self.split, task, self.size)
        if self.shuffled:
            while row["category"] not in ORDERED_CATEGORIES:
                row = make_clip_preference(rng, self.split, task, self.size)
            # The reasons tell of frames in their order.
            row = {name: value for name, value in row.items() if name != "rationale"}
            row |= {name: rng.sample(row[name], NUM_FRAMES) for name in ("chosen", "rejected")}
        return row


def load_shapes(name: str, num_rows: int, seed: int = 0) -> ShapesPreferences | ShapesClipPreferences:
    """
    Give rows of the shapes world by name.

    Args:
        name (`str`):
            `"train"`, `"id"` or `"ood"` for images; with `"video-"` before it for clips of both tasks, with `"t2v-"` or
            `"i2v-"` for those of one, and `"-shuffled"` after it for frames without their order, e.g.
            `"t2v-id-shuffled"`.
        num_rows (`int`):
            Number of rows.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the rows.

    Returns:
        [`~rewarddance_hf.shapes.preferences.ShapesPreferences`] or [`ShapesClipPreferences`]

    Raises:
        `ValueError`: If there are no such rows.
    """
    for beginning, task in CLIP_TASKS.items():
        if name.startswith(beginning):
            split = name.removeprefix(beginning)
            shuffled = split.endswith("-shuffled")
            return ShapesClipPreferences(num_rows, split.removesuffix("-shuffled"), task, seed, shuffled=shuffled)
    return ShapesPreferences(num_rows, name, seed)


@dataclass(frozen=True)
class _Plan:
    """What a clip shows: a place and a pair of color and shape for each frame."""

    path: tuple[tuple[float, float], ...]
    names: tuple[tuple[str, str], ...]

    @property
    def description(self) -> str:
        """
        What each frame shows: a place, and the object where it is another than before. Words like "turns left" would follow from prompt and verdict, so that a judge could learn to
        write them without looking.
        """
        words = []
        for (x, y), name, before in zip(self.path, self.names, (None, *self.names), strict=False):
            place = f"{'above' if y < 0.5 else 'below'} {'left' if x < 0.5 else 'right'}"
            words.append(place if name == before else f"{' '.join(name)} {place}")
        return ", ".join(words)


def make_clip_preference(rng: random.Random, split: str, task: str, size: int = 32) -> dict[str, Any]:
    """
    Make one preference row of clips.

    Args:
        rng (`random.Random`):
            Source of every choice.
        split (`str`):
            One of `SPLITS`.
        task (`str`):
            `"text-to-video"` or `"image-to-video"`.
        size (`int`, *optional*, defaults to `32`):
            Side of the frames in pixels.

    Returns:
        `dict[str, Any]`: A row as [`ShapesClipPreferences`] describes it.
    """
    nuisance = OUT_OF_DOMAIN if split == "ood" else IN_DOMAIN
    category = _draw_key(rng, CATEGORY_SHARES[task])
    given = task == "image-to-video"
    scene, chosen, rejected = _plan_pair(category, given, split, rng)
    radius = rng.uniform(*RADIUS_RANGES[None])
    jitter = 0.05 * nuisance.position_jitter
    shifts = [(rng.uniform(-jitter, jitter), rng.uniform(-jitter, jitter)) for _ in range(2)]
    looks = [rng.getrandbits(64) for _ in range(2)]
    if given:  # both clips go on from the same image, each in its own way
        shifts[1], looks[1] = shifts[0], looks[0]
    clips = [
        _draw_plan(plan, radius, shift, look, nuisance, size)
        for plan, shift, look in zip((chosen, rejected), shifts, looks, strict=True)
    ]
    words = chosen.description, rejected.description
    row = {
        "prompt": rng.choice(clip_paraphrases(scene, split)),
        "chosen": clips[0],
        "rejected": clips[1],
        "task": task,
        "criteria": ALIGNMENT_CRITERIA,
        "rationale": {
            "yes": f"Image 1: {words[1]}. Image 2: {words[0]}.",
            "no": f"Image 1: {words[0]}. Image 2: {words[1]}.",
        },
        "category": category,
    }
    return {**row, "condition": clips[0][0].copy()} if given else row


def _plan_pair(category: str, given: bool, split: str, rng: random.Random) -> tuple[ClipScene, _Plan, _Plan]:
    """Scene of the prompt, a clip that shows it, and one that does not."""
    name, other = _draw_names(split, rng)
    if category == "order":
        scene = ClipScene("order", (name, other))
        switch = rng.randint(1, NUM_FRAMES - 1)
        names = (name,) * switch + (other,) * (NUM_FRAMES - switch)
        plans = [
            _Plan((place,) * NUM_FRAMES, shown)
            for place, shown in ((rng.choice(_CLOCK), names), (rng.choice(_CLOCK), names[::-1]))
        ]
        return scene, plans[0], plans[1]

    full = _draw_scene(category, given, name, rng)
    start = rng.randrange(4)
    chosen = _plan(full, start, (name,) * NUM_FRAMES, rng)
    rejected_start = start if given else rng.randrange(4)
    if category in ("direction", "turn", "pace"):
        others = [manner for manner in MANNERS[full.kind] if manner != full.manner]
        if category == "direction":
            opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
            others = [opposite[full.manner]]
        wrong = replace(full, manner=rng.choice(others))
        return full, chosen, _plan(wrong, rejected_start, chosen.names, rng)
    if category == "motion":
        wrong = _draw_scene("motion", given, name, rng, moving=full.kind == "stay")
        return full, chosen, _plan(wrong, rejected_start, chosen.names, rng)
    # What changes, or differs from the given first frame, is what the prompt leaves open.
    open_color = name[1] == other[1]
    scene = replace(full, objects=((None, name[1]) if open_color else (name[0], None),))
    if category == "first frame":
        return scene, chosen, _plan(full, start, (other,) * NUM_FRAMES, rng)
    pattern = (0, 0, 1, 1) if category == "swap" else (0, 1, 0, 1)
    names = tuple((name, other)[i] for i in pattern)
    return scene, chosen, _plan(full, rejected_start, names, rng)


def _draw_names(split: str, rng: random.Random) -> tuple[tuple[str, str], tuple[str, str]]:
    """Two pairs of color and shape of which exactly one part is the same."""
    allowed = ALL_COMPOSITIONS if split == "ood" else TRAINING_COMPOSITIONS
    while True:
        name = rng.choice(sorted(HELD_OUT_COMPOSITIONS) if split == "ood" else allowed)
        same = rng.randrange(2)
        others = [pair for pair in allowed if pair[same] == name[same] and pair != name]
        if others:
            return name, rng.choice(others)


def _draw_scene(
    category: str, given: bool, name: tuple[str, str], rng: random.Random, moving: bool | None = None
) -> ClipScene:
    if category == "motion":
        moving = rng.random() < 0.5 if moving is None else moving
        kinds = ["turn"] if moving else ["stay"]
    else:
        kinds = {"direction": ["move"], "turn": ["turn"], "pace": ["pace"]}.get(category, ["turn", "stay"])
    kind = rng.choice(kinds)
    return ClipScene(kind, (name,), rng.choice(MANNERS[kind]))


def _plan(scene: ClipScene, start: int, names: tuple[tuple[str, str], ...], rng: random.Random) -> _Plan:
    if scene.kind == "move":
        along = np.array(DIRECTIONS[scene.manner])
        across = np.array([rng.choice(QUARTERS)] * 2) * (1 - np.abs(along))
        ends = np.abs(along) * 0.5 + across
        reach = (QUARTERS[1] - QUARTERS[0]) / 2
        path = [tuple(ends + along * share) for share in np.linspace(-reach, reach, NUM_FRAMES)]
    else:
        pace = PACES[scene.manner] if scene.kind == "pace" else float(scene.kind == "turn")
        side = TURNS[scene.manner] if scene.kind == "turn" else rng.choice((-1, 1))
        path = [_CLOCK[(start + side * int(pace * frame)) % 4] for frame in range(NUM_FRAMES)]
    return _Plan(tuple((float(x), float(y)) for x, y in path), names)


def _draw_plan(
    plan: _Plan, radius: float, shift: tuple[float, float], look: int, nuisance: Nuisance, size: int
) -> list[Image.Image]:
    return [
        # Each frame starts from the same seed: ground, colors and noise stay as they are.
        draw_objects([PlacedObject(*name, x + shift[0], y + shift[1], radius)], random.Random(look), nuisance, size)
        for (x, y), name in zip(plan.path, plan.names, strict=True)
    ]
