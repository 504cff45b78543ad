"""Judgements with known verdicts that a judge is shown before its question (in-context examples)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .media_rewarddance import load_image


KEYS = ("image", "reference", "condition", "prompt", "criteria", "task", "verdict")
VERDICTS = {True: True, False: False, "yes": True, "no": False}


@dataclass(frozen=True, eq=False)
class Example:
    """
    One judgement with its verdict, with loaded images. Made by [`read_examples`].

    Args:
        question (`tuple`):
            Arguments of [`RewardDanceProcessor.write_question`].
        verdict (`bool`):
            Whether the answer is "yes".
        images (`tuple[PIL.Image.Image, ...]`):
            Images in the order of the question: first frame, reference, sample.
    """

    question: "tuple[Any, ...]"
    verdict: bool
    images: "tuple[Any, ...]"


def read_examples(
    examples: "Sequence[Mapping[str, Any] | Example]", processor: Any, task: "str | None", is_pairwise: bool
) -> "tuple[Example, ...]":
    """
    Check examples and load their images.

    Args:
        examples (`list[dict]`):
            Examples in the order in which they are shown. Each has `image`, `prompt`, `verdict` (a bool, or `"yes"` or
            `"no"`), for a pairwise judge `reference`, and optional `condition`, `criteria` and `task`. Those that this
            function gave are given back.
        processor ([`RewardDanceProcessor`]):
            Processor of the judge.
        task (`str`, *optional*):
            Task of examples that name none. None if there are several.
        is_pairwise (`bool`):
            Whether examples need a reference, or have none.

    Returns:
        `tuple[Example, ...]`

    Raises:
        `TypeError`: If an example is no `dict`, or a text no string.
        `ValueError`: If an example lacks a key or has one too many, a verdict is neither yes nor no, or an image cannot be
            read.
    """
    if isinstance(examples, (str, bytes, Mapping)) or not isinstance(examples, Sequence):
        raise TypeError(
            f"`examples` is of type `{type(examples).__name__}`, but must be a list of dicts. Wrap it in one."
        )
    return tuple(
        example
        if isinstance(example, Example)
        else _read_example(example, f"examples[{i}]", processor, task, is_pairwise)
        for i, example in enumerate(examples)
    )


def _read_example(example: Any, name: str, processor: Any, task: "str | None", is_pairwise: bool) -> Example:
    if not isinstance(example, Mapping):
        raise TypeError(f"`{name}` is of type `{type(example).__name__}`, but must be a dict with the keys of {KEYS}.")
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
    verdict = given["verdict"]
    if not isinstance(verdict, (bool, str)) or verdict not in VERDICTS:
        raise ValueError(
            f"`{name}['verdict']` is {verdict!r}, but must be True or 'yes' if the sample is better, else False or 'no'."
        )
    task = given.get("task", task)
    if task is None:
        raise ValueError(f"`{name}` has no `task`, and the rows have several, but its criteria depend on it. Add one.")
    condition, reference = given.get("condition"), None
    images = [] if condition is None else [load_image(condition, f"{name}['condition']")]
    if is_pairwise:
        reference = processor.load_frames(given["reference"], f"{name}['reference']", task)
        images += reference
    sample = processor.load_frames(given["image"], f"{name}['image']", task)
    question = (
        given["prompt"],
        () if reference is None else reference.marks,
        sample.marks,
        condition is not None,
        task,
        given.get("criteria"),
    )
    return Example(question, VERDICTS[verdict], (*images, *sample))


__all__ = ["Example", "read_examples"]
