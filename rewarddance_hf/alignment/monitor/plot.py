"""The reward-dynamics plot (Figure 5 of the [RewardDance paper](https://huggingface.co/papers/2509.08826))."""

from typing import TYPE_CHECKING, Any

import numpy as np

from ...import_utils import require_extra


require_extra("demo", "matplotlib")

from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402


if TYPE_CHECKING:
    from .dynamics import RewardDynamics


NUM_BUBBLES = 12
LARGEST_BUBBLE = 500.0  # square points
TUNED, HELD_OUT, DIVERSITY, SATURATED, WARNING = "#3b6fb6", "#2a8f5d", "#7a4fa3", "#c98a1b", "#c0392b"
KINDS = {
    "held_out_falls": "held-out reward falls",
    "held_out_lags": "held-out reward lags",
    "std_collapsed": "std collapsed",
    "diversity_collapsed": "diversity collapsed",
    "saturated": "rewards saturated",
}


def plot_dynamics(dynamics: "RewardDynamics") -> Figure:
    """Draw reward, held-out reward, and diversity with saturated rewards, below each other; see [`RewardDynamics.plot`]."""
    names = ("reward_mean", "held_out", "diversity", "saturated")
    known = {name for name in names if any(name in record for record in dynamics.history)}
    if not known:
        raise ValueError("The history is empty, but a plot needs at least one update. Call `update` first.")
    panels = [
        (draw, height)
        for draw, height, needed in (
            (_draw_reward, 3.2, {"reward_mean"}),
            (_draw_held_out, 2.6, {"held_out"}),
            (_draw_shares, 1.8, {"diversity", "saturated"}),
        )
        if needed & known
    ]
    heights = [height for _, height in panels]
    figure = Figure(figsize=(8, sum(heights) + 0.6), layout="constrained")
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (draw, _) in zip(grid, panels, strict=True):
        draw(axes, dynamics)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        for warning in dynamics.warnings:
            axes.axvline(warning.step, color=WARNING, linewidth=1, linestyle="--", alpha=0.7)
    _name_warnings(grid[0], dynamics)
    grid[-1].set_xlabel("step")
    grid[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _series(dynamics: "RewardDynamics", *names: str) -> list[np.ndarray]:
    """Steps, and values of the records that have all of the names."""
    records = [record for record in dynamics.history if all(name in record for name in names)]
    return [np.array([record[name] for record in records]) for name in ("step", *names)]


def _draw_reward(axes: Axes, dynamics: "RewardDynamics") -> None:
    steps, rewards = _series(dynamics, "reward")
    axes.plot(steps, rewards, color=TUNED, linewidth=0.6, alpha=0.3, label="of a step")
    steps, means = _series(dynamics, "reward_mean")
    axes.plot(steps, means, color=TUNED, linewidth=2, label=f"mean of the last {dynamics.window} steps")
    steps, means, stds = _series(dynamics, "reward_mean", "reward_std")
    if len(steps):
        axes.fill_between(steps, means - stds, means + stds, color=TUNED, alpha=0.12, linewidth=0, label="± std")
        at = np.unique(np.linspace(0, len(steps) - 1, NUM_BUBBLES).round().astype(int))
        # Areas in proportion to the variance, as in the paper's bubbles
        areas = LARGEST_BUBBLE * (stds / max(stds.max(), 1e-12)) ** 2
        axes.scatter(steps[at], means[at], areas[at], color=TUNED, alpha=0.35, linewidths=0, label="variance (area)")
        axes.annotate(
            f"std {stds[-1]:.2g}",
            (steps[-1], means[-1]),
            xytext=(0, 12),
            textcoords="offset points",
            ha="right",
            color=TUNED,
            fontsize=8,
        )
    axes.set_ylabel("tuned reward")
    _legend(axes, markerscale=0.5)


def _draw_held_out(axes: Axes, dynamics: "RewardDynamics") -> None:
    steps, values, errors = _series(dynamics, "held_out", "held_out_error")
    axes.errorbar(
        steps, values, errors, color=HELD_OUT, linewidth=2, elinewidth=0.8, capsize=2, marker="o", markersize=3,
        label="held-out reward ± standard error",
    )  # fmt: skip
    axes.axhline(values[0], color=HELD_OUT, linewidth=0.8, linestyle=":", label="at the start")
    best = int(values.argmax())
    axes.scatter(
        steps[best], values[best], 90, marker="*", color=HELD_OUT, zorder=3, label=f"best, step {steps[best]}"
    )
    axes.set_ylabel("held-out reward")
    _legend(axes)


def _draw_shares(axes: Axes, dynamics: "RewardDynamics") -> None:
    steps, diversity = _series(dynamics, "diversity")
    if len(steps):
        relative = diversity / max(diversity[0], 1e-12)
        axes.plot(steps, relative, color=DIVERSITY, marker="o", markersize=3, label="diversity, relative to the start")
    steps, saturated = _series(dynamics, "saturated")
    if len(steps):
        axes.plot(steps, saturated, color=SATURATED, label="share of saturated rewards")
    axes.set_ylim(bottom=0)
    _legend(axes)


def _legend(axes: Axes, **arguments: Any) -> None:
    axes.legend(fontsize=7, frameon=False, ncols=2, **arguments)


def _name_warnings(axes: Axes, dynamics: "RewardDynamics") -> None:
    for number, warning in enumerate(dynamics.warnings):
        is_late = warning.step > 0.7 * dynamics.history[-1]["step"]
        axes.annotate(
            KINDS[warning.kind],
            (warning.step, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-3 if is_late else 3, -9 - 10 * (number % 4)),
            textcoords="offset points",
            ha="right" if is_late else "left",
            color=WARNING,
            fontsize=8,
        )
