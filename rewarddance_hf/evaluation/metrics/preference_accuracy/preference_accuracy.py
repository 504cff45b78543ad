"""Accuracy of preferences between two samples, with ties left out and counted, as an `evaluate` module."""

from typing import Any

import datasets
import evaluate
import numpy as np


_DESCRIPTION = """
Preference accuracy is the share of pairs in which a judge prefers the sample that people prefer. Pairs that are ties to
people are left out of `accuracy` and counted in `accuracy_with_ties`, where a judge says "tie" by a probability near 0.5.
Both rules give different numbers on the same data: write the rule and the split beside every number.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` of `float`, or of `list` of `float`):
        Probability in [0, 1] that the first sample is better than the second, for each pair. A judge that was asked in
        both orders of the samples gives two of them: each counts one half in `accuracy`, and their mean decides in
        `accuracy_with_ties`.
    references (`list` of `float`):
        1.0 where people prefer the first sample, 0.0 the second, 0.5 a tie. Other values are votes: above 0.5 is for the
        first.
    tie_margin (`float`, *optional*, defaults to 0.05):
        A tie is predicted where the probability is at most this far from 0.5. Only for `accuracy_with_ties`.
    bootstrap_samples (`int`, *optional*, defaults to 1000):
        Number of resampled data sets behind the interval.
    seed (`int`, *optional*, defaults to 0):
        Seed of the bootstrap.

Returns:
    accuracy (`float`): share of pairs that are no ties in which the preferred sample is preferred; a probability of
        exactly 0.5 is half right.
    accuracy_low, accuracy_high (`float`): ends of its 95 % bootstrap interval over pairs.
    accuracy_with_ties (`float`): share of right verdicts among first, second and tie, over all pairs.
    num_pairs, num_ties (`int`): pairs that are no ties, and ties.

Examples:
    >>> metric = evaluate.load("preference_accuracy")
    >>> results = metric.compute(predictions=[0.9, 0.2, 0.4, 0.5], references=[1.0, 0.0, 1.0, 0.5])
    >>> round(results["accuracy"], 3), results["accuracy_with_ties"], results["num_ties"]
    (0.667, 0.75, 1)
    >>> metric.compute(predictions=[[0.9, 0.4], [0.3, 0.2]], references=[1.0, 0.0])["accuracy"]
    0.75
"""

_CITATION = """
@article{rewarddance2025,
    title  = {RewardDance: Reward Scaling in Visual Generation},
    year   = {2025},
    eprint = {2509.08826},
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class PreferenceAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=[
                datasets.Features({"predictions": number, "references": number}),
                datasets.Features({"predictions": datasets.Sequence(number), "references": number}),
            ],
        )

    def _compute(
        self, predictions: Any, references: Any, tie_margin: float = 0.05, bootstrap_samples: int = 1000, seed: int = 0
    ) -> dict[str, Any]:
        probabilities = _by_order(predictions)
        votes = np.asarray(references, dtype=np.float64)
        for name, values in {"predictions": probabilities, "references": votes}.items():
            if not ((values >= 0) & (values <= 1)).all():
                raise ValueError(
                    f"`{name}` must be numbers in [0, 1], but some are not: apply the sigmoid to log-odds."
                )
        if not 0 <= tie_margin < 0.5:
            raise ValueError(f"`tie_margin` is {tie_margin}, but must be in [0, 0.5). Leave it at 0.05.")
        if bootstrap_samples < 1:
            raise ValueError(f"`bootstrap_samples` is {bootstrap_samples}, but must be 1 or more. Leave it at 1000.")
        ties = votes == 0.5
        if ties.all():
            raise ValueError(f"`references` has {len(votes)} pairs and all are ties: accuracy needs a preference.")
        # Seen from the preferred sample.
        toward = np.where((votes > 0.5)[:, None], probabilities, 1 - probabilities)
        credits = ((toward > 0.5) + 0.5 * (toward == 0.5))[~ties].mean(axis=1)
        low, high = _bootstrap_interval(credits, bootstrap_samples, seed)
        averaged = toward.mean(axis=1)
        right = np.where(np.abs(averaged - 0.5) <= tie_margin, ties, ~ties & (averaged > 0.5))
        return {
            "accuracy": float(credits.mean()),
            "accuracy_low": low,
            "accuracy_high": high,
            "accuracy_with_ties": float(right.mean()),
            "num_pairs": int((~ties).sum()),
            "num_ties": int(ties.sum()),
        }


def _by_order(predictions: Any) -> np.ndarray:
    rows = [np.atleast_1d(np.asarray(row, dtype=np.float64)) for row in predictions]
    lengths = sorted({len(row) for row in rows})
    if len(lengths) != 1 or lengths[0] == 0:
        raise ValueError(
            f"`predictions` has {lengths} probabilities per pair, but must have equally many for all pairs."
        )
    return np.stack(rows)  # (pairs, orders)


def _bootstrap_interval(values: np.ndarray, num_samples: int, seed: int) -> tuple[float, float]:
    generator = np.random.default_rng(seed)
    means = [values[generator.integers(len(values), size=len(values))].mean() for _ in range(num_samples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
