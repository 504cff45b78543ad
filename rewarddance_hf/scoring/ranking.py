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
    """
    Ranking of the samples of a prompt by any reward; the other arguments are those of [`RewardDanceScorer.rank`].

    A reward that has a `rank` method is asked to rank. Any other pairwise reward compares samples in both orders, and
    the higher reward wins. Pointwise rewards score each sample once. `context` holds one value for all samples:
    `condition`, `task`, `criteria`, `examples`.

    With `skip_failures`, samples that cannot be judged are left out with a warning, and the others are still ranked:
    they are missing in `order`, and NaN in `scores`. Each sample is then asked about alone, or each pair by a pairwise
    reward: the sample that is in most pairs that fail leaves, until no such pair is left. A single sample, which a
    pairwise reward cannot compare, comes first with the score NaN.
    """
    context = {name: value for name, value in context.items() if value is not None}
    ranker = _Ranker(as_reward(reward), images, prompt, context)
    count = len(images)
    check_ranking(count, ranker.is_pairwise and not skip_failures, top_k, ranking_method, num_rounds)
    method: dict[str, Any] = {"top_k": top_k, "ranking_method": ranking_method, "num_rounds": num_rounds}
    everyone = list(range(count))
    if not skip_failures:
        return ranker.rank(everyone, **method)
    if ranker.is_pairwise and count == 1:
        return ranker.complete(None, everyone)
    ranking, good = ranker.attempt(everyone, **method), everyone
    if ranking is None:
        good = ranker.find_good()
        ranking = ranker.attempt(good, **method) if len(good) > ranker.is_pairwise else None
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

    def rank(self, chosen: Sequence[int], top_k: int | None = None, **method: Any) -> Ranking:
        samples = [self.images[i] for i in chosen]
        top_k = None if top_k is None else min(top_k, len(samples))
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
        shapes = {sample.shape if isinstance(sample, torch.Tensor) else None for sample in samples}
        images = torch.stack(samples) if len(shapes) == 1 and None not in shapes else samples
        return self.reward(images, [self.prompt] * len(samples), **columns).cpu()

    def attempt(self, chosen: Sequence[int], **method: Any) -> Ranking | None:
        """The ranking, or None if it fails."""
        try:
            ranking = self.rank(chosen, **method)
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
    margins = (log_odds - log_odds[:, None]).fill_diagonal_(torch.nan)
    wins = _count_wins(margins)
    return Ranking(_order(wins, scores)[:top_k], wins, scores, margins.sigmoid(), num_questions=len(scores))


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
    scores, wins = matrix.nanmean(dim=0), _count_wins(yes - yes.T)
    order = _order(wins, scores) if order is None else order
    return Ranking(order[:top_k], wins, scores, matrix, num_questions=int(matrix.isfinite().sum()))


def _count_wins(margins: torch.Tensor) -> torch.Tensor:
    """Wins of each sample; entry [i, j] of `margins` is above 0 if j is better than i."""
    return ((margins > 0) + 0.5 * (margins == 0)).sum(dim=0)


def _order(wins: torch.Tensor, scores: torch.Tensor) -> list[int]:
    return sorted(range(len(wins)), key=lambda i: (-float(wins[i]), -float(scores[i]), i))


class Standings:
    """Who has met whom, and how it went."""

    def __init__(self, count: int, play: Play) -> None:
        self.play = play
        self.wins = [0.0] * count
        self.margins = [0.0] * count
        self.opponents: list[list[int]] = [[] for _ in range(count)]

    def play_rounds(self, samples: Sequence[int], num_rounds: int) -> list[int]:
        """Let neighbors in the standings meet that have not met before. Returns the samples, best first."""
        for _ in range(min(num_rounds, len(samples) - 1 + len(samples) % 2)):
            pairs = self.pair(samples)
            for (i, j), margin in zip(pairs, self.play(pairs) if pairs else (), strict=True):
                self.wins[j] += 0.5 if margin == 0 else float(margin > 0)
                self.wins[i] += 0.5 if margin == 0 else float(margin < 0)
                self.margins[j] += margin
                self.margins[i] -= margin
                self.opponents[i].append(j)
                self.opponents[j].append(i)
        return self.order(samples)

    def order(self, samples: Sequence[int]) -> list[int]:
        """Samples, best first: by share of wins, by that of their opponents, by how clear the wins were, then by index."""
        games = [max(len(opponents), 1) for opponents in self.opponents]
        rates = [wins / count for wins, count in zip(self.wins, games, strict=True)]

        def key(i: int) -> tuple[float, float, float, int]:
            return -rates[i], -sum(rates[j] for j in self.opponents[i]) / games[i], -self.margins[i] / games[i], i

        return sorted(samples, key=key)

    def pair(self, samples: Sequence[int]) -> list[tuple[int, int]]:
        """Pairs of neighbors that have not met. With an odd number, the last of those that have played most waits."""
        waiting = self.order(samples)
        if len(waiting) % 2:
            waiting.remove(max(reversed(waiting), key=lambda i: len(self.opponents[i])))
        pairs = []
        while waiting:
            first = waiting.pop(0)
            second = next((i for i in waiting if i not in self.opponents[first]), None)
            if second is not None:
                waiting.remove(second)
                pairs.append((first, second))
        return pairs


def swiss(count: int, play: Play, num_rounds: int | None = None) -> list[int]:
    """
    Samples, best first, after a Swiss tournament. After the default number of rounds, the binary logarithm of `count`, a best
    sample that never loses is first.
    """
    rounds = math.ceil(math.log2(count)) if num_rounds is None else num_rounds
    return Standings(count, play).play_rounds(range(count), rounds)


def halving(count: int, play: Play, num_rounds: int | None = None, top_k: int | None = None) -> list[int]:
    """
    Samples, best first, after sequential halving: after each `num_rounds` (2) rounds the worse half leaves, until `top_k` (1)
    are left. Earlier rounds still count, and those that left later come before those that left earlier.
    """
    standings = Standings(count, play)
    alive, left, wanted = list(range(count)), list[int](), top_k or 1
    while True:
        order = standings.play_rounds(alive, 2 if num_rounds is None else num_rounds)
        kept = max((len(alive) + 1) // 2, wanted)
        alive, left = order[:kept], order[kept:] + left
        if len(alive) <= wanted:
            return alive + left
