"""Tournaments: whom to compare with whom, to rank many samples by few comparisons."""

import math
from collections.abc import Callable, Sequence


# Comparisons of one round: for each pair `(i, j)` a number above 0 if `j` is better, below 0 if `i` is.
Play = Callable[[Sequence[tuple[int, int]]], Sequence[float]]

METHODS = ("round_robin", "swiss", "halving")


class Standings:
    """
    Who has met whom, and how it went.

    Args:
        count (`int`):
            Number of samples.
        play (`Callable`):
            Function that compares pairs of samples.
    """

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


def num_comparisons(method: str, count: int, num_rounds: int | None = None, top_k: int | None = None) -> int:
    """
    State how many comparisons a tournament has at most, each of which is two judgements. No pair meets twice.

    Args:
        method (`str`):
            `"round_robin"`, `"swiss"` or `"halving"`.
        count (`int`):
            Number of samples.
        num_rounds (`int`, *optional*):
            Number of rounds, as in [`swiss`] and [`halving`].
        top_k (`int`, *optional*):
            Number of best samples that are wanted, as in [`halving`].

    Returns:
        `int`: `n * (n - 1) / 2` of a round robin, `num_rounds * (n // 2)` of a Swiss tournament, less than `num_rounds * n`
        of sequential halving.
    """
    if method == "round_robin":
        return count * (count - 1) // 2
    if method == "swiss":
        return _swiss_rounds(count, num_rounds) * (count // 2)
    stages = _stages(count, 2 if num_rounds is None else num_rounds, top_k or 1)
    return sum(rounds * (alive // 2) for alive, _, rounds in stages)


def swiss(count: int, play: Play, num_rounds: int | None = None) -> list[int]:
    """
    Play a Swiss tournament: in each round, neighbors in the standings meet that have not met before.

    Args:
        count (`int`):
            Number of samples.
        play (`Callable`):
            Function that compares pairs of samples.
        num_rounds (`int`, *optional*):
            Number of rounds of `count // 2` comparisons. Defaults to the binary logarithm of `count`, rounded up, after
            which a best sample that never loses is first.

    Returns:
        `list[int]`: Samples, best first.
    """
    standings = Standings(count, play)
    for _ in range(_swiss_rounds(count, num_rounds)):
        standings.play(_pair(standings, standings.order(range(count))))
    return standings.order(range(count))


def halving(count: int, play: Play, num_rounds: int | None = None, top_k: int | None = None) -> list[int]:
    """
    Play by sequential halving: after some rounds the worse half leaves, until as many are left as are wanted.

    Args:
        count (`int`):
            Number of samples.
        play (`Callable`):
            Function that compares pairs of samples.
        num_rounds (`int`, *optional*, defaults to `2`):
            Number of rounds in each stage, in which each sample meets another one. Earlier stages count on.
        top_k (`int`, *optional*, defaults to `1`):
            Number of best samples that are wanted.

    Returns:
        `list[int]`: Samples, best first: those that left later go before.
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
