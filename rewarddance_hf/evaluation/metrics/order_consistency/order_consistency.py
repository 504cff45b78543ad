"""How often a judge keeps its verdict when two samples change places, as an `evaluate` module."""

from typing import Any

import datasets
import evaluate
import numpy as np


_DESCRIPTION = """
Order consistency is the share of pairs about which a judge says the same, right or wrong, when the two samples change
places. A judge that looks at positions rather than images shows here and in `second_place_rate`, and can still have a
high accuracy where the better sample always comes at the same place.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` of `float`):
        Probability in [0, 1] that sample A is better, asked with A in the second place.
    swapped_predictions (`list` of `float`):
        Probability in [0, 1] that the same sample A is better, asked with A in the first place.

Returns:
    order_consistency (`float`): share of pairs with the same winner in both orders; a probability of exactly 0.5 is a tie
        and agrees with a tie only.
    second_place_rate (`float`): share of all verdicts that are for the sample in the second place, ties counting one half.
        0.5 without any bias.
    mean_difference (`float`): mean distance between both probabilities.
    num_pairs (`int`): number of pairs.

Examples:
    >>> metric = evaluate.load("order_consistency")
    >>> results = metric.compute(predictions=[0.9, 0.8, 0.3, 0.7], swapped_predictions=[0.8, 0.3, 0.4, 0.6])
    >>> results["order_consistency"], results["second_place_rate"], round(results["mean_difference"], 3)
    (0.75, 0.625, 0.2)
"""

_CITATION = """
@article{rewarddance2025,
    title  = {RewardDance: Reward Scaling in Visual Generation},
    year   = {2025},
    eprint = {2509.08826},
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class OrderConsistency(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": number, "swapped_predictions": number}),
        )

    def _compute(self, predictions: Any, swapped_predictions: Any) -> dict[str, Any]:
        second, first = (np.asarray(values, dtype=np.float64) for values in (predictions, swapped_predictions))
        for name, values in {"predictions": second, "swapped_predictions": first}.items():
            if not ((values >= 0) & (values <= 1)).all():
                raise ValueError(
                    f"`{name}` must be numbers in [0, 1], but some are not: apply the sigmoid to log-odds."
                )
        for_second = np.concatenate([second, 1 - first])
        return {
            "order_consistency": float((np.sign(second - 0.5) == np.sign(first - 0.5)).mean()),
            "second_place_rate": float(((for_second > 0.5) + 0.5 * (for_second == 0.5)).mean()),
            "mean_difference": float(np.abs(second - first).mean()),
            "num_pairs": len(second),
        }
