"""Means and intervals over seeds and rows."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


NUM_SAMPLES = 2000


class Estimate(NamedTuple):
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float

    def percent(self) -> str:
        """As text in percent, e.g. `"91.2 (90.1 to 92.4)"`."""
        return f"{100 * self.value:.1f} ({100 * self.low:.1f} to {100 * self.high:.1f})"

    def points(self) -> str:
        """As text in percentage points with signs, e.g. `"+2.1 (-0.3 to +4.4)"`."""
        return f"{100 * self.value:+.1f} ({100 * self.low:+.1f} to {100 * self.high:+.1f})"


def estimate(
    values: Sequence[Sequence[float]] | np.ndarray, others: Sequence[Sequence[float]] | None = None
) -> Estimate:
    """
    Mean over seeds and rows of `values` (seeds, rows), or of its difference to `others` of the same rows, with the 95 % interval of a
    bootstrap that draws seeds and rows: what another training and other rows would give.
    """
    first = np.asarray(values, dtype=np.float64)
    second = np.zeros((1, first.shape[1])) if others is None else np.asarray(others, dtype=np.float64)
    rng = np.random.default_rng(0)
    means = []
    for _ in range(NUM_SAMPLES):
        rows = rng.integers(first.shape[1], size=first.shape[1])
        drawn = [part[rng.integers(len(part), size=len(part))][:, rows].mean() for part in (first, second)]
        means.append(drawn[0] - drawn[1])
    low, high = np.quantile(means, (0.025, 0.975))
    return Estimate(float(first.mean() - second.mean()), float(low), float(high))


def good_same_bad(values: Sequence[Sequence[float]], others: Sequence[float]) -> Estimate:
    """
    GSB of Section 4.1, (good - bad) / all, over seeds and rows of `values` (seeds, rows) against `others` (rows,): a row is good where
    its value is higher.
    """
    return estimate(np.sign(np.asarray(values) - np.asarray(others)))


def verdict(difference: Estimate) -> str:
    """Whether a claim that a difference is positive holds."""
    if difference.low > 0:
        return "holds"
    return "does not hold" if difference.high < 0 else "undecided"


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Spearman's rank correlation of paired values, with a bootstrap interval over pairs."""
    pairs = np.array([first, second], dtype=np.float64)
    rng = np.random.default_rng(0)
    drawn = [_spearman(pairs[:, rng.integers(pairs.shape[1], size=pairs.shape[1])]) for _ in range(NUM_SAMPLES)]
    low, high = np.nanquantile(drawn, (0.025, 0.975))
    return Estimate(_spearman(pairs), float(low), float(high))


def _spearman(pairs: np.ndarray) -> float:
    ranks = []
    for values in pairs:
        order = np.argsort(np.argsort(values)).astype(np.float64)
        for value in np.unique(values):  # equal values share their mean rank
            order[values == value] = order[values == value].mean()
        ranks.append(order)
    if ranks[0].std() == 0 or ranks[1].std() == 0:
        return float("nan")
    return float(np.corrcoef(ranks)[0, 1])
