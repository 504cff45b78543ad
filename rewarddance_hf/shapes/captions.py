"""Captions of scenes of shapes: written in several paraphrases, and read back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from .scenes import COLORS, COMPARISONS, NUMBERS, POSITIONS, SHAPES, SIZES, Scene, SceneObject, require_member


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


def _template_group(scene: Scene) -> str:
    return "comparison" if scene.kind == "size" and scene.relation is not None else scene.kind


def template_pattern(template: str, field_words: Mapping[str, Iterable[str]]) -> re.Pattern[str]:
    """Turn a template into a pattern with one named group for each field."""

    def field_pattern(match: re.Match[str]) -> str:
        words = sorted(field_words[match[1]], key=len, reverse=True)
        return f"(?P<{match[1]}>{'|'.join(words)})"

    return re.compile(re.sub(r"\{(\w+)\}", field_pattern, template))


_PATTERNS = tuple(
    (group, template_pattern(template, _FIELD_WORDS))
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
    """Every caption that a split has for a scene, the canonical one first; those of `"ood"` are never seen in training."""
    require_member("split", split, ("train", "id", "ood"))
    templates = _OUT_OF_DOMAIN_TEMPLATES if split == "ood" else _TRAINING_TEMPLATES
    return tuple(_fill_template(template, scene) for template in templates[_template_group(scene)])


def canonical_caption(scene: Scene) -> str:
    """A scene in its plainest words."""
    return caption_paraphrases(scene)[0]


def parse_caption(caption: str) -> Scene:
    """Scene of a caption in any of its paraphrases. Case, outer spaces and a final full stop do not matter."""
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
    """Every word that a caption may hold, in alphabetical order, for tokenizers in which each is one token."""
    templates = [*_TRAINING_TEMPLATES.values(), *_OUT_OF_DOMAIN_TEMPLATES.values()]
    texts = [re.sub(r"\{\w+\}", " ", template) for group in templates for template in group]
    texts += [words for field, phrases in _FIELD_WORDS.items() if field != "plural" for words in phrases]
    words = {word for text in texts for word in text.split()}
    return sorted(words | {f"{shape}s" for shape in SHAPES})
