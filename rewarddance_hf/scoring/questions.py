"""Questions from lists of samples, prompts and whatever else users pass."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch

from ..models import RewardDanceProcessor
from ..models.question_rewarddance import Example, Question
from .judge import Judge


Examples: TypeAlias = Sequence[Mapping[str, Any] | Example] | None


def make_questions(
    judge: Judge,
    images: Any,
    prompts: str | Sequence[str],
    references: Any,
    conditions: Sequence[Any] | None,
    task: str | Sequence[str | None] | None,
    criteria: str | Sequence[str | None] | None,
    examples: Examples = None,
    reasons_first: bool = False,
) -> list[Question]:
    """One question for each sample. Arguments and errors are those of [`RewardDanceScorer.score`]."""
    columns = make_columns(judge.model.config.paradigm, images, prompts, references, conditions, task, criteria)
    shown = judge.processor.read_examples(examples, columns["task"], judge.is_pairwise)
    return [
        Question(sample, prompt, reference, condition, kind, text, shown, reasons_first, i)
        for i, (sample, prompt, reference, condition, kind, text) in enumerate(zip(*columns.values(), strict=True))
    ]


def make_columns(
    paradigm: str,
    images: Any,
    prompts: str | Sequence[str],
    references: Any,
    conditions: Sequence[Any] | None,
    task: str | Sequence[str | None] | None,
    criteria: str | Sequence[str | None] | None,
) -> dict[str, list[Any]]:
    """The same arguments with an entry for each sample, by name; those that a judge of this paradigm cannot use are refused."""
    samples = as_list(images, "images")
    if not samples:
        raise ValueError("`images` is empty, but must hold at least one sample.")
    is_pairwise = paradigm == "pairwise"
    if is_pairwise and references is None:
        raise ValueError(
            "`references` is None, but the judge is pairwise: its reward is relative to another sample of the same "
            "prompt. Pass one reference per image, use `compare` or `rank`, or load a pointwise judge."
        )
    if not is_pairwise and references is not None:
        raise ValueError(
            f"`references` was given, but the judge is {paradigm} and looks at one sample only. Leave "
            "`references` out, or load a pairwise judge."
        )
    given: dict[str, Any] = {
        "prompts": prompts,
        "references": None if references is None else as_list(references, "references"),
        "conditions": conditions,
        "task": task,
        "criteria": criteria,
    }
    columns = {name: _spread(values, len(samples), name) for name, values in given.items()}
    missing = [i for i, reference in enumerate(columns["references"]) if reference is None]
    if is_pairwise and missing:
        raise ValueError(
            f"`references[{missing[0]}]` is None, but a pairwise judge needs a reference for every image."
        )
    return {"images": samples, **columns}


def by_dimension(processor: RewardDanceProcessor, question: Question, dimensions: Sequence[str]) -> list[Question]:
    """The same question by the criteria of each dimension, with media that are loaded once."""
    if isinstance(dimensions, str) or not dimensions or len(set(dimensions)) < len(dimensions):
        raise ValueError(
            f"`dimensions` is {dimensions!r}, but must be a list of different names, e.g. `['alignment']`."
        )
    if question.criteria is not None:
        raise ValueError(
            "`criteria` and `dimensions` were both given, but a question is asked by one of them. Leave one out; own "
            "dimensions are an argument of `RewardDanceProcessor.from_pretrained`."
        )
    loaded = processor.load(question, keep_gradient=True)
    return [replace(loaded, criteria=processor.dimension_criteria(name, str(loaded.task))) for name in dimensions]


def as_list(media: Any, name: str) -> list[Any]:
    """Samples of a batch, which is a list, a tensor or an array."""
    if isinstance(media, (torch.Tensor, np.ndarray)) and media.ndim not in (4, 5):
        raise ValueError(
            f"`{name}` has shape {tuple(media.shape)}, but a tensor must be of shape `(n, 3, height, width)` or "
            "`(n, frames, 3, height, width)`, an array of the same with the channels last. Add the batch dimension, e.g. "
            "`image[None]`."
        )
    if not isinstance(media, (list, tuple, torch.Tensor, np.ndarray)):
        raise TypeError(
            f"`{name}` is of type `{type(media).__name__}`, but must be a list with one entry per sample, or a tensor. Wrap "
            "a single sample in a list."
        )
    return list(media)


def _spread(values: Any, count: int, name: str) -> list[Any]:
    """One value per row, from one for all (a string or None) or a sequence."""
    if values is None or isinstance(values, str):
        return [values] * count
    values = list(values)
    if len(values) != count:
        raise ValueError(
            f"`{name}` has {len(values)} entries for {count} images, but must have one per image. Make both equally long."
        )
    return values
