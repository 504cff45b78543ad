"""Good, same or bad against a baseline, as an `evaluate` module."""

from typing import Any

import datasets
import evaluate
import numpy as np


_DESCRIPTION = """
GSB compares a generator with a baseline: each pair of samples for the same prompt is good (the generator's is better),
same or bad, and `GSB = (good - bad) / (good + same + bad)`. It is how the RewardDance paper reports what tuning gains in
video generation. Who judged the pairs, people or a model, has to be said beside the number.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` of `float`):
        Probability in [0, 1] that the generator's sample is better than the baseline's: 1.0, 0.5 and 0.0 for votes, the
        mean of both orders for a judge.
    same_margin (`float`, *optional*, defaults to 0.05):
        A pair is the same where the probability is at most this far from 0.5.
    bootstrap_samples (`int`, *optional*, defaults to 1000):
        Number of resampled data sets behind the interval.
    seed (`int`, *optional*, defaults to 0):
        Seed of the bootstrap.

Returns:
    gsb (`float`): (good - bad) / (good + same + bad), in [-1, 1].
    gsb_low, gsb_high (`float`): ends of its 95 % bootstrap interval over pairs.
    good, same, bad (`int`): number of pairs of each kind.

Examples:
    >>> metric = evaluate.load("gsb")
    >>> results = metric.compute(predictions=[1.0, 1.0, 0.5, 0.0])
    >>> results["gsb"], results["good"], results["same"], results["bad"]
    (0.25, 2, 1, 1)
"""

_CITATION = """
@article{rewarddance2025,
    title  = {RewardDance: Reward Scaling in Visual Generation},
    year   = {2025},
    eprint = {2509.08826},
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Gsb(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Value("float64")}),
        )

    def _compute(
        self, predictions: Any, same_margin: float = 0.05, bootstrap_samples: int = 1000, seed: int = 0
    ) -> dict[str, Any]:
        probabilities = np.asarray(predictions, dtype=np.float64)
        if not ((probabilities >= 0) & (probabilities <= 1)).all():
            raise ValueError(
                "`predictions` must be numbers in [0, 1], but some are not: apply the sigmoid to log-odds."
            )
        if not 0 <= same_margin < 0.5:
            raise ValueError(f"`same_margin` is {same_margin}, but must be in [0, 0.5). Leave it at 0.05.")
        if bootstrap_samples < 1:
            raise ValueError(f"`bootstrap_samples` is {bootstrap_samples}, but must be 1 or more. Leave it at 1000.")
        verdicts = np.where(np.abs(probabilities - 0.5) <= same_margin, 0.0, np.sign(probabilities - 0.5))
        generator = np.random.default_rng(seed)
        count = len(verdicts)
        means = [verdicts[generator.integers(count, size=count)].mean() for _ in range(bootstrap_samples)]
        low, high = np.quantile(means, [0.025, 0.975])
        return {
            "gsb": float(verdicts.mean()),
            "gsb_low": float(low),
            "gsb_high": float(high),
            "good": int((verdicts > 0).sum()),
            "same": int((verdicts == 0).sum()),
            "bad": int((verdicts < 0).sum()),
        }
