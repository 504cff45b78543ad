"""Instructions for editing an image of shapes: written in several paraphrases, and read back."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from .captions import template_pattern
from .scenes import COLORS, SHAPES, require_member


# Kind of an edit -> what its instruction may ask for; None where there is nothing to choose.
EDITS: dict[str, tuple[str | None, ...]] = {
    "color": tuple(COLORS),
    "remove": (None,),
    "add": (None,),
    "move": ("left", "right", "up", "down"),
    "size": ("larger", "smaller"),
}
_DIRECTION_WORDS = {"to the left": "left", "to the right": "right", "up": "up", "down": "down"}
_FIELD_WORDS: dict[str, dict[str, str]] = {
    "color": {color: color for color in COLORS},
    "shape": {shape: shape for shape in SHAPES},
    "new": {color: color for color in COLORS},
    "toward": _DIRECTION_WORDS,
    "comparative": {"larger": "larger", "smaller": "smaller"},
}
_VALUE_FIELDS = {"color": "new", "move": "toward", "size": "comparative"}
_IT = "{color} {shape}"
# The first template of each row is the canonical instruction.
_TRAINING_TEMPLATES = {
    "color": (f"make the {_IT} {{new}}", f"color the {_IT} {{new}}", f"change the {_IT} to {{new}}"),
    "remove": (f"remove the {_IT}", f"take away the {_IT}", f"delete the {_IT}"),
    "add": (f"add a {_IT}", f"draw a {_IT}", f"put in a {_IT}"),
    "move": (f"move the {_IT} {{toward}}", f"shift the {_IT} {{toward}}", f"the {_IT} is to move {{toward}}"),
    "size": (
        f"make the {_IT} {{comparative}}",
        f"draw the {_IT} {{comparative}}",
        f"the {_IT} is to be {{comparative}}",
    ),
}
# New orders of known words, as in captions.
_OUT_OF_DOMAIN_TEMPLATES = {
    "color": ("make the {shape} in {color} {new}", f"the {_IT} is to be {{new}}"),
    "remove": ("remove the {shape} in {color}", f"take the {_IT} away"),
    "add": ("add a {shape} in {color}", f"put a {_IT} in"),
    "move": ("move the {shape} in {color} {toward}", "the {shape} in {color} is to move {toward}"),
    "size": ("make the {shape} in {color} {comparative}", "the {shape} in {color} is to be {comparative}"),
}


@dataclass(frozen=True)
class Edit:
    """
    What an instruction asks for: kind, color and shape of the object that it is about, and the new color (`"color"`), the
    direction (`"move"`), or `"larger"` or `"smaller"` (`"size"`).
    """

    kind: str
    color: str
    shape: str
    value: str | None = None

    def __post_init__(self) -> None:
        require_member("kind", self.kind, EDITS)
        require_member("color", self.color, COLORS)
        require_member("shape", self.shape, SHAPES)
        require_member("value", self.value, EDITS[self.kind])
        if self.kind == "color" and self.value == self.color:
            raise ValueError(f"`value` is {self.value!r}, which the object is already. Choose another color.")

    @property
    def name(self) -> tuple[str, str]:
        """Color and shape of the object that it is about."""
        return self.color, self.shape


def instruction_paraphrases(edit: Edit, split: str = "train") -> tuple[str, ...]:
    """Every instruction that a split has for an edit, the canonical one first; those of `"ood"` are never seen in training."""
    require_member("split", split, ("train", "id", "ood"))
    templates = _OUT_OF_DOMAIN_TEMPLATES if split == "ood" else _TRAINING_TEMPLATES
    fields = {"color": edit.color, "shape": edit.shape}
    if edit.kind in _VALUE_FIELDS:
        field = _VALUE_FIELDS[edit.kind]
        fields[field] = next(words for words, meant in _FIELD_WORDS[field].items() if meant == edit.value)
    return tuple(template.format(**fields) for template in templates[edit.kind])


_PATTERNS = tuple(
    (kind, template_pattern(template, _FIELD_WORDS))
    for templates in (_TRAINING_TEMPLATES, _OUT_OF_DOMAIN_TEMPLATES)
    for kind, of_kind in templates.items()
    for template in of_kind
)


def parse_instruction(instruction: str) -> Edit:
    """Edit of an instruction in any of its paraphrases. Case, outer spaces and a final full stop do not matter."""
    text = instruction.strip().removesuffix(".").lower()
    for kind, pattern in _PATTERNS:
        match = pattern.fullmatch(text)
        if match is not None:
            fields = match.groupdict()
            field = _VALUE_FIELDS.get(kind, "")
            value = _FIELD_WORDS[field][fields[field]] if field else None
            return Edit(kind, fields["color"], fields["shape"], value)
    raise ValueError(
        f"`instruction` is {instruction!r}, but only instructions of the shapes world can be read. Write it as "
        "`instruction_paraphrases` does, for example 'make the red circle blue'."
    )


def instruction_words() -> list[str]:
    """Every word that an instruction may hold, in alphabetical order, for tokenizers in which each is one token."""
    templates: Iterable[str] = (
        text for group in (_TRAINING_TEMPLATES, _OUT_OF_DOMAIN_TEMPLATES) for texts in group.values() for text in texts
    )
    texts = [re.sub(r"\{\w+\}", " ", template) for template in templates]
    texts += [words for phrases in _FIELD_WORDS.values() for words in phrases]
    return sorted({word for text in texts for word in text.split()})
