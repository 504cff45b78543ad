"""Calibration of a reward that is a probability, as an `evaluate` module."""

from typing import Any

import datasets
import evaluate
import numpy as np


_DESCRIPTION = """
Reward calibration says whether the probability of "yes" can be taken at its word: of all answers with 80 %, 80 % should
be right. The expected calibration error compares both in bins of equal width, the Brier score is the mean squared
difference. A low error says nothing about accuracy: a judge that always answers 50 % has none on balanced data.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` of `float`):
        Probability of "yes" in [0, 1].
    references (`list` of `float`):
        1.0 where "yes" is right, 0.0 where "no" is, or a share of votes between.
    num_bins (`int`, *optional*, defaults to 10):
        Number of bins of equal width.

Returns:
    ece (`float`): expected calibration error in [0, 1], weighted by the number of answers in each bin.
    brier (`float`): mean squared difference in [0, 1].
    num_answers (`int`): number of answers.

Examples:
    >>> metric = evaluate.load("reward_calibration")
    >>> results = metric.compute(predictions=[0.9, 0.9, 0.9, 0.9], references=[1, 1, 1, 0])
    >>> round(results["ece"], 3), round(results["brier"], 3)
    (0.15, 0.21)
"""

_CITATION = """
@article{rewarddance2025,
    title  = {RewardDance: Reward Scaling in Visual Generation},
    year   = {2025},
    eprint = {2509.08826},
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class RewardCalibration(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": number, "references": number}),
        )

    def _compute(self, predictions: Any, references: Any, num_bins: int = 10) -> dict[str, Any]:
        probabilities, labels = (np.asarray(values, dtype=np.float64) for values in (predictions, references))
        for name, values in {"predictions": probabilities, "references": labels}.items():
            if not ((values >= 0) & (values <= 1)).all():
                raise ValueError(
                    f"`{name}` must be numbers in [0, 1], but some are not: apply the sigmoid to log-odds."
                )
        if num_bins < 1:
            raise ValueError(f"`num_bins` is {num_bins}, but must be 1 or more. Leave it at 10.")
        bins = np.minimum((probabilities * num_bins).astype(int), num_bins - 1)
        gaps = np.bincount(bins, weights=labels - probabilities, minlength=num_bins)
        return {
            "ece": float(np.abs(gaps).sum() / len(probabilities)),
            "brier": float(((probabilities - labels) ** 2).mean()),
            "num_answers": len(probabilities),
        }
