"""
Arithmetic of preference evaluation, on plain NumPy arrays.

A row has two questions, one for each order of its images. `probabilities` and `log_odds` of shape `(rows, 2)` are those
of the chosen image being preferred; where a function takes `labels` they are those of "yes" being the answer.
"""

import math

import numpy as np


TEMPERATURE_BOUNDS = (0.01, 100.0)


def sigmoid(log_odds: np.ndarray) -> np.ndarray:
    """Probabilities of log-odds."""
    return np.exp(-np.logaddexp(0.0, -np.asarray(log_odds, dtype=np.float64)))


def verdict_credits(log_odds: np.ndarray) -> np.ndarray:
    """
    Credit of each verdict: 1 where the chosen image is preferred, 0 where the rejected one is, 0.5 where they are equal.

    >>> verdict_credits(np.array([2.0, 0.0, -0.1]))
    array([1. , 0.5, 0. ])
    """
    log_odds = _checked("log_odds", log_odds)
    return (log_odds > 0) + 0.5 * (log_odds == 0)


def accuracy_with_ties(probabilities: np.ndarray, ties: np.ndarray, tie_margin: float) -> float:
    """
    Accuracy over three verdicts: chosen, rejected, tie. A tie is predicted where the probability, one for each row, is at
    most `tie_margin` from 0.5; that is right where the row is a tie and wrong elsewhere.
    """
    probabilities = _checked("probabilities", probabilities)
    predicted_ties = np.abs(probabilities - 0.5) <= tie_margin
    return float(np.where(predicted_ties, ties, ~np.asarray(ties, dtype=bool) & (probabilities > 0.5)).mean())


def order_consistency(log_odds: np.ndarray) -> float:
    """Share of rows `(rows, 2)` with the same verdict in both orders, right or wrong."""
    log_odds = _checked("log_odds", log_odds)
    return float((np.sign(log_odds[:, 0]) == np.sign(log_odds[:, 1])).mean())


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray, num_bins: int = 10) -> float:
    """
    Mean distance between predicted and observed frequency of "yes" over `num_bins` bins of equal width, weighted by the
    number of questions in each.

    >>> round(expected_calibration_error(np.array([0.9, 0.9, 0.9, 0.9]), np.array([1, 1, 1, 0])), 3)
    0.15
    """
    probabilities = _checked("probabilities", probabilities).ravel()
    labels = np.asarray(labels, dtype=np.float64).ravel()
    bins = np.minimum((probabilities * num_bins).astype(int), num_bins - 1)
    gaps = np.bincount(bins, weights=labels - probabilities, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(probabilities))


def brier_score(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean squared difference of probabilities and labels."""
    return float(((_checked("probabilities", probabilities) - labels) ** 2).mean())


def negative_log_likelihood(log_odds: np.ndarray, labels: np.ndarray) -> float:
    """Mean negative log-likelihood of labels over all questions, in nats."""
    signs = 2.0 * np.asarray(labels, dtype=np.float64) - 1.0
    return float(np.logaddexp(0.0, -signs * _checked("log_odds", log_odds)).mean())


def fit_temperature(log_odds: np.ndarray, labels: np.ndarray) -> float:
    """
    Temperature that divides log-odds so that the negative log-likelihood is smallest. A bound is the answer when all verdicts
    are right, or most are wrong.
    """
    log_odds = _checked("log_odds", log_odds)

    def loss(log_temperature: float) -> float:
        return negative_log_likelihood(log_odds / math.exp(log_temperature), labels)

    # Golden-section search: the loss is convex in 1 / temperature, so it has one valley over log-temperature too.
    ratio = (math.sqrt(5) - 1) / 2
    bounds = [math.log(bound) for bound in TEMPERATURE_BOUNDS]
    low, high = bounds
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    left_loss, right_loss = loss(left), loss(right)
    while high - low > 1e-6:
        if left_loss <= right_loss:
            high, right, right_loss = right, left, left_loss
            left = high - ratio * (high - low)
            left_loss = loss(left)
        else:
            low, left, left_loss = left, right, right_loss
            right = low + ratio * (high - low)
            right_loss = loss(right)
    return math.exp(min([bounds[0], (low + high) / 2, bounds[1]], key=loss))


def bootstrap_interval(
    values: np.ndarray, num_samples: int = 1000, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float]:
    """Lower and upper end of the bootstrap interval of the mean of `values` `(rows,)`."""
    values = _checked("values", values)
    generator = np.random.default_rng(seed)
    means = [values[generator.integers(len(values), size=len(values))].mean() for _ in range(num_samples)]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _checked(name: str, array: np.ndarray) -> np.ndarray:
    array = np.asarray(array, dtype=np.float64)
    if array.size == 0:
        raise ValueError(f"`{name}` is empty, but must have at least one entry. Check the dataset and its filters.")
    if not np.isfinite(array).all():
        raise ValueError(
            f"`{name}` is NaN or infinite in {int((~np.isfinite(array)).sum())} of {array.size} entries, but must be finite. "
            "Check the weights of the judge."
        )
    return array
