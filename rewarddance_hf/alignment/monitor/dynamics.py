r"""
Reward dynamics: statistics of a reward-tuned generator, and the signs of reward hacking (Sec. 4.1 and Figures 2, 5 and 6
of the [RewardDance paper](https://huggingface.co/papers/2509.08826)).

The paper's diagnostic is the standard deviation of the reward in a sliding window: low late in training, it shows that the
generator has collapsed to what the reward likes (0.005 with a 1B judge, 0.05 with a 26B one). It is kept here, but tells
late, and of one kind of hacking. Beside it stand

- **a held-out reward**, on the same prompts and seeds again and again. As in
  [Gao et al.](https://huggingface.co/papers/2210.10760), it first rises with the tuned reward, then falls while that goes on
  rising. As prompts and seeds stay the same, the noise of a change is the standard error of paired differences, which is
  much smaller than that of the values. The best evaluation so far is compared with, and as the best of many is so partly by
  luck, the significance level is divided by their number (Bonferroni).
- **what arrives.** In standard deviations of the start, a small change of a generator that raises the tuned reward by one
  raises the held-out one by their correlation ("regressional Goodhart"). If, beyond noise, less than `min_transfer` arrives,
  the generator is learning what only the tuned reward sees. This tells before much has fallen, best so if both rewards judge
  the same held-out samples: then it is a paired test, too.
- **the share of saturated rewards**, which have no gradient and cannot order samples.
- **diversity** between samples of one prompt.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...import_utils import require_extra
from ...models.processing_rewarddance import load_frames


if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class DynamicsWarning:
    """
    A sign of reward hacking.

    Args:
        kind (`str`):
            `"held_out_falls"`, `"held_out_lags"`, `"std_collapsed"`, `"diversity_collapsed"` or `"saturated"`.
        step (`int`):
            Step at which it was seen.
        value (`float`):
            What was measured.
        threshold (`float`):
            What it was compared with.
        message (`str`):
            Both in words.
    """

    kind: str
    step: int
    value: float
    threshold: float
    message: str


@dataclass(frozen=True)
class Moments:
    """
    Count, mean and squared deviations of rewards, which can be added.

    Args:
        count (`int`):
            Number of rewards.
        mean (`float`):
            Their mean.
        squares (`float`):
            Sum of squared deviations from it.
        saturated (`int`):
            Number of rewards near 0 or 1.
        prompt_squares (`float`):
            Sum of squared deviations from the mean of the same prompt in the same step.
        prompt_freedom (`int`):
            Number of rewards in it less the number of their prompts.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    saturated: int = 0
    prompt_squares: float = 0.0
    prompt_freedom: int = 0

    def __add__(self, other: "Moments") -> "Moments":
        count = self.count + other.count
        share = other.count / max(count, 1)
        difference = other.mean - self.mean
        return Moments(
            count,
            self.mean + share * difference,
            self.squares + other.squares + difference**2 * self.count * share,
            self.saturated + other.saturated,
            self.prompt_squares + other.prompt_squares,
            self.prompt_freedom + other.prompt_freedom,
        )

    @property
    def std(self) -> float:
        """Standard deviation, NaN of fewer than 2 rewards."""
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else math.nan

    @property
    def prompt_std(self) -> float:
        """Standard deviation between samples of one prompt, NaN if no step had two of one."""
        return math.sqrt(self.prompt_squares / self.prompt_freedom) if self.prompt_freedom else math.nan


class RewardDynamics:
    r"""
    Monitor of reward fine-tuning that sees reward hacking.

    It is told rewards and evaluations by [`~RewardDynamics.update`], and warns when it first sees

    | kind | what |
    |---|---|
    | `held_out_falls` | the held-out reward is below its best by more than its noise and than `min_drop` |
    | `held_out_lags` | the tuned reward has risen, and less than `min_transfer` of that has arrived in the held-out reward |
    | `std_collapsed` | the standard deviation in the window is below `min_std_ratio` of the start |
    | `diversity_collapsed` | diversity is below `min_diversity_ratio` of the start by more than its noise |
    | `saturated` | more than `max_saturated` of the rewards in the window are saturated |

    The module's docstring says where the rules come from. In simulations of 20 evaluations at a plateau, of an oracle that is
    right or wrong about 2 samples of each prompt, 0 to 2 of 100 runs gave a false `held_out_falls`; a fall by 1 point in each
    evaluation was seen after 14 points (median) with 100 prompts, after 10 with 200 and after 5 to 7 with 500.

    Args:
        window (`int`, *optional*, defaults to `1000`):
            Number of steps that mean, standard deviation and share of saturated rewards are taken over. The default is the
            paper's; choose a tenth of a short run.
        sample_size (`int`, *optional*, defaults to `128`):
            Number of rewards that tell the start (the first ones) and where the tuned reward is now (the last ones), both
            rounded up to whole steps.
        significance (`float`, *optional*, defaults to `0.001`):
            Probability of a false warning at one evaluation.
        min_drop (`float`, *optional*, defaults to `0.05`):
            Smallest fall of the held-out reward that matters, in standard deviations of the start (2.5 points of an
            oracle that is right in half of the samples).
        min_transfer (`float`, *optional*, defaults to `0.25`):
            Share of the tuned reward's rise that must arrive in the held-out reward, both in standard deviations of the
            start.
        min_std_ratio (`float`, *optional*, defaults to `0.25`):
            Smallest standard deviation, relative to the start.
        min_diversity_ratio (`float`, *optional*, defaults to `0.5`):
            Smallest diversity, relative to the start.
        max_saturated (`float`, *optional*, defaults to `0.5`):
            Largest share of saturated rewards.
        saturation (`float`, *optional*, defaults to `0.01`):
            How near to 0 or 1 a reward is saturated. Rewards are taken to be probabilities as long as none is outside of
            [0, 1]; others do not saturate.

    Attributes:
        history (`list[dict]`):
            One record for each update: `step`; `reward` (mean of the step), `reward_mean`, `reward_std`, `prompt_std` and
            `saturated` (of the window); `held_out` and `held_out_error` (mean and its standard error), `held_out_change`
            and `held_out_change_error` (from the start), `tuned_change`, `gap` (the tuned reward's change less the held-out
            one's; all four in standard deviations of the start), `diversity`; `warnings` (kinds). Missing if not known.
        warnings (`list[DynamicsWarning]`):
            All that was seen, each kind again only after it has gone.

    Raises:
        `ValueError`: If an argument is out of range.

    Example:

    ```python
    dynamics = RewardDynamics(window=50)
    for step in range(1, 201):
        ...
        dynamics.update(step, rewards, prompts)
        if step % 10 == 0:
            for warning in dynamics.update(step, held_out=oracle_values):
                print(warning.message)
    dynamics.plot().savefig("dynamics.png")
    ```
    """

    def __init__(
        self,
        window: int = 1000,
        sample_size: int = 128,
        significance: float = 0.001,
        min_drop: float = 0.05,
        min_transfer: float = 0.25,
        min_std_ratio: float = 0.25,
        min_diversity_ratio: float = 0.5,
        max_saturated: float = 0.5,
        saturation: float = 0.01,
    ) -> None:
        for name, number in (("window", window), ("sample_size", sample_size)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 2:
                raise ValueError(f"`{name}` is {number!r}, but must be an integer above 1. Pass 2 or more.")
        if not 0 < significance < 0.5:
            raise ValueError(f"`significance` is {significance}, but must be a small probability. Pass e.g. 0.001.")
        if not 0 <= saturation < 0.5:
            raise ValueError(
                f"`saturation` is {saturation}, but must be a distance from 0 or 1 below 0.5. Pass e.g. 0.01."
            )
        for name, share in (
            ("min_drop", min_drop),
            ("min_transfer", min_transfer),
            ("min_std_ratio", min_std_ratio),
            ("min_diversity_ratio", min_diversity_ratio),
            ("max_saturated", max_saturated),
        ):
            if not 0 <= share <= 1:
                raise ValueError(f"`{name}` is {share}, but must be between 0 and 1.")
        self.window = window
        self.sample_size = sample_size
        self.significance = significance
        self.min_drop = min_drop
        self.min_transfer = min_transfer
        self.min_std_ratio = min_std_ratio
        self.min_diversity_ratio = min_diversity_ratio
        self.max_saturated = max_saturated
        self.saturation = saturation
        self.history: list[dict[str, Any]] = []
        self.warnings: list[DynamicsWarning] = []
        self._recent: deque[Moments] = deque(maxlen=window)
        self._start = Moments()
        self._num_rewards = 0
        self._is_probability = True
        # Values of the first and the best evaluation, one for each prompt.
        self._first_held_out: list[float] = []
        self._first_tuned: list[float] = []
        self._best_held_out: list[float] = []
        self._best_step: int | None = None
        self._best_tuned: Moments | None = None
        self._num_evaluations = 0
        self._first_diversity: list[float] = []
        self._active: set[str] = set()

    def update(
        self,
        step: int,
        rewards: torch.Tensor | Sequence[float] | None = None,
        prompts: Sequence[str] | None = None,
        held_out: torch.Tensor | Sequence[float] | None = None,
        tuned: torch.Tensor | Sequence[float] | None = None,
        diversity: torch.Tensor | Sequence[float] | None = None,
    ) -> list[DynamicsWarning]:
        """
        Take in what a step has shown.

        Args:
            step (`int`):
                Number of updates of the generator until now. Updates come in order; several of one step are allowed.
            rewards (`torch.Tensor` of shape `(n,)`, *optional*):
                Tuned rewards of the step's samples.
            prompts (`list[str]`, *optional*):
                Prompts of these samples, for the standard deviation between samples of one prompt.
            held_out (`torch.Tensor` of shape `(num_prompts,)` or `(num_prompts, num_samples)`, *optional*):
                Held-out rewards, of the same prompts and seeds in every call. Give the first before the first step.
            tuned (`torch.Tensor` of the same shape, *optional*):
                Tuned rewards of these samples, in every call or none. Without them the rise of the tuned reward is that of
                the training samples, which is known less exactly.
            diversity (`torch.Tensor` of shape `(num_prompts,)`, *optional*):
                Diversity of the samples of each prompt, as from [`sample_diversity`], of the same prompts in every call.

        Returns:
            `list[DynamicsWarning]`: Warnings that are new.

        Raises:
            `ValueError`: If a value is NaN or infinite, lengths differ, a step is earlier than the last, or `tuned` comes
                without `held_out`.
        """
        if self.history and step < self.history[-1]["step"]:
            raise ValueError(
                f"`step` is {step}, but the last one was {self.history[-1]['step']}. Updates must come in order; load the "
                "state of the checkpoint that the run goes on from."
            )
        if tuned is not None and held_out is None:
            raise ValueError("`tuned` was given without `held_out`, but is compared with it. Pass both.")
        record: dict[str, Any] = {"step": int(step)}
        seen: list[DynamicsWarning] = []
        checked: set[str] = set()
        if rewards is not None:
            self._take_rewards(record, _values(rewards, "rewards", 1), prompts)
            checked |= {"std_collapsed", "saturated"}
            seen += self._check_rewards(record)
        if held_out is not None:
            checked |= {"held_out_falls", "held_out_lags"}
            values = _values(held_out, "held_out", 2, self._first_held_out)
            same = None if tuned is None else _values(tuned, "tuned", 2, values)
            seen += self._check_held_out(record, values, same)
        if diversity is not None:
            checked |= {"diversity_collapsed"}
            seen += self._check_diversity(record, _values(diversity, "diversity", 1, self._first_diversity))
        new = [warning for warning in seen if warning.kind not in self._active]
        self._active = (self._active - checked) | {warning.kind for warning in seen}
        self.warnings += new
        if new:
            record["warnings"] = [warning.kind for warning in new]
        self.history.append(record)
        return new

    @property
    def is_best(self) -> bool:
        """Whether the last evaluation is the best one."""
        return bool(self.history) and "held_out" in self.history[-1] and self.history[-1]["step"] == self._best_step

    @property
    def best_step(self) -> int | None:
        """Step of the best evaluation of the held-out reward."""
        return self._best_step

    @property
    def verdict(self) -> str:
        """What was seen, in words."""
        last = self.history[-1]["step"] if self.history else 0
        if not self.warnings:
            return f"No sign of reward hacking in {last} steps."
        return "\n".join(f"Step {warning.step}: {warning.message}" for warning in self.warnings)

    # ---- tuned reward ----

    def _take_rewards(self, record: dict[str, Any], rewards: np.ndarray, prompts: Sequence[str] | None) -> None:
        if prompts is not None and len(prompts) != len(rewards):
            raise ValueError(
                f"`prompts` has {len(prompts)} entries for {len(rewards)} rewards, but must have one for each."
            )
        self._is_probability &= bool((rewards >= 0).all() and (rewards <= 1).all())
        near = (rewards <= self.saturation) | (rewards >= 1 - self.saturation)
        groups: dict[str, list[float]] = {}
        for prompt, reward in zip(prompts or [], rewards.tolist(), strict=prompts is not None):
            groups.setdefault(prompt, []).append(reward)
        moments = Moments(
            len(rewards),
            float(rewards.mean()),
            float(((rewards - rewards.mean()) ** 2).sum()),
            int(near.sum()),
            sum(float(np.var(group)) * len(group) for group in groups.values()),
            sum(len(group) - 1 for group in groups.values()),
        )
        if self._start.count < self.sample_size:
            self._start += moments
        self._recent.append(moments)
        self._num_rewards += moments.count
        window = sum(self._recent, Moments())
        record |= {"reward": moments.mean, "reward_mean": window.mean}
        for name, value in (("reward_std", window.std), ("prompt_std", window.prompt_std)):
            if math.isfinite(value):
                record[name] = value
        if self._is_probability:
            record["saturated"] = window.saturated / window.count

    def _check_rewards(self, record: dict[str, Any]) -> list[DynamicsWarning]:
        count = sum(moments.count for moments in self._recent)
        if count < self.sample_size:
            return []
        seen = []
        start, std, step = self._start.std, record["reward_std"], record["step"]
        if self._num_rewards - count >= self._start.count and std < self.min_std_ratio * start:
            message = (
                f"The standard deviation of the reward in the window is {std:.3g}, below {self.min_std_ratio:g} of the start's "
                f"{start:.3g}: the generator has collapsed to what the reward likes."
            )
            seen.append(DynamicsWarning("std_collapsed", step, std, self.min_std_ratio * start, message))
        share = record.get("saturated", 0.0)
        if share > self.max_saturated:
            message = (
                f"{100 * share:.0f} % of the rewards in the window are within {self.saturation:g} of 0 or 1 (allowed: "
                f"{100 * self.max_saturated:.0f} %): such rewards have no gradient and cannot order samples."
            )
            seen.append(DynamicsWarning("saturated", step, share, self.max_saturated, message))
        return seen

    def _now(self) -> Moments:
        """The last rewards."""
        now = Moments()
        for moments in reversed(self._recent):
            now += moments
            if now.count >= self.sample_size:
                break
        return now

    # ---- held-out reward ----

    def _check_held_out(
        self, record: dict[str, Any], values: np.ndarray, tuned_values: np.ndarray | None
    ) -> list[DynamicsWarning]:
        record |= {"held_out": float(values.mean()), "held_out_error": _standard_error(values)}
        self._num_evaluations += 1
        tuned = self._now()
        if not self._first_held_out:
            self._first_held_out = values.tolist()
            self._first_tuned = [] if tuned_values is None else tuned_values.tolist()
        first, best = np.array(self._first_held_out), np.array(self._best_held_out)
        scale = float(first.std(ddof=1)) or 1.0
        change, error = float((values - first).mean()) / scale, _standard_error(values - first) / scale
        record |= {"held_out_change": change, "held_out_change_error": error}
        seen = []
        if self._best_held_out:
            seen += self._check_fall(record["step"], values - best, float(best.mean()), scale, tuned)
        if tuned_values is not None and self._first_tuned:
            first_tuned = np.array(self._first_tuned)
            rises = (tuned_values - first_tuned) / (float(first_tuned.std(ddof=1)) or 1.0)
            rise, rise_error = float(rises.mean()), _standard_error(rises)
            noise = _standard_error((values - first) / scale - self.min_transfer * rises)
        elif (
            self._start.count >= self.sample_size and self._num_rewards >= 2 * self.sample_size and self._start.std > 0
        ):
            rise = (tuned.mean - self._start.mean) / self._start.std
            rise_error = math.sqrt(1 / self._start.count + tuned.squares / tuned.count**2 / self._start.std**2)
            noise = math.hypot(error, self.min_transfer * rise_error)
        else:
            rise = None
        if rise is not None:
            record |= {"tuned_change": rise, "gap": rise - change}
            quantile = _quantile(1 - self.significance, len(values) - 1)
            if rise > quantile * rise_error and change + quantile * noise < self.min_transfer * rise:
                seen.append(self._describe_lag(record["step"], change, quantile * noise, rise))
        if not self._best_held_out or values.mean() > best.mean():
            self._best_held_out, self._best_step, self._best_tuned = values.tolist(), record["step"], tuned
        return seen

    def _check_fall(
        self, step: int, differences: np.ndarray, best: float, scale: float, tuned: Moments
    ) -> list[DynamicsWarning]:
        fall, error = -float(differences.mean()), _standard_error(differences)
        # The best of several evaluations is so partly by luck.
        quantile = _quantile(1 - self.significance / (self._num_evaluations - 1), len(differences) - 1)
        threshold = max(quantile * error, self.min_drop * scale)
        if fall <= threshold:
            return []
        before = self._best_tuned if self._best_tuned and self._best_tuned.count else self._start
        trend = ""
        if before.count and tuned.count:
            verb = "rose" if tuned.mean > before.mean else "fell"
            trend = f", while the tuned reward {verb} from {before.mean:.3g} to {tuned.mean:.3g}"
        message = (
            f"The held-out reward is {best - fall:.3g}, below its best of {best:.3g} at step {self._best_step} by {fall:.3g} "
            f"(allowed: {threshold:.3g}, noise: {error:.3g}){trend}."
        )
        return [DynamicsWarning("held_out_falls", step, fall, threshold, message)]

    def _describe_lag(self, step: int, change: float, margin: float, rise: float) -> DynamicsWarning:
        wanted = self.min_transfer * rise
        message = (
            f"The tuned reward has risen by {rise:.2f} standard deviations, the held-out reward by {change:.2f}, at most "
            f"{change + margin:.2f} (wanted: {wanted:.2f}, a share of {self.min_transfer:g}): what is learned is not what the "
            "held-out reward sees."
        )
        return DynamicsWarning("held_out_lags", step, change + margin, wanted, message)

    def _check_diversity(self, record: dict[str, Any], values: np.ndarray) -> list[DynamicsWarning]:
        record["diversity"] = float(values.mean())
        if not self._first_diversity:
            self._first_diversity = values.tolist()
        first = np.array(self._first_diversity)
        excess = values - self.min_diversity_ratio * first
        threshold = self.min_diversity_ratio * float(first.mean())
        if float(excess.mean()) >= -_quantile(1 - self.significance, len(values) - 1) * _standard_error(excess):
            return []
        message = (
            f"The diversity of samples of one prompt is {record['diversity']:.3g}, below {self.min_diversity_ratio:g} of the "
            f"start's {first.mean():.3g}."
        )
        return [DynamicsWarning("diversity_collapsed", record["step"], record["diversity"], threshold, message)]

    # ---- state and plot ----

    def state_dict(self) -> dict[str, Any]:
        """
        Give all that a resumed run needs, ready for JSON.

        Returns:
            `dict`: State, without the arguments of the class.
        """
        return {
            "history": [dict(record) for record in self.history],
            "warnings": [asdict(warning) for warning in self.warnings],
            "recent": [asdict(moments) for moments in self._recent],
            "start": asdict(self._start),
            "num_rewards": self._num_rewards,
            "is_probability": self._is_probability,
            "first_held_out": self._first_held_out,
            "first_tuned": self._first_tuned,
            "best_held_out": self._best_held_out,
            "best_step": self._best_step,
            "best_tuned": None if self._best_tuned is None else asdict(self._best_tuned),
            "num_evaluations": self._num_evaluations,
            "first_diversity": self._first_diversity,
            "active": sorted(self._active),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Go on from a state.

        Args:
            state (`dict`):
                What [`~RewardDynamics.state_dict`] gave.
        """
        self.history = [dict(record) for record in state["history"]]
        self.warnings = [DynamicsWarning(**warning) for warning in state["warnings"]]
        self._recent = deque((Moments(**moments) for moments in state["recent"]), maxlen=self.window)
        self._start = Moments(**state["start"])
        self._num_rewards = state["num_rewards"]
        self._is_probability = state["is_probability"]
        self._first_held_out = list(state["first_held_out"])
        self._first_tuned = list(state["first_tuned"])
        self._best_held_out = list(state["best_held_out"])
        self._best_step = state["best_step"]
        self._best_tuned = None if state["best_tuned"] is None else Moments(**state["best_tuned"])
        self._num_evaluations = state["num_evaluations"]
        self._first_diversity = list(state["first_diversity"])
        self._active = set(state["active"])

    def plot(self) -> "Figure":
        """
        Draw the paper's reward-dynamics plot (Figure 5): the mean in the window as a curve, its standard deviation as a
        band and as bubbles, with the held-out reward, diversity, saturated rewards and warnings.

        Returns:
            `matplotlib.figure.Figure`: The figure, which `savefig` writes.

        Raises:
            `ImportError`: If matplotlib is not installed.
            `ValueError`: If there is nothing to draw.
        """
        require_extra("demo", "matplotlib")
        from .plot import plot_dynamics

        return plot_dynamics(self)


def sample_diversity(
    samples: Sequence[Sequence[Any]], features: Callable[[list[Any]], torch.Tensor] | None = None
) -> torch.Tensor:
    """
    Measure how different the samples of each prompt are: the mean distance of two of them.

    Args:
        samples (`list[list]`):
            Samples of each prompt, two or more: images, or clips as lists of frames.
        features (`Callable`, *optional*):
            Function that gives features of shape `(n, ...)` for a list of samples. Defaults to pixels in [0, 1].

    Returns:
        `torch.Tensor` of shape `(num_prompts,)`: Mean over pairs of the root mean square of their differences.

    Raises:
        `ValueError`: If a prompt has fewer than two samples.
    """
    distances = []
    for index, group in enumerate(samples):
        if len(group) < 2:
            raise ValueError(f"`samples[{index}]` has {len(group)} samples, but diversity needs 2 or more. Draw more.")
        values = (_pixels(group) if features is None else features(list(group))).detach().double().flatten(1)
        pairs = [(values[i] - values[j]).square().mean().sqrt() for i, j in combinations(range(len(group)), 2)]
        distances.append(torch.stack(pairs).mean())
    return torch.stack(distances).float().cpu()


def _pixels(samples: Sequence[Any]) -> torch.Tensor:
    clips = [np.stack([np.asarray(frame) for frame in load_frames(sample)]) for sample in samples]
    return torch.from_numpy(np.stack(clips)).double() / 255


def _values(
    values: torch.Tensor | Sequence[Any],
    name: str,
    most_dimensions: int,
    first: Sequence[float] | np.ndarray | None = None,
) -> np.ndarray:
    """Checked values as an array with one value for each reward or prompt."""
    array = torch.as_tensor(values).detach().double().cpu().numpy()
    if not 1 <= array.ndim <= most_dimensions or 0 in array.shape:
        wanted = "`(n,)`" if most_dimensions == 1 else "`(num_prompts,)` or `(num_prompts, num_samples)`"
        raise ValueError(f"`{name}` has shape {array.shape}, but must be of shape {wanted} and not empty.")
    if not np.isfinite(array).all():
        raise ValueError(
            f"`{name}` has {int((~np.isfinite(array)).sum())} of {array.size} values that are NaN or infinite, but all must be "
            "finite. Look for the sample that caused it."
        )
    if array.ndim == 2:
        array = array.mean(axis=1)  # samples of one prompt are not independent of each other
    if first is not None and len(array) < 2:
        raise ValueError(f"`{name}` has the value of one prompt, but noise can only be told from 2 or more.")
    if first is not None and len(first) and len(array) != len(first):
        raise ValueError(
            f"`{name}` is about {len(array)} prompts, but the evaluation it is compared with is about {len(first)}. Evaluate "
            "the same prompts and seeds in the same order each time."
        )
    return array


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) / math.sqrt(len(values))


def _quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's distribution by its expansion around the normal one (Abramowitz and Stegun, 26.7.5)."""
    z = NormalDist().inv_cdf(probability)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
