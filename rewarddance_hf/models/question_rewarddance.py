"""What a judge is asked, as one value; and the same with a known verdict, as an example."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .clips_rewarddance import Clip, ClipReader
from .tasks_rewarddance import check_condition


EXAMPLE_KEYS = ("image", "reference", "condition", "prompt", "criteria", "task", "verdict")
VERDICTS = {True: True, False: False, "yes": True, "no": False}


@dataclass(frozen=True, eq=False)
class Question:
    """
    One question to a judge: is a sample better than its reference (pairwise), or is it good (pointwise)?

    Args:
        sample (image or clip):
            Sample to be judged: anything that [`~rewarddance_hf.models.media_rewarddance.load_frames`] takes.
        prompt (`str`):
            Prompt that the sample was generated from. Plain data: no text can add special tokens or images.
        reference (image or clip, *optional*):
            Sample to compare with, image 1 of the question. Without it the pointwise question is asked.
        condition (image, *optional*):
            Image that was given to the generator beside the prompt: first frame of image-to-video, source image of an edit.
        task (`str`, *optional*):
            Task whose criteria are used. By default what [`~rewarddance_hf.models.tasks_rewarddance.infer_task`] says.
        criteria (`str`, *optional*):
            Criteria in place of those of `task`.
        examples (`tuple[Example, ...]`, *optional*):
            Questions with known verdicts that are shown before this one, as [`RewardDanceProcessor.read_examples`]
            gives them.
        reasons_first (`bool`, *optional*, defaults to `False`):
            Whether to ask for reasons before the answer.
        row (`int`, *optional*):
            Index of the row that it is about, for error messages.

    Raises:
        `TypeError`: If `sample` is None or `prompt` is not a string.
        `ValueError`: If the task needs a condition and there is none.
    """

    sample: Any
    prompt: str
    reference: Any = None
    condition: Any = None
    task: "str | None" = None
    criteria: "str | None" = None
    examples: "tuple[Example, ...]" = ()
    reasons_first: bool = False
    row: "int | None" = None

    def __post_init__(self) -> None:
        place = "" if self.row is None else f"s[{self.row}]"
        if self.sample is None:
            raise TypeError(
                f"`image{place}` is of type `NoneType`, but must be an image or a clip. Drop the row, or pass its image."
            )
        if not isinstance(self.prompt, str):
            raise TypeError(f"`prompt{place}` is of type `{type(self.prompt).__name__}`, but must be a string.")
        check_condition(self.task, self.condition, self.names[2])

    @property
    def names(self) -> "tuple[str, str, str]":
        """`tuple[str, str, str]`: Names of sample, reference and condition in error messages."""
        place = "" if self.row is None else f"s[{self.row}]"
        return f"image{place}", f"reference{place}", f"condition{place}"

    @property
    def asked(self) -> "tuple[Any, ...]":
        """`tuple`: All that the text of the question depends on; media that are not loaded must at least be open."""
        return (
            self.prompt,
            None if self.reference is None else marks_of(self.reference),
            marks_of(self.sample),
            self.condition is not None,
            self.task,
            self.criteria,
            self.reasons_first,
            tuple((example.question.asked, example.verdict) for example in self.examples),
        )

    @property
    def images(self) -> "list[Any]":
        """`list`: Images of a loaded question in their order: those of examples, condition, reference, sample."""
        shown = [image for example in self.examples for image in example.question.images]
        return [*shown, *([] if self.condition is None else [self.condition]), *(self.reference or []), *self.sample]


@dataclass(frozen=True, eq=False)
class Example:
    """One question with loaded media and its verdict. Made by [`RewardDanceProcessor.read_examples`]."""

    question: Question
    verdict: bool


def marks_of(media: Any) -> "tuple[tuple[int, float | None], ...]":
    """Number, from 1, and time of each frame of a loaded or opened clip, or of a single image."""
    return media.marks if isinstance(media, (Clip, ClipReader)) else ((1, None),)


def parse_example(example: Any, name: str, is_pairwise: bool) -> "tuple[Question, bool]":
    """Question, whose media are not loaded, and verdict of an example as users write it."""
    if not isinstance(example, Mapping):
        raise TypeError(
            f"`{name}` is of type `{type(example).__name__}`, but must be a dict with the keys of {EXAMPLE_KEYS}."
        )
    given = {key: value for key, value in example.items() if value is not None}
    wanted = {"image", "prompt", "verdict", *(["reference"] if is_pairwise else [])}
    allowed = {"condition", "criteria", "task"} | wanted
    if not wanted <= given.keys() <= allowed:
        kind = "pairwise judge" if is_pairwise else "judge of single samples"
        raise ValueError(
            f"`{name}` has the keys {sorted(given)}, but an example for a {kind} must have {sorted(wanted)} and may have "
            f"{sorted(allowed - wanted)}. Add or remove keys."
        )
    for key in ("prompt", "criteria", "task"):
        if key in given and not isinstance(given[key], str):
            raise TypeError(f"`{name}[{key!r}]` is of type `{type(given[key]).__name__}`, but must be a string.")
    verdict = given.pop("verdict")
    if not isinstance(verdict, (bool, str)) or verdict not in VERDICTS:
        raise ValueError(
            f"`{name}['verdict']` is {verdict!r}, but must be True or 'yes' if the sample is better, else False or 'no'."
        )
    check_condition(given.get("task"), given.get("condition"), f"{name}['condition']")
    return Question(sample=given.pop("image"), **given), VERDICTS[verdict]


__all__ = ["Example", "Question", "marks_of", "parse_example"]
