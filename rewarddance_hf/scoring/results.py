"""What a judge is asked, and what it answers."""

from dataclasses import dataclass
from typing import Any

import torch

from ..models.question_rewarddance import Example


@dataclass(frozen=True)
class Judgement:
    """
    One question to a judge.

    Args:
        sample (image or `list` of images):
            Image or clip to be judged: anything that [`~rewarddance_hf.models.processing_rewarddance.load_frames`] takes.
        prompt (`str`):
            Prompt that the sample was generated from.
        reference (image or `list` of images, *optional*):
            Sample to compare with, image 1 of the question. Pairwise paradigm only.
        condition (image, *optional*):
            First frame that was given to an image-to-video generator.
        task (`str`, *optional*, defaults to `"text-to-image"`):
            Task whose criteria are used.
        criteria (`str`, *optional*):
            Criteria in place of those of `task`.
        examples (`tuple[Example, ...]`, *optional*):
            Judgements with known verdicts that are shown before the question.
        row (`int`, *optional*, defaults to its index among the judgements of a call):
            Row that it is about, for error messages.
    """

    sample: Any
    prompt: str
    reference: Any = None
    condition: Any = None
    task: str = "text-to-image"
    criteria: str | None = None
    examples: tuple[Example, ...] = ()
    row: int | None = None


@dataclass(frozen=True)
class Comparison:
    """
    Verdict about two samples of one prompt.

    Args:
        probability_a (`float`):
            Probability that sample A is better. Adds up to 1 with `probability_b`.
        probability_b (`float`):
            Probability that sample B is better.
        winner (`str`):
            `"a"` or `"b"`, or `"tie"` when both are exactly as probable.
        order_consistent (`bool`, *optional*):
            Whether both orders of the samples gave the same winner. None if only one was asked.
        rationale (`str`, *optional*):
            What the judge says after the verdict, with A as image 1 and B as image 2.
        dimensions (`dict[str, Comparison]`, *optional*):
            Verdict by each dimension that was asked for.
    """

    probability_a: float
    probability_b: float
    winner: str
    order_consistent: bool | None = None
    rationale: str | None = None
    dimensions: "dict[str, Comparison] | None" = None


@dataclass(frozen=True, eq=False)
class Ranking:
    """
    Order of several samples of one prompt. Tensors are on the CPU.

    Args:
        order (`list[int]`):
            Indices of samples, best first: by wins, then by score, then by index; after a tournament by its standings.
        wins (`torch.Tensor` of shape `(num_images,)`):
            Won comparisons of each sample; a tie gives one half.
        scores (`torch.Tensor` of shape `(num_images,)`):
            Reward of each sample: its mean over all references that it met in the pairwise paradigm.
        matrix (`torch.Tensor` of shape `(num_images, num_images)`):
            Entry `[i, j]` is the reward of sample `j` with sample `i` as its reference. Without references it is the
            probability that sample `j` is better than sample `i`. The diagonal is NaN, and so are pairs that a tournament
            did not compare.
        num_questions (`int`):
            Number of scores that were asked for.
        error (`Exception`, *optional*):
            What the reward raised, if samples were left out.
    """

    order: list[int]
    wins: torch.Tensor
    scores: torch.Tensor
    matrix: torch.Tensor
    num_questions: int = 0
    error: Exception | None = None
