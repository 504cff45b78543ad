"""What a judge answers about several samples."""

from dataclasses import dataclass

import torch


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

    @classmethod
    def from_log_odds(cls, logits: torch.Tensor, is_pairwise: bool) -> "Comparison":
        """
        Verdict by log-odds: of a pairwise judge those that B is better than A and, if it was asked in both orders, that A is
        better than B; of another judge those of A and B.
        """
        order_consistent = None
        if not is_pairwise:
            margin = float(logits[1] - logits[0])  # above 0 if B is better
            probability_b = float((logits[1] - logits[0]).sigmoid())
        elif len(logits) == 1:
            probability_b = float(logits.sigmoid())
            margin = probability_b - 0.5
        else:
            yes = logits.sigmoid().tolist()
            margin = yes[0] - yes[1]
            probability_b = 0.5 + margin / 2
            order_consistent = _winner(yes[0] - 0.5) == _winner(0.5 - yes[1])
        return cls(1 - probability_b, probability_b, _winner(margin), order_consistent)


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


def _winner(margin: float) -> str:
    return "tie" if margin == 0 else "b" if margin > 0 else "a"
