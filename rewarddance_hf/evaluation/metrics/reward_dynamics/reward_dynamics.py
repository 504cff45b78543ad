"""Mean and standard deviation of rewards in a sliding window of a run, as an `evaluate` module."""

from typing import Any

import datasets
import evaluate
import numpy as np


_DESCRIPTION = """
Reward dynamics follows the rewards of a run in a sliding window. A standard deviation that stays high late in the run
means that the generator still explores; one that falls to nearly nothing while the mean is high is the sign of mode
collapse, and with it of reward hacking (Figure 5 of the RewardDance paper, with windows of 1,000 iterations). It depends
on the scale of the reward, so compare runs with the same judge only.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` of `float`):
        Rewards of the run, one per iteration, in order.
    window (`int`, *optional*, defaults to 1000):
        Number of iterations in a window. The last windows are what the paper reports.

Returns:
    means, stds (`list` of `float`): mean and standard deviation of each window, the first one starting at iteration 0,
        the next one at iteration 1, and so on.
    first_std, last_std (`float`): standard deviation of the first and of the last window.
    std_ratio (`float`): the last one divided by the first one, NaN if that is 0.

Examples:
    >>> metric = evaluate.load("reward_dynamics")
    >>> results = metric.compute(predictions=[0.0, 1.0, 0.0, 1.0, 0.75, 0.75], window=2)
    >>> results["stds"]
    [0.5, 0.5, 0.5, 0.125, 0.0]
    >>> results["std_ratio"]
    0.0
"""

_CITATION = """
@article{rewarddance2025,
    title  = {RewardDance: Reward Scaling in Visual Generation},
    year   = {2025},
    eprint = {2509.08826},
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class RewardDynamics(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Value("float64")}),
        )

    def _compute(self, predictions: Any, window: int = 1000) -> dict[str, Any]:
        rewards = np.asarray(predictions, dtype=np.float64)
        if not np.isfinite(rewards).all():
            raise ValueError("`predictions` must be finite, but some are NaN or infinite. Drop those iterations.")
        if not 1 <= window <= len(rewards):
            raise ValueError(
                f"`window` is {window}, but must be between 1 and the number of rewards, {len(rewards)}. Make it smaller."
            )
        windows = np.lib.stride_tricks.sliding_window_view(rewards, window)
        means, stds = windows.mean(axis=1), windows.std(axis=1)
        return {
            "means": means.tolist(),
            "stds": stds.tolist(),
            "first_std": float(stds[0]),
            "last_std": float(stds[-1]),
            "std_ratio": float(stds[-1] / stds[0]) if stds[0] > 0 else float("nan"),
        }
