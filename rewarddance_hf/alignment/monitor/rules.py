r"""
Signs of reward hacking: each rule compares what is known with what a healthy run shows.

The paper's diagnostic is the standard deviation of the reward in a sliding window: low late in training, it shows that
the generator has collapsed to what the reward likes (0.005 with a 1B judge, 0.05 with a 26B one). It is kept here, but
warns late, and of one kind of hacking only. Beside it stand

- **a held-out reward**, on the same prompts and seeds each time. As in
  [Gao et al.](https://huggingface.co/papers/2210.10760), it first rises with the tuned reward, then falls while that
  goes on rising. As prompts and seeds stay the same, the noise of a change is the standard error of paired
  differences, which is much smaller than that of the values. An evaluation is compared with the best one so far. Since
  the best of many is partly luck, the significance level is divided by their number (Bonferroni).
- **transfer.** In standard deviations of the start, a small change of a generator that raises the tuned reward by one
  raises the held-out one by their correlation ("regressional Goodhart"). If, beyond noise, less than `min_transfer`
  arrives, the generator is learning what only the tuned reward sees. This warns before much has fallen, most reliably
  if both rewards judge the same held-out samples: then it is a paired test, too.
- **the share of saturated rewards**, which have no gradient and cannot order samples.
- **diversity** between samples of one prompt.
"""

import math
from dataclasses import dataclass

import numpy as np

from .statistics import Evaluation, TrainingRewards, standard_error, student_quantile


@dataclass(frozen=True)
class DynamicsWarning:
    """A sign of reward hacking: its kind, the step at which it was seen, what was measured and compared with, in words too."""

    kind: str
    step: int
    value: float
    threshold: float
    message: str


@dataclass(frozen=True)
class StdCollapsed:
    """The standard deviation in the window is below `min_ratio` of the start."""

    min_ratio: float
    kind = "std_collapsed"

    def check(self, step: int, rewards: TrainingRewards) -> DynamicsWarning | None:
        start, std = rewards.start.std, rewards.window.std
        if not (rewards.is_known and rewards.has_left_start and std < self.min_ratio * start):
            return None
        message = (
            f"The standard deviation of the reward in the window is {std:.3g}, below {self.min_ratio:g} of the start's "
            f"{start:.3g}: the generator has collapsed to what the reward likes."
        )
        return DynamicsWarning(self.kind, step, std, self.min_ratio * start, message)


@dataclass(frozen=True)
class Saturated:
    """More than `max_share` of the rewards in the window are saturated."""

    max_share: float
    kind = "saturated"

    def check(self, step: int, rewards: TrainingRewards) -> DynamicsWarning | None:
        share = rewards.window.saturated / rewards.window.count
        if not (rewards.is_known and rewards.is_probability and share > self.max_share):
            return None
        message = (
            f"{100 * share:.0f} % of the rewards in the window are within {rewards.saturation:g} of 0 or 1 (allowed: "
            f"{100 * self.max_share:.0f} %): such rewards have no gradient and cannot order samples."
        )
        return DynamicsWarning(self.kind, step, share, self.max_share, message)


@dataclass(frozen=True)
class HeldOutFalls:
    """The held-out reward is below its best by more than its noise and than `min_drop` standard deviations."""

    min_drop: float
    significance: float
    kind = "held_out_falls"

    def check(self, step: int, evaluation: Evaluation) -> DynamicsWarning | None:
        if evaluation.best is None:
            return None
        differences, best = evaluation.best - evaluation.values, float(evaluation.best.mean())
        fall, error = float(differences.mean()), standard_error(differences)
        # The best of several evaluations is so partly by luck.
        quantile = student_quantile(1 - self.significance / (evaluation.number - 1), len(differences) - 1)
        threshold = max(quantile * error, self.min_drop * evaluation.scale)
        if fall <= threshold:
            return None
        trend, before, now = "", evaluation.before, evaluation.now
        if before.count and now.count:
            verb = "rose" if now.mean > before.mean else "fell"
            trend = f", while the tuned reward {verb} from {before.mean:.3g} to {now.mean:.3g}"
        message = (
            f"The held-out reward is {best - fall:.3g}, below its best of {best:.3g} at step {evaluation.best_step} by "
            f"{fall:.3g} (allowed: {threshold:.3g}, noise: {error:.3g}){trend}."
        )
        return DynamicsWarning(self.kind, step, fall, threshold, message)


@dataclass(frozen=True)
class HeldOutLags:
    """The tuned reward has risen, and less than `min_transfer` of that has arrived in the held-out reward."""

    min_transfer: float
    significance: float
    kind = "held_out_lags"

    def check(self, step: int, evaluation: Evaluation) -> DynamicsWarning | None:
        if evaluation.rise is None:
            return None
        change, wanted = float(evaluation.changes.mean()), self.min_transfer * evaluation.rise
        if evaluation.rises is not None:
            noise = standard_error(evaluation.changes - self.min_transfer * evaluation.rises)
        else:
            noise = math.hypot(standard_error(evaluation.changes), self.min_transfer * evaluation.rise_error)
        quantile = student_quantile(1 - self.significance, len(evaluation.changes) - 1)
        most = change + quantile * noise
        if evaluation.rise <= quantile * evaluation.rise_error or most >= wanted:
            return None
        message = (
            f"The tuned reward has risen by {evaluation.rise:.2f} standard deviations, the held-out reward by {change:.2f}, at "
            f"most {most:.2f} (wanted: {wanted:.2f}, a share of {self.min_transfer:g}): what is learned is not what the "
            "held-out reward sees."
        )
        return DynamicsWarning(self.kind, step, most, wanted, message)


@dataclass(frozen=True)
class DiversityCollapsed:
    """Diversity is below `min_ratio` of the start by more than its noise."""

    min_ratio: float
    significance: float
    kind = "diversity_collapsed"

    def check(self, step: int, diversity: tuple[np.ndarray, np.ndarray]) -> DynamicsWarning | None:
        values, first = diversity
        excess = values - self.min_ratio * first
        noise = student_quantile(1 - self.significance, len(values) - 1) * standard_error(excess)
        if float(excess.mean()) >= -noise:
            return None
        value, start = float(values.mean()), float(first.mean())
        message = f"The diversity of samples of one prompt is {value:.3g}, below {self.min_ratio:g} of the start's {start:.3g}."
        return DynamicsWarning(self.kind, step, value, self.min_ratio * start, message)
