"""
Check what a judge of shapes writes after its verdict: does it say what the images show, and what is wrong with them?

Nothing is guessed from words: a rationale is read back into scenes, and these are held against the true ones of the row.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .captions import parse_caption
from .drawing import place_objects
from .oracle import check_facts
from .scenes import Scene


_RATIONALE = re.compile(r"\s*Image 1: (.+)\. Image 2: (.+)\.\s*", re.DOTALL)


@dataclass(frozen=True)
class RationaleCheck:
    """
    What is right about a rationale; all is False if it is not `readable`: in the grammar of shapes, about both images.

    `fault_named` tells whether what it says of the rejected image breaks the very facts of the prompt that the image breaks, all
    of them and no others, or, in rows about quality, whether it names the true defect.
    """

    readable: bool
    chosen_described: bool
    rejected_described: bool
    fault_named: bool


def check_rationale(rationale: str, row: Mapping[str, Any], chosen_is_second: bool) -> RationaleCheck:
    """
    Hold a rationale such as "Image 1: a red circle. Image 2: a blue circle." against the true scenes of a row of
    [`~rewarddance_hf.shapes.preferences.ShapesPreferences`].
    """
    truth = _read(row["rationale"]["yes" if chosen_is_second else "no"])
    if truth is None:
        raise ValueError(
            f"`row['rationale']` is {row['rationale']!r}, but must describe both images in the grammar of shapes. Pass a row "
            "of `ShapesPreferences`."
        )
    written = _read(rationale)
    if written is None:
        return RationaleCheck(False, False, False, False)
    chosen, rejected = (1, 0) if chosen_is_second else (0, 1)
    described = [_agree(*pair) for pair in zip(written, truth, strict=True)]
    if truth[rejected].word:
        named = written[rejected].word == truth[rejected].word
    else:
        broken = [broken_facts(parse_caption(row["prompt"]), side[rejected].scene) for side in (written, truth)]
        # Of an image of two objects the same fault may be told in two ways, by which object is meant first.
        named = described[rejected] or broken[0] == broken[1]
    return RationaleCheck(True, described[chosen], described[rejected], named)


def broken_facts(wanted: Scene, shown: Scene) -> frozenset[str]:
    """
    Facts of a `wanted` scene that do not hold in the one that is `shown`, and `"unsaid"` where it leaves open a size, place or
    relation that `wanted` gives.
    """
    facts = check_facts(wanted, place_objects(shown, random.Random(0)))
    unsaid = {"size", "relation"} & set(facts) if shown.kind != wanted.kind else set()
    return frozenset(
        [name for name, holds in facts.items() if not holds or name in unsaid] + ["unsaid"] * bool(unsaid)
    )


def summarize_checks(checks: Iterable[RationaleCheck]) -> dict[str, float]:
    """Share of rationales for which each part of a [`RationaleCheck`] holds, and `num_rows`."""
    checks = list(checks)
    if not checks:
        raise ValueError("`checks` is empty, but shares need one rationale at least. Check more rows.")
    names = ("readable", "chosen_described", "rejected_described", "fault_named")
    return {name: sum(getattr(check, name) for check in checks) / len(checks) for name in names} | {
        "num_rows": len(checks)
    }


@dataclass(frozen=True)
class _Description:
    """Scene of an image, and the word for how it is drawn, or an empty one."""

    scene: Scene
    word: str


def _agree(written: _Description, truth: _Description) -> bool:
    """Whether both say the same, in whatever order of the objects."""
    same_kind = written.scene.kind == truth.scene.kind
    return written.word == truth.word and same_kind and not broken_facts(truth.scene, written.scene)


def _read(rationale: str) -> tuple[_Description, _Description] | None:
    match = _RATIONALE.fullmatch(rationale)
    if match is None:
        return None
    descriptions = []
    for text in match.groups():
        caption, _, word = text.partition(", ")
        try:
            descriptions.append(_Description(parse_caption(caption), word))
        except ValueError:  # no such scene
            return None
    return descriptions[0], descriptions[1]
