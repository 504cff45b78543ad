"""What clips of colored shapes can be asked to show, and the captions that say so: motion, direction, speed and order."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from .captions import template_pattern
from .drawing import QUARTERS
from .rows import SPLITS
from .scenes import COLORS, SHAPES, require_member


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

# The four quarters of an image in the order of the clock.
CLOCK = (
    (QUARTERS[0], QUARTERS[0]),
    (QUARTERS[1], QUARTERS[0]),
    (QUARTERS[1], QUARTERS[1]),
    (QUARTERS[0], QUARTERS[1]),
)


@dataclass(frozen=True)
class ClipScene:
    """
    What a clip must show; color or shape of an object are None where the caption leaves them open, but they must stay the
    same all the time. `manner` is a direction, side or pace, by the kind.

    Kinds are `"move"` (along a line), `"turn"` (around the middle, one way), `"pace"` (around the middle, fast or slow),
    `"stay"` (no motion) and `"order"` (one object, then another).
    """

    kind: str
    objects: tuple[tuple[str | None, str | None], ...]
    manner: str = ""

    def __post_init__(self) -> None:
        require_member("kind", self.kind, KINDS)
        require_member("manner", self.manner, MANNERS[self.kind])
        if len(self.objects) != (2 if self.kind == "order" else 1):
            raise ValueError(
                f"`objects` has {len(self.objects)} entries, but a {self.kind!r} scene has "
                f"{2 if self.kind == 'order' else 1}. Change the kind or the objects."
            )
        for color, shape in self.objects:
            require_member("color", color, (*COLORS, None))
            require_member("shape", shape, (*SHAPES, None))
            if color is None and shape is None:
                raise ValueError("`objects` has neither color nor shape, but one of them must be said. Name one.")


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


_PATTERNS = tuple(
    template_pattern(template, _FIELD_WORDS)
    for templates in (_TRAINING_TEMPLATES, _OUT_OF_DOMAIN_TEMPLATES)
    for group in templates.values()
    for template in group
)


def clip_paraphrases(scene: ClipScene, split: str = "train") -> tuple[str, ...]:
    """Every caption that a split has for a clip, the plainest first; those of `"ood"` are never seen in training."""
    require_member("split", split, SPLITS)
    templates = _OUT_OF_DOMAIN_TEMPLATES if split == "ood" else _TRAINING_TEMPLATES
    fields = {name: _noun(*item) for name, item in zip("ab", scene.objects)}  # noqa: B905 (one object or two)
    if scene.kind != "order":
        fields["action"] = _ACTIONS[scene.kind][scene.manner]
    return tuple(t.format(**fields) for t in templates["order" if scene.kind == "order" else "action"])


def clip_caption_words() -> list[str]:
    """Every word that a caption of a clip may hold, in alphabetical order, for tokenizers in which each is one token."""
    groups = [*_TRAINING_TEMPLATES.values(), *_OUT_OF_DOMAIN_TEMPLATES.values()]
    texts = [re.sub(r"\{\w+\}|,", " ", template) for group in groups for template in group]
    return sorted({word for text in [*texts, *_NOUNS, *_ACTION_MEANINGS] for word in text.split()})


def parse_clip_caption(caption: str) -> ClipScene:
    """What a caption of a clip describes, in any paraphrase. Case, outer spaces and a final full stop do not matter."""
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
