"""Statistics of rewards in training and in held-out evaluations, which the rules of the monitor look at."""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import NormalDist
from typing import Any

import numpy as np
import torch

from ...models.media_rewarddance import load_frames
from ..refl.summary import is_saturated


@dataclass(frozen=True)
class Moments:
    """Count, mean and squared deviations of rewards, which can be added."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared deviations from the mean
    saturated: int = 0
    prompt_squares: float = 0.0  # the same from the mean of the same prompt in the same step
    prompt_freedom: int = 0  # number of rewards in it less the number of their prompts

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


class TrainingRewards:
    """The tuned reward in training: at the start, in a window of steps, and now."""

    def __init__(self, num_steps: int, sample_size: int, saturation: float) -> None:
        self.sample_size = sample_size
        self.saturation = saturation
        self.recent: deque[Moments] = deque(maxlen=num_steps)
        self.window = Moments()
        self.start = Moments()
        self.count = 0
        self.is_probability = True

    def add(self, rewards: np.ndarray, prompts: Sequence[str] | None) -> dict[str, float]:
        """Add the rewards of a step, and return what the history records of them."""
        if prompts is not None and len(prompts) != len(rewards):
            raise ValueError(
                f"`prompts` has {len(prompts)} entries for {len(rewards)} rewards, but must have one for each."
            )
        self.is_probability &= bool((rewards >= 0).all() and (rewards <= 1).all())
        groups: dict[str, list[float]] = {}
        for prompt, reward in zip(prompts or [], rewards.tolist(), strict=prompts is not None):
            groups.setdefault(prompt, []).append(reward)
        moments = Moments(
            len(rewards),
            float(rewards.mean()),
            float(((rewards - rewards.mean()) ** 2).sum()),
            int(is_saturated(rewards, self.saturation).sum()),
            sum(float(np.var(group)) * len(group) for group in groups.values()),
            sum(len(group) - 1 for group in groups.values()),
        )
        if self.start.count < self.sample_size:
            self.start += moments
        self.count += moments.count
        self.recent.append(moments)
        self.window = sum(self.recent, Moments())
        record = {"reward": moments.mean, "reward_mean": self.window.mean}
        for name, value in (("reward_std", self.window.std), ("prompt_std", self.window.prompt_std)):
            if math.isfinite(value):
                record[name] = value
        if self.is_probability:
            record["saturated"] = self.window.saturated / self.window.count
        return record

    @property
    def is_known(self) -> bool:
        """Whether the window has enough rewards for a statement."""
        return self.window.count >= self.sample_size

    @property
    def has_left_start(self) -> bool:
        """Whether none of the first rewards is in the window any more."""
        return self.count - self.window.count >= self.start.count

    def now(self) -> Moments:
        """The last rewards."""
        now = Moments()
        for moments in reversed(self.recent):
            now += moments
            if now.count >= self.sample_size:
                break
        return now


@dataclass(frozen=True)
class Evaluation:
    """An evaluation of the held-out reward, compared with the first and the best one before."""

    values: np.ndarray  # of each prompt
    changes: np.ndarray  # from the first evaluation, in standard deviations of it
    scale: float  # that standard deviation
    number: int
    best: np.ndarray | None
    best_step: int | None
    before: Moments  # training rewards at the best step, else at the start
    now: Moments
    rise: float | None = None  # change of the tuned reward in standard deviations, if it is known
    rise_error: float = 0.0
    rises: np.ndarray | None = None  # of each prompt, if the tuned reward judged the held-out samples too

    def record(self) -> dict[str, float]:
        """What the history records."""
        change = float(self.changes.mean())
        record = {
            "held_out": float(self.values.mean()),
            "held_out_error": standard_error(self.values),
            "held_out_change": change,
            "held_out_change_error": standard_error(self.changes),
        }
        return record if self.rise is None else record | {"tuned_change": self.rise, "gap": self.rise - change}


class HeldOutRewards:
    """Evaluations of the held-out reward: the first and the best one."""

    def __init__(self) -> None:
        # Values of each prompt
        self.first: list[float] = []
        self.first_tuned: list[float] = []
        self.best: list[float] = []
        self.best_step: int | None = None
        self.best_tuned: Moments | None = None
        self.count = 0

    def add(self, step: int, values: np.ndarray, tuned: np.ndarray | None, training: TrainingRewards) -> Evaluation:
        """Add an evaluation, and compare it with those before."""
        self.count += 1
        if not self.first:
            self.first = values.tolist()
            self.first_tuned = [] if tuned is None else tuned.tolist()
        first, now = np.array(self.first), training.now()
        scale = _scale(first)
        rise, rise_error, rises = None, 0.0, None
        if tuned is not None and self.first_tuned:
            rises = (tuned - self.first_tuned) / _scale(np.array(self.first_tuned))
            rise, rise_error = float(rises.mean()), standard_error(rises)
        elif (
            training.start.count >= training.sample_size
            and training.count >= 2 * training.sample_size
            and training.start.std > 0
        ):
            start = training.start
            rise = (now.mean - start.mean) / start.std
            rise_error = math.sqrt(1 / start.count + now.squares / now.count**2 / start.std**2)
        evaluation = Evaluation(
            values,
            (values - first) / scale,
            scale,
            self.count,
            np.array(self.best) if self.best else None,
            self.best_step,
            self.best_tuned if self.best_tuned and self.best_tuned.count else training.start,
            now,
            rise,
            rise_error,
            rises,
        )
        if evaluation.best is None or values.mean() > evaluation.best.mean():
            self.best, self.best_step, self.best_tuned = values.tolist(), step, now
        return evaluation


def sample_diversity(
    samples: Sequence[Sequence[Any]], features: Callable[[list[Any]], torch.Tensor] | None = None
) -> torch.Tensor:
    """
    Mean root mean square difference of two samples of each prompt: `(num_prompts,)`, of two or more images or clips each.
    `features` gives features `(n, ...)` of a list of samples; without it pixels in [0, 1] are compared.
    """
    distances = []
    for index, group in enumerate(samples):
        if len(group) < 2:
            raise ValueError(f"`samples[{index}]` has {len(group)} samples, but diversity needs 2 or more. Draw more.")
        values = (_pixels(group) if features is None else features(list(group))).detach().double().flatten(1)
        pairs = [(first - second).square().mean().sqrt() for first, second in combinations(values, 2)]
        distances.append(torch.stack(pairs).mean())
    return torch.stack(distances).float().cpu()


def checked_values(
    values: torch.Tensor | Sequence[Any],
    name: str,
    most_dimensions: int = 1,
    first: Sequence[float] | np.ndarray | None = None,
) -> np.ndarray:
    """
    Values as an array of one for each reward or prompt: finite, and of as many prompts as those that they are compared with
    (`first`, empty if there are none yet). Samples of one prompt are averaged: they are not independent of each other.
    """
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
        array = array.mean(axis=1)
    if first is not None and len(array) < 2:
        raise ValueError(f"`{name}` has the value of one prompt, but noise can only be told from 2 or more.")
    if first is not None and len(first) and len(array) != len(first):
        raise ValueError(
            f"`{name}` is about {len(array)} prompts, but the evaluation it is compared with is about {len(first)}. Evaluate "
            "the same prompts and seeds in the same order each time."
        )
    return array


def standard_error(values: np.ndarray) -> float:
    """Standard error of a mean."""
    return float(values.std(ddof=1)) / math.sqrt(len(values))


def student_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's distribution by its expansion around the normal one (Abramowitz and Stegun, 26.7.5)."""
    z = NormalDist().inv_cdf(probability)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _scale(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) or 1.0


def _pixels(samples: Sequence[Any]) -> torch.Tensor:
    clips = [np.stack([np.asarray(frame) for frame in load_frames(sample)]) for sample in samples]
    return torch.from_numpy(np.stack(clips)).double() / 255
