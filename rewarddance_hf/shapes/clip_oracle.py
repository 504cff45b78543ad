"""The oracle of clips: which facts of a caption the pixels show, in each frame and over time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .clip_scenes import CLOCK, DIRECTIONS, TURNS, ClipScene, parse_clip_caption
from .drawing import QUARTERS
from .oracle import OracleResult, detect_objects
from .scenes import PlacedObject


# Smaller steps than this are none, and larger ones are motion.
STEP_TOLERANCE = 0.06
# A first frame is kept if its object is as near to that of the given one.
PLACE_TOLERANCE = 0.06


@dataclass(frozen=True)
class ClipOracleResult(OracleResult):
    """
    What the oracle found in a clip: `frames` are the objects of each frame, `objects` those of the first.

    Facts are `"number"` (one object in each frame), `"color"`, `"shape"`, `"steady"` (the same object all the time, except in
    `"order"` scenes), then by caption `"direction"`, `"turn"`, `"pace"`, `"stay"` or `"order"`, and `"first frame"` where
    one was given.
    """

    frames: tuple[tuple[PlacedObject, ...], ...] = ()


def check_clip(
    frames: Sequence[Image.Image | np.ndarray], caption: str, condition: Image.Image | np.ndarray | None = None
) -> ClipOracleResult:
    """Which facts of a caption a clip of two frames or more shows, by its pixels; `condition` is the given first frame."""
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
    """Which facts of a clip hold for the placed objects of each frame, named as in [`ClipOracleResult`]."""
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
    clock = np.array([CLOCK.index((QUARTERS[int(x > 0.5)], QUARTERS[int(y > 0.5)])) for x, y in path])
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
