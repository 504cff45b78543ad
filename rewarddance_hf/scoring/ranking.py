"""Rankings of the samples of one prompt by any reward: all against all, tournaments of few comparisons, or scores alone."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import combinations
from typing import Any

import torch
from transformers.utils import logging

from ..rewards import AdaptedReward, RewardContractError, as_reward
from .results import Ranking


logger = logging.get_logger(__name__)

# Comparisons of one round: for each pair `(i, j)` a number above 0 if `j` is better, below 0 if `i` is.
Play = Callable[[Sequence[tuple[int, int]]], Sequence[float]]
# Questions about ordered pairs `(reference, sample)`: how probable it is that the sample is better, and its reward.
Ask = Callable[[Sequence[tuple[int, int]]], tuple[torch.Tensor, torch.Tensor]]

METHODS = ("round_robin", "swiss", "halving")


@torch.no_grad()
def rank_samples(
    reward: Any,
    images: Any,
    prompt: str,
    top_k: int | None = None,
    ranking_method: str = "round_robin",
    num_rounds: int | None = None,
    skip_failures: bool = False,
    **context: Any,
) -> Ranking:
    r"""
    Rank samples of a prompt by any reward.

    A reward with a `rank` of its own, as [`RewardDanceScorer`], is asked for it. Another pairwise one (`is_pairwise` is True
    and it takes `references`) compares samples in both orders, and the higher reward wins. Others score each sample once.

    Args:
        reward ([`RewardDanceScorer`], `Callable` or what [`~rewarddance_hf.rewards.as_reward`] takes):
            Reward.
        images (`list` or `torch.Tensor` of shape `(n, 3, height, width)` or `(n, frames, 3, height, width)`):
            Samples: two or more for a pairwise reward.
        prompt (`str`):
            Prompt that all were generated from.
        top_k (`int`, *optional*, defaults to all):
            Number of best samples to keep in `order`.
        ranking_method (`str`, *optional*, defaults to `"round_robin"`):
            How a pairwise reward compares: `"round_robin"`, `"swiss"` or `"halving"`, as in [`RewardDanceScorer.rank`].
        num_rounds (`int`, *optional*):
            Number of rounds of a tournament, as in [`RewardDanceScorer.rank`].
        skip_failures (`bool`, *optional*, defaults to `False`):
            Whether samples that cannot be judged are left out, with a warning, instead of failing all: they are missing in
            `order`, and NaN in `scores`. When the reward raises or is not finite, each sample is asked about alone, or each
            pair of samples by a pairwise reward: the sample that is in most pairs that fail leaves, until no such pair is left.
            All others are ranked. A single sample, which a pairwise reward cannot compare, comes first with the score NaN.
        context:
            What else is known about the prompt, one value for all samples: `condition`, `task`, `criteria`, `examples`.

    Returns:
        [`~rewarddance_hf.scoring.results.Ranking`]

    Raises:
        `ValueError`: If there are too few samples, or `top_k`, `ranking_method` or `num_rounds` is out of range.
        `RewardContractError`: If a reward function does not return one number for each sample.
        `Exception`: Whatever the reward raises, without `skip_failures`.
    """
    context = {name: value for name, value in context.items() if value is not None}
    ranker = _Ranker(as_reward(reward), images, prompt, context)
    count = len(images)
    check_ranking(count, ranker.is_pairwise and not skip_failures, top_k, ranking_method, num_rounds)
    method = (top_k, ranking_method, num_rounds)
    everyone = list(range(count))
    if not skip_failures:
        return ranker.rank(everyone, *method)
    if ranker.is_pairwise and count == 1:
        return ranker.complete(None, everyone)
    ranking, good = ranker.attempt(everyone, *method), everyone
    if ranking is None:
        good = ranker.find_good()
        ranking = ranker.attempt(good, *method) if len(good) > ranker.is_pairwise else None
        if ranking is None:
            good = []
        logger.warning(
            f"{count - len(good)} of {count} samples of {prompt!r} are left out of the ranking, since they cannot be judged "
            f"({[i for i in everyone if i not in good]}): {ranker.error!r}"
        )
    return ranker.complete(ranking, good)


class _Ranker:
    """Ranks some of the samples of a prompt, and keeps what fails."""

    def __init__(self, reward: AdaptedReward, images: Any, prompt: str, context: dict[str, Any]) -> None:
        self.reward = reward
        self.images = images
        self.prompt = prompt
        self.context = context
        self.is_pairwise = reward.is_pairwise
        self.judge: Any = reward.functions[0] if reward.weights == [1.0] else reward
        self.error: Exception | None = None
        self.num_questions = 0

    def rank(
        self,
        chosen: Sequence[int],
        top_k: int | None = None,
        ranking_method: str = "round_robin",
        num_rounds: int | None = None,
    ) -> Ranking:
        samples = [self.images[i] for i in chosen]
        top_k = None if top_k is None else min(top_k, len(samples))
        method: dict[str, Any] = {"ranking_method": ranking_method, "num_rounds": num_rounds}
        if hasattr(self.judge, "rank"):
            return self.judge.rank(samples, self.prompt, top_k, **method, **self.context)
        if not self.is_pairwise:
            rewards = self.score(samples)
            return rank_by_scores(rewards, rewards, top_k)

        def ask(pairs: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
            rewards = self.score([samples[j] for _, j in pairs], references=[[samples[i]] for i, _ in pairs])
            return rewards, rewards

        return rank_by_comparisons(ask, len(samples), top_k, **method)

    def score(self, samples: list[Any], **columns: Any) -> torch.Tensor:
        columns |= {name: [value] * len(samples) for name, value in self.context.items()}
        return self.reward(_stacked(samples), [self.prompt] * len(samples), **columns).cpu()

    def attempt(self, chosen: Sequence[int], *method: Any) -> Ranking | None:
        try:
            ranking = self.rank(chosen, *method)
        except RewardContractError:
            raise
        except Exception as error:
            self.error = error
            self.num_questions += 2
            return None
        self.num_questions += ranking.num_questions
        return ranking

    def find_good(self) -> list[int]:
        """Samples that can be judged alone, or two at a time."""
        good = list(range(len(self.images)))
        if not self.is_pairwise:
            return [i for i in good if self.attempt([i]) is not None]
        with self.judge.reuse() if hasattr(self.judge, "reuse") else nullcontext():
            bad = [pair for pair in combinations(good, 2) if self.attempt(pair) is None]
        while bad:
            involved = [i for pair in bad for i in pair]
            worst = max(good, key=involved.count)
            good.remove(worst)
            bad = [pair for pair in bad if worst not in pair]
        return good

    def complete(self, ranking: Ranking | None, good: list[int]) -> Ranking:
        """A ranking of some samples as one of all."""
        count = len(self.images)
        wins, scores = torch.zeros(count), torch.full((count,), torch.nan)
        matrix = torch.full((count, count), torch.nan)
        order = good
        if ranking is not None:
            order = [good[i] for i in ranking.order]
            wins[good], scores[good] = ranking.wins.to(wins), ranking.scores.to(scores)
            matrix[torch.tensor(good)[:, None], torch.tensor(good)] = ranking.matrix.to(matrix)
        return Ranking(order, wins, scores, matrix, num_questions=self.num_questions, error=self.error)


def check_ranking(
    count: int, is_pairwise: bool, top_k: int | None, ranking_method: str, num_rounds: int | None
) -> None:
    """Refuse what cannot be ranked."""
    least = 2 if is_pairwise else 1
    if count < least:
        raise ValueError(
            f"`images` has {count} samples, but a ranking needs at least {least}. Use `score` for a single one."
        )
    if top_k is not None and not 1 <= top_k <= count:
        raise ValueError(f"`top_k` is {top_k}, but must be between 1 and the number of images, {count}.")
    if ranking_method not in METHODS:
        raise ValueError(f"`ranking_method` is {ranking_method!r}, but must be one of {METHODS}.")
    if num_rounds is not None and (ranking_method == "round_robin" or num_rounds < 1):
        wanted = "belongs to tournaments" if ranking_method == "round_robin" else "must be positive"
        raise ValueError(f"`num_rounds` is {num_rounds}, but {wanted}. Leave it out, or pass 1 or more to others.")


def rank_by_scores(log_odds: torch.Tensor, scores: torch.Tensor, top_k: int | None = None) -> Ranking:
    """Ranking by one number for each sample, whose differences are read as the log-odds of a preference."""
    margins = log_odds - log_odds[:, None]  # entry [i, j] is above 0 if j is better
    margins.fill_diagonal_(torch.nan)
    return _make_ranking(margins, scores, margins.sigmoid(), top_k, num_questions=len(scores))


def rank_by_comparisons(
    ask: Ask, count: int, top_k: int | None = None, ranking_method: str = "round_robin", num_rounds: int | None = None
) -> Ranking:
    """Ranking by comparisons in both orders."""
    yes = torch.full((count, count), torch.nan, dtype=torch.float64)
    matrix = torch.full((count, count), torch.nan)

    def play(pairs: Sequence[tuple[int, int]]) -> list[float]:
        # In the order of references, which is that of shared prefixes.
        orders = sorted([*pairs, *((j, i) for i, j in pairs)])
        probabilities, rewards = ask(orders)
        references, samples = torch.tensor(orders).T
        yes[references, samples] = probabilities.double().cpu()
        matrix[references, samples] = rewards.cpu()
        return [float(yes[i, j] - yes[j, i]) for i, j in pairs]

    order = None
    if ranking_method == "swiss":
        order = swiss(count, play, num_rounds)
    elif ranking_method == "halving":
        order = halving(count, play, num_rounds, top_k)
    else:
        play(list(combinations(range(count), 2)))
    # Entry [i, j] of `yes - yes.T`: above 0 if j is better than i.
    scores, num_questions = matrix.nanmean(dim=0), int(matrix.isfinite().sum())
    return _make_ranking(yes - yes.T, scores, matrix, top_k, order, num_questions)


def _make_ranking(
    margins: torch.Tensor,
    scores: torch.Tensor,
    matrix: torch.Tensor,
    top_k: int | None,
    order: list[int] | None = None,
    num_questions: int = 0,
) -> Ranking:
    """Ranking by margins, of which entry [i, j] is above 0 if j is better than i, unless a tournament gave an order."""
    wins = ((margins > 0) + 0.5 * (margins == 0)).sum(dim=0)
    if order is None:
        order = sorted(range(len(wins)), key=lambda i: (-float(wins[i]), -float(scores[i]), i))
    return Ranking(order=order[:top_k], wins=wins, scores=scores, matrix=matrix, num_questions=num_questions)


def _stacked(samples: list[Any]) -> Any:
    """Samples that come as tensors of one shape as one tensor."""
    if all(isinstance(sample, torch.Tensor) for sample in samples) and len({sample.shape for sample in samples}) == 1:
        return torch.stack(samples)
    return samples


class Standings:
    """Who has met whom, and how it went."""

    def __init__(self, count: int, play: Play) -> None:
        self.play_pairs = play
        self.wins = [0.0] * count
        self.margins = [0.0] * count
        self.opponents: list[list[int]] = [[] for _ in range(count)]

    def play(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Play one round."""
        if not pairs:
            return
        for (i, j), margin in zip(pairs, self.play_pairs(pairs), strict=True):
            self.wins[j] += 0.5 if margin == 0 else float(margin > 0)
            self.wins[i] += 0.5 if margin == 0 else float(margin < 0)
            self.margins[j] += margin
            self.margins[i] -= margin
            self.opponents[i].append(j)
            self.opponents[j].append(i)

    def order(self, samples: Sequence[int]) -> list[int]:
        """Samples, best first: by share of wins, then by that of those they met, then by how clear it was, then by index."""
        rates = [self.wins[i] / max(len(self.opponents[i]), 1) for i in range(len(self.wins))]

        def key(i: int) -> tuple[float, float, float, int]:
            games = max(len(self.opponents[i]), 1)
            return -rates[i], -sum(rates[j] for j in self.opponents[i]) / games, -self.margins[i] / games, i

        return sorted(samples, key=key)


def swiss(count: int, play: Play, num_rounds: int | None = None) -> list[int]:
    """
    Play a Swiss tournament of `num_rounds` rounds: in each, neighbors in the standings meet that have not met before.

    The default is the binary logarithm of `count`, rounded up, after which a best sample that never loses is first.
    Returns samples, best first.
    """
    standings = Standings(count, play)
    for _ in range(_swiss_rounds(count, num_rounds)):
        standings.play(_pair(standings, standings.order(range(count))))
    return standings.order(range(count))


def halving(count: int, play: Play, num_rounds: int | None = None, top_k: int | None = None) -> list[int]:
    """
    Play by sequential halving: after `num_rounds` rounds (2 by default) the worse half leaves, until `top_k` (1) are left.

    Earlier stages count on. Returns samples, best first: those that left later go before.
    """
    standings = Standings(count, play)
    alive = list(range(count))
    left: list[int] = []
    for _, kept, rounds in _stages(count, 2 if num_rounds is None else num_rounds, top_k or 1):
        for _ in range(rounds):
            standings.play(_pair(standings, standings.order(alive)))
        order = standings.order(alive)
        alive, left = order[:kept], order[kept:] + left
    return alive + left


def _swiss_rounds(count: int, num_rounds: int | None) -> int:
    rounds = math.ceil(math.log2(count)) if num_rounds is None else num_rounds
    return min(rounds, count - 1 + count % 2)


def _stages(count: int, num_rounds: int, top_k: int) -> list[tuple[int, int, int]]:
    """Samples at the start, samples that stay, and rounds, of each stage of a sequential halving."""
    stages = []
    while count > max(top_k, 1):
        kept = max((count + 1) // 2, top_k)
        # With an odd number one sample waits in each round.
        stages.append((count, kept, min(num_rounds, count - 1 + count % 2)))
        count = kept
    return stages or [(count, count, min(num_rounds, count - 1 + count % 2))]


def _pair(standings: Standings, order: list[int]) -> list[tuple[int, int]]:
    """Pairs of neighbors that have not met. With an odd number the last of those who have played most waits."""
    waiting = list(order)
    if len(waiting) % 2:
        most = max(len(standings.opponents[i]) for i in waiting)
        waiting.remove(next(i for i in reversed(waiting) if len(standings.opponents[i]) == most))
    pairs = []
    while waiting:
        first = waiting.pop(0)
        second = next((i for i in waiting if i not in standings.opponents[first]), None)
        if second is not None:
            waiting.remove(second)
            pairs.append((first, second))
    return pairs
