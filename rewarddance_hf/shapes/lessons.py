"""
Questions about the facts of images, with their answers: what a vision-language model is taught before anyone prefers anything.

A lesson asks many things about one image (what is where, how many, which color, is this what it shows?), or what differs between
two. A row of matching asks of several images whether each is right for a prompt. No row says which of two images is better.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .captions import canonical_caption, caption_paraphrases
from .drawing import (
    IN_DOMAIN,
    LARGE_RADIUS,
    LARGER_RADIUS_RANGE,
    OUT_OF_DOMAIN,
    Nuisance,
    draw_objects,
    place_objects,
)
from .oracle import check_facts
from .preferences import (
    ALIGNMENT_CRITERIA,
    DEGRADATIONS,
    QUALITY_CRITERIA,
    break_scene,
    sample_split_scene,
)
from .rows import ShapesRows, draw_key
from .scenes import COMPARISONS, NUMBERS, OPPOSITES, POSITIONS, PlacedObject, Scene


# What is learned last is asked most.
KIND_SHARES = {"single": 0.1, "count": 0.1, "binding": 0.25, "relation": 0.3, "size": 0.25}
TWO_IMAGES_SHARE = 0.3
SAME_SHARE = 0.25
QUESTIONS_PER_IMAGE = 7
CHECKS_PER_IMAGE = 3
PROMPTS_PER_IMAGE = 6
QUALITY_SHARE = 0.3
STATEMENT = 'Prompt: "{prompt}".\nCriteria: {criteria}.\n'
WORDING = STATEMENT + "Is this image right?"
# Of two images whose faults are told, so many are right, and so many of the others have another fault.
FAULTS_RIGHT_SHARE = 0.4
SECOND_FAULT_SHARE = 0.4
# How facts of [`check_facts`] are told.
FACT_WORDS = {"number": "number", "color": "color", "shape": "shape", "size": "size", "relation": "place"}
PLACES = ("top left", "top right", "bottom left", "bottom right", "middle")
MIDDLE = 0.15


@dataclass(frozen=True)
class Question:
    """A question about an image, its answer, and the knowledge that it asks for."""

    topic: str
    text: str
    answer: str


class ShapesLessons(ShapesRows):
    """
    Images with questions about them, each of which stands for itself; arguments are those of [`ShapesRows`].

    A row holds `images`, `opening` (`str`), `questions` (pairs of question and answer, which follow the opening), and `topics` (for
    each question, the knowledge that it asks for). `"{}"` in opening or question stands for the next image.
    """

    name = "lessons"

    def make_row(self, rng: random.Random, index: int) -> dict[str, Any]:
        scene = sample_split_scene(rng, draw_key(rng, KIND_SHARES), self.split)
        if rng.random() < TWO_IMAGES_SHARE:
            return self._two_images(scene, rng)
        placed = place_objects(scene, rng, self._nuisance)
        questions = _ask_about(placed, rng)[:QUESTIONS_PER_IMAGE]
        for _ in range(CHECKS_PER_IMAGE):
            shown = scene if rng.random() < 0.5 else break_scene(scene, rng, 0.8, self.split)
            caption = rng.choice(caption_paraphrases(shown, self.split))
            holds = all(check_facts(shown, placed).values())
            questions.append(Question(f"check {scene.kind}", f"Is this {caption}?", "yes" if holds else "no"))
        questions.append(Question("describe", "Describe it.", f"{canonical_caption(scene)}."))
        image = draw_objects(placed, rng, self._nuisance, self.size)
        return _row([image], questions, "Image 1: {}\n")

    @property
    def _nuisance(self) -> Nuisance:
        return _nuisance_of(self.split)

    def _two_images(self, scene: Scene, rng: random.Random) -> dict[str, Any]:
        other = scene if rng.random() < SAME_SHARE else break_scene(scene, rng, 0.7, self.split)
        images = [
            draw_objects(place_objects(shown, rng, self._nuisance), rng, self._nuisance, self.size)
            for shown in (scene, other)
        ]
        both = f"Image 1: {canonical_caption(scene)}. Image 2: {canonical_caption(other)}."
        questions = [
            Question("difference", "What differs?", " and ".join(_differences(scene, other)) or "nothing"),
            Question("describe both", "Describe them.", both),
        ]
        return _row(images, questions, "Image 1: {}\nImage 2: {}\n")


class ShapesMatching(ShapesRows):
    """
    A prompt, criteria, and images that are each right or not, asked about as a pointwise judge is; arguments are those of
    [`ShapesRows`], and how often scenes are of each kind.

    With `explained`, a question about what is where, which is larger, or how large an object is comes a second time, and the answer is
    what the image shows. A model that has to say where the circle is has found it out where it has to say yes or no.

    A row holds what one of [`ShapesLessons`] does; the places of its images are in its questions.
    """

    name = "matching"

    def __init__(
        self, *args: Any, kind_shares: dict[str, float] | None = None, explained: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.kind_shares = kind_shares or KIND_SHARES
        self.explained = explained

    def make_row(self, rng: random.Random, index: int) -> dict[str, Any]:
        scene = sample_split_scene(rng, draw_key(rng, self.kind_shares), self.split)
        defect = rng.choice(list(DEGRADATIONS)) if rng.random() < QUALITY_SHARE else None
        placed = place_objects(scene, rng, self._nuisance)
        nuisance = replace(self._nuisance, **DEGRADATIONS[defect]) if defect else self._nuisance
        questions = []
        for _ in range(PROMPTS_PER_IMAGE):
            about_quality = rng.random() < QUALITY_SHARE
            wanted = scene if about_quality or rng.random() < 0.5 else break_scene(scene, rng, 0.7, self.split)
            right = defect is None if about_quality else all(check_facts(wanted, placed).values())
            text = WORDING.format(
                prompt=rng.choice(caption_paraphrases(wanted, self.split)),
                criteria=QUALITY_CRITERIA if about_quality else ALIGNMENT_CRITERIA,
            )
            topic = "match quality" if about_quality else f"match {scene.kind}"
            questions.append(Question(topic, text, "yes" if right else "no"))
            if self.explained and not about_quality:
                questions += _explanations(text, wanted, scene, placed)
        return _row([draw_objects(placed, rng, nuisance, self.size)], questions, "Image: {}\n")

    @property
    def _nuisance(self) -> Nuisance:
        return _nuisance_of(self.split)


class ShapesPairMatching(ShapesMatching):
    """
    Two images of one prompt, each with the prompt after it, as a pairwise judge of the layout `"text_after_each"` sees them. It is asked
    whether each is right, and never which is better; either may be right or not. Arguments are those of [`ShapesMatching`].

    With `faults`, it is also asked which are right, and of each how many facts of the prompt it does not show, and which; more images
    show several wrong ones then.
    """

    name = "pair matching"

    def __init__(self, *args: Any, faults: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.faults = faults

    def make_row(self, rng: random.Random, index: int) -> dict[str, Any]:
        scene = sample_split_scene(rng, draw_key(rng, self.kind_shares), self.split)
        about_quality = rng.random() < QUALITY_SHARE
        images, right, explanations = [], [], []
        for number in (1, 2):
            is_right = rng.random() < (FAULTS_RIGHT_SHARE if self.faults else 0.5)
            nuisance, shown = self._nuisance, scene
            if about_quality and not is_right:
                nuisance = replace(nuisance, **DEGRADATIONS[rng.choice(list(DEGRADATIONS))])
            elif not is_right:
                shown = self._break(scene, rng)
            placed = place_objects(shown, rng, self._nuisance)
            right.append(is_right if about_quality else all(check_facts(scene, placed).values()))
            if self.faults and not about_quality:
                explanations += _faults(number, scene, placed)
            if self.explained and not about_quality:
                explanations += _explanations(f"Is image {number} right?", scene, shown, placed)
            images.append(draw_objects(placed, rng, nuisance, self.size))
        statement = STATEMENT.format(
            prompt=rng.choice(caption_paraphrases(scene, self.split)),
            criteria=QUALITY_CRITERIA if about_quality else ALIGNMENT_CRITERIA,
        )
        topic = "pair quality" if about_quality else f"pair {scene.kind}"
        questions = [
            Question(topic, f"Is image {number} right?", "yes" if is_right else "no")
            for number, is_right in enumerate(right, start=1)
        ]
        if self.faults:
            which = " and ".join(str(number) for number, is_right in enumerate(right, start=1) if is_right)
            questions.append(Question("which", "Which is right?", which or "nothing"))
        return _row(images, questions + explanations, f"Image 1: {{}}\n{statement}Image 2: {{}}\n{statement}")

    def _break(self, scene: Scene, rng: random.Random) -> Scene:
        """The scene with something wrong; where faults are told, often with more than one thing."""
        broken = break_scene(scene, rng, 0.7, self.split)
        if self.faults and rng.random() < SECOND_FAULT_SHARE:
            again = break_scene(broken, rng, 0.3, self.split)
            return again if len(again.objects) == len(broken.objects) else broken
        return broken


def lesson_words() -> list[str]:
    """Every word of questions and answers, in alphabetical order, for tokenizers in which each is one token."""
    texts = [
        "What is Where the from Which How many objects color shape size differs Is this there a than Describe it them"
    ]
    texts += [*PLACES, *POSITIONS, *COMPARISONS, "nothing and medium number place"]
    return sorted({word for text in texts for word in re.findall(r"\w+", text)})


def _explanations(text: str, wanted: Scene, shown: Scene, placed: Sequence[PlacedObject]) -> list[Question]:
    """The question again, with what the image shows of the wanted objects, if only that can be wrong."""
    alike = [replace(item, size=None) for item in wanted.objects] == [
        replace(item, size=None) for item in shown.objects
    ]
    if not alike or wanted.kind not in ("relation", "size"):
        return []
    if wanted.kind == "relation":
        return [Question("explain relation", text, _relation(*placed))]
    return [Question("explain size", text, str(shown.relation or shown.objects[0].size))]


def _faults(number: int, wanted: Scene, placed: Sequence[PlacedObject]) -> list[Question]:
    """How many facts of a prompt an image does not show, and which."""
    faults = [FACT_WORDS[name.split()[0]] for name, holds in check_facts(wanted, placed).items() if not holds]
    count = NUMBERS[min(len(faults), len(NUMBERS)) - 1] if faults else "nothing"
    return [
        Question("how many faults", f"How many differ in image {number}?", count),
        Question("faults", f"What differs in image {number}?", " and ".join(faults) or "nothing"),
    ]


def _nuisance_of(split: str) -> Nuisance:
    return OUT_OF_DOMAIN if split == "ood" else IN_DOMAIN


def _row(images: list[Any], questions: list[Question], opening: str) -> dict[str, Any]:
    return {
        "images": images,
        "opening": opening,
        "questions": [(question.text, question.answer) for question in questions],
        "topics": [question.topic for question in questions],
    }


def _ask_about(objects: Sequence[PlacedObject], rng: random.Random) -> list[Question]:
    """One question of every topic that the objects give an answer to, in random order."""
    questions = [*_ask_where(objects, rng), *_ask_what(objects, rng)]
    if len(objects) == 2 and _name(objects[0]) != _name(objects[1]):
        questions += [*_ask_relations(objects, rng), *_ask_sizes(objects, rng), *_ask_binding(objects, rng)]
    rng.shuffle(questions)
    return questions


def _ask_where(objects: Sequence[PlacedObject], rng: random.Random) -> list[Question]:
    place = rng.choice([*map(_place, objects), rng.choice(PLACES[:4])])
    there = [f"a {_name(item)}" for item in objects if _place(item) == place]
    questions = [Question("place", f"What is {place}?", " and ".join(there) or "nothing")]
    item = rng.choice(objects)
    if _is_unique(item, objects, "color", "shape"):
        questions.append(Question("place", f"Where is the {_name(item)}?", _place(item)))
    return questions


def _ask_what(objects: Sequence[PlacedObject], rng: random.Random) -> list[Question]:
    questions = [Question("count", "How many objects?", NUMBERS[len(objects) - 1])]
    item = rng.choice(objects)
    if _is_unique(item, objects, "shape"):
        questions.append(Question("color", f"What color is the {item.shape}?", str(item.color)))
    if _is_unique(item, objects, "color"):
        questions.append(Question("shape", f"What shape is {item.color}?", str(item.shape)))
    if len(objects) == 1:
        questions.append(Question("size", "What size?", _size(item)))
    return questions


def _ask_relations(objects: Sequence[PlacedObject], rng: random.Random) -> list[Question]:
    first, second = rng.sample(objects, 2)
    relation = _relation(first, second)
    asked = rng.choice([relation, relation, rng.choice(POSITIONS)])
    found = f"a {_name(first)}" if asked == relation else "nothing"
    claimed = rng.choice([relation, OPPOSITES[relation]])
    return [
        Question("relation", f"What is {asked} the {_name(second)}?", found),
        Question("relation", f"Where is the {_name(first)} from the {_name(second)}?", relation),
        Question(
            "check relation",
            f"Is the {_name(first)} {claimed} the {_name(second)}?",
            "yes" if claimed == relation else "no",
        ),
    ]


def _ask_sizes(objects: Sequence[PlacedObject], rng: random.Random) -> list[Question]:
    small, large = sorted(objects, key=lambda item: item.radius)
    if large.radius < LARGER_RADIUS_RANGE[0] or small.radius > 0.15:  # too alike to say
        return []
    asked, found = rng.choice([("larger", large), ("smaller", small)])
    first, second = rng.sample([small, large], 2)
    return [
        Question("size", f"Which is {asked}?", f"a {_name(found)}"),
        Question(
            "check size", f"Is the {_name(first)} larger than the {_name(second)}?", "yes" if first is large else "no"
        ),
    ]


def _ask_binding(objects: Sequence[PlacedObject], rng: random.Random) -> list[Question]:
    first, second = rng.sample(objects, 2)
    asked = rng.choice([_name(first), f"{first.color} {second.shape}"])
    answer = "yes" if asked in map(_name, objects) else "no"
    return [Question("check binding", f"Is there a {asked}?", answer)]


def _differences(scene: Scene, other: Scene) -> list[str]:
    if len(scene.objects) != len(other.objects):
        return ["number"]
    pairs = list(zip(scene.objects, other.objects, strict=True))
    differences = [name for name in ("color", "shape") if any(getattr(a, name) != getattr(b, name) for a, b in pairs)]
    if scene.relation != other.relation and scene.kind == "relation":
        differences.append("place")
    elif scene.relation != other.relation or any(a.size != b.size for a, b in pairs):
        differences.append("size")
    return differences


def _name(item: PlacedObject) -> str:
    return f"{item.color} {item.shape}"


def _is_unique(item: PlacedObject, objects: Sequence[PlacedObject], *attributes: str) -> bool:
    wanted = [getattr(item, name) for name in attributes]
    return sum([getattr(other, name) for name in attributes] == wanted for other in objects) == 1


def _place(item: PlacedObject) -> str:
    if abs(item.x - 0.5) < MIDDLE and abs(item.y - 0.5) < MIDDLE:
        return PLACES[4]
    return f"{'top' if item.y < 0.5 else 'bottom'} {'left' if item.x < 0.5 else 'right'}"


def _size(item: PlacedObject) -> str:
    return "large" if item.radius > LARGE_RADIUS + 0.02 else "small" if item.radius < 0.155 else "medium"


def _relation(first: PlacedObject, second: PlacedObject) -> str:
    if abs(first.x - second.x) > abs(first.y - second.y):
        return "left of" if first.x < second.x else "right of"
    return "above" if first.y < second.y else "below"
