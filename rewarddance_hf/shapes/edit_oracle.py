"""The oracle of edits: does an image show what an instruction asks of its source image, and all else as it was?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from .edit_instructions import Edit, parse_instruction
from .oracle import OracleResult, detect_objects
from .scenes import PlacedObject


# As shares of the image's side: an object that is farther from its place has moved, and a move goes at least so far.
PLACE_TOLERANCE = 0.07
SMALLEST_MOVE = 0.2
# Ratios of radii: within the first an object has its size still, beyond the second it is larger (or smaller) to be seen.
SAME_SIZE = 1.17
OTHER_SIZE = 1.22
_DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def check_edit(source: Image.Image | np.ndarray, instruction: str, result: Image.Image | np.ndarray) -> OracleResult:
    """
    Which facts of an edit hold, by the pixels of source and result, which may differ in size; arrays as for
    [`~rewarddance_hf.shapes.oracle.check`].

    Facts are `"instruction"` (what is asked for is there), `"target"` (the object that it is about is the same in all that it
    does not ask to change; not for objects that are added or removed), and `"others"` (every other object has its color,
    shape, place and size still, and there is nothing new). `objects` of the result are those of the edited image.

    Raises a `ValueError` if the instruction cannot be read, or is about an object that the source image does not show once.
    """
    objects = detect_objects(result)
    return OracleResult(check_edit_facts(parse_instruction(instruction), detect_objects(source), objects), objects)


def check_edit_facts(edit: Edit, before: Sequence[PlacedObject], after: Sequence[PlacedObject]) -> dict[str, bool]:
    """Which facts of an edit hold for the placed objects of source and result, named as in [`check_edit`]."""
    targets = [item for item in before if (item.color, item.shape) == edit.name]
    if len(targets) != (edit.kind != "add"):
        wanted = "no such object" if edit.kind == "add" else "one such object"
        raise ValueError(
            f"The instruction is about a {' '.join(edit.name)}, of which the source image shows {len(targets)}, but there must be "
            f"{wanted}. Pass the image that the instruction was written for."
        )
    left = list(after)
    kept = True
    for item in before:
        if (item.color, item.shape) != edit.name:
            same = next((other for other in left if _is_same(item, other)), None)
            kept = kept and same is not None
            if same is not None:
                left.remove(same)
    if edit.kind == "remove":
        remains = [item for item in left if (item.color, item.shape) == edit.name or _at_place(item, targets[0])]
        return {"instruction": not remains, "others": kept and len(remains) == len(left)}
    if edit.kind == "add":
        added = [item for item in left if (item.color, item.shape) == edit.name]
        return {"instruction": bool(added), "others": kept and len(left) == len(added) <= 1}
    # Of what is new, the target is what makes most facts hold, and is most like it.
    candidates = [_target_facts(edit, targets[0], item) for item in left]
    missing = {"instruction": False, "target": False}
    facts = max(candidates, key=lambda found: (sum(found.values()), found["target"]), default=missing)
    return {**facts, "others": kept and len(left) <= 1}


def _target_facts(edit: Edit, target: PlacedObject, item: PlacedObject) -> dict[str, bool]:
    ratio = item.radius / target.radius
    is_sized = 1 / SAME_SIZE <= ratio <= SAME_SIZE
    is_named = (item.color, item.shape) == edit.name
    if edit.kind == "color":
        kept = item.shape == edit.shape and is_sized and _at_place(item, target)
        return {"instruction": item.color == edit.value, "target": kept}
    if edit.kind == "size":
        changed = ratio >= OTHER_SIZE if edit.value == "larger" else ratio <= 1 / OTHER_SIZE
        return {"instruction": changed, "target": is_named and _at_place(item, target)}
    along, across = _DIRECTIONS[str(edit.value)], (item.x - target.x, item.y - target.y)
    moved = along[0] * across[0] + along[1] * across[1]
    aside = abs(along[1] * across[0]) + abs(along[0] * across[1])
    return {"instruction": moved >= SMALLEST_MOVE and aside <= PLACE_TOLERANCE, "target": is_named and is_sized}


def _is_same(a: PlacedObject, b: PlacedObject) -> bool:
    is_sized = 1 / SAME_SIZE <= b.radius / a.radius <= SAME_SIZE
    return (a.color, a.shape) == (b.color, b.shape) and is_sized and _at_place(a, b)


def _at_place(a: PlacedObject, b: PlacedObject) -> bool:
    return max(abs(a.x - b.x), abs(a.y - b.y)) <= PLACE_TOLERANCE
