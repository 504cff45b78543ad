"""Figures of the report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from intervals import estimate


COLORS = {"regressive": "#d1812b", "pointwise": "#1f6f8b", "pairwise": "#8b1f5f"}
RIGHT, WRONG = "#2e8b57", "#c0392b"
MARKERS = ("o", "^", "s", "D")  # of generators
DPI = 130

Results = Mapping[tuple[Any, ...], dict[str, Any]]


class JudgeAndGain(NamedTuple):
    """A judge's accuracies, and what a generator of some width gained that it tuned."""

    size: str
    paradigm: str
    width: int
    accuracy_id: float
    accuracy_ood: float
    gain: float


class ShownClip(NamedTuple):
    """A prompt, and frames `(num_frames, height, width, 3)` of its clip before and after tuning, with what the oracle says of them."""

    prompt: str
    before: np.ndarray
    after: np.ndarray
    right_before: float
    right_after: float


def draw_paradigms(results: Results, names: Mapping[str, str], counts: Sequence[int], file: Path) -> None:
    """Accuracy over the number of preference pairs, in and out of domain; of pairwise judges also that by the mean of both orders."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    places = {count: place for place, count in enumerate(counts)}
    curves = [(name, "credits", "-", label) for name, label in names.items()]
    if "pairwise" in names:
        curves.append(("pairwise", "averaged_credits", "--", "pairwise, mean of both orders"))
    for axes, split, title in zip(panels, ("id", "ood"), ("in domain", "out of domain"), strict=True):
        for name, kind, style, label in curves:
            at = {
                count: estimate([metrics[split][kind] for metrics in found])
                for count in counts
                if (found := [metrics for key, metrics in results.items() if key[:2] == (name, count)])
            }
            x = [places[count] for count in at]
            values = [100 * value.value for value in at.values()]
            axes.plot(x, values, style, marker="o", color=COLORS[name], label=label)
            axes.fill_between(
                x,
                [100 * value.low for value in at.values()],
                [100 * value.high for value in at.values()],
                color=COLORS[name],
                alpha=0.15,
                linewidth=0,
            )
        axes.set_xticks(list(places.values()), [f"{count:,}" for count in counts])
        axes.set(title=title, xlabel="preference pairs")
        axes.axhline(50, color="#bbbbbb", linewidth=1)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("accuracy, %")
    panels[1].legend(fontsize=8, loc="lower right")
    _save(figure, file)


def draw_sizes(results: Results, sizes: Sequence[str], points: Sequence[JudgeAndGain], file: Path) -> None:
    """Accuracy by size, and what a generator gains over each accuracy of the judge that tunes it."""
    figure, panels = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    places = [float(size.removesuffix("m")) for size in sizes]
    for paradigm in ("pointwise", "pairwise"):
        for split, style in (("id", "-"), ("ood", "--")):
            at = {
                place: estimate([metrics[split]["credits"] for metrics in found])
                for place, size in zip(places, sizes, strict=True)
                if (found := [m for key, m in results.items() if key[:3] == (size, "judge", paradigm)])
            }
            title = f"{paradigm}, {'in' if split == 'id' else 'out of'} domain"
            values = list(at.values())
            errors = [[100 * (v.value - v.low) for v in values], [100 * (v.high - v.value) for v in values]]
            panels[0].errorbar(
                list(at),
                [100 * v.value for v in values],
                errors,
                fmt=style,
                marker="o",
                capsize=3,
                color=COLORS[paradigm],
                label=title,
            )
    panels[0].set_xscale("log")
    panels[0].set_xticks(places, [f"{size[:-1]}M" for size in sizes])
    panels[0].set_xticks([], minor=True)
    panels[0].set(xlabel="parameters of the judge", ylabel="accuracy, %", title="accuracy")
    widths = list(dict.fromkeys(point.width for point in points))
    for axes, accuracy, title in (
        (panels[1], "accuracy_id", "in domain"),
        (panels[2], "accuracy_ood", "out of domain"),
    ):
        for paradigm in ("pointwise", "pairwise"):
            for width, marker in zip(widths, MARKERS, strict=False):
                shown = [point for point in points if (point.paradigm, point.width) == (paradigm, width)]
                if not shown:
                    continue
                axes.scatter(
                    [100 * getattr(point, accuracy) for point in shown],
                    [100 * point.gain for point in shown],
                    [20 + 25 * sizes.index(point.size) for point in shown],
                    color=COLORS[paradigm],
                    marker=marker,
                    alpha=0.7,
                    label=f"{paradigm}, generator of width {width}",
                )
        axes.set(xlabel=f"accuracy of the judge {title}, %", ylabel="gain of the generator, points")
        axes.set_title(f"gain by tuning, over accuracy {title}", fontsize=10)
        axes.axhline(0, color="#bbbbbb", linewidth=1)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside lower left", ncols=2)
    handles, labels = panels[2].get_legend_handles_labels()
    title = "gain by tuning; larger marks: larger judges"
    figure.legend(handles, labels, fontsize=8, title=title, title_fontsize=8, loc="outside lower right", ncols=4)
    for axes in panels:
        axes.grid(alpha=0.25)
    _save(figure, file)


def draw_dynamics(results: Results, names: Mapping[str, str], file: Path) -> None:
    """Tuned reward, its standard deviation in the window, and the oracle's reward, over updates; dashed for smaller judges."""
    figure, panels = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    columns = (
        ("reward_mean", "mean reward in the window"),
        ("reward_std", "its standard deviation"),
        ("held_out", "held-out prompts drawn right, by the oracle"),
    )
    largest = max((key[0] for key in results), key=lambda size: float(size.rstrip("m")))
    for axes, (column, title) in zip(panels, columns, strict=True):
        for (size, paradigm, seed), metrics in results.items():
            points = [(record["step"], record[column]) for record in metrics["history"] if column in record]
            if not points:  # fewer updates than a window
                continue
            label = f"{size[:-1]}M {names[paradigm]}"
            if paradigm == "regressive" and column != "held_out":
                start = abs(points[0][1]) or 1.0  # a scalar head has no scale of its own
                points = [(step, value / start) for step, value in points]
                label += " (over its first value)"
            style = "-" if size == largest else "--"
            first = seed == min(key[2] for key in results if key[:2] == (size, paradigm))
            axes.plot(
                *zip(*points, strict=True), style, color=COLORS[paradigm], alpha=0.8, label=label if first else None
            )
        axes.set(title=title, xlabel="update")
        axes.grid(alpha=0.25)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=3)
    _save(figure, file)


def draw_clips(shown: Mapping[str, Sequence[ShownClip]], file: Path) -> None:
    """Frames of clips of the same noise before and after tuning, by task; right ones are framed in green."""
    lines = max(map(len, shown.values()))
    figure, grid = plt.subplots(lines, 2 * len(shown), figsize=(13, 6), squeeze=False, layout="constrained")
    for axes in grid.flat:
        axes.axis("off")
    for number, (task, clips) in enumerate(shown.items()):
        for line, clip in enumerate(clips):
            versions = (("before", clip.before, clip.right_before), ("after", clip.after, clip.right_after))
            for axes, (title, frames, right) in zip(grid[line, 2 * number :], versions, strict=False):
                apart = np.pad(frames, ((0, 0), (0, 0), (0, 1), (0, 0)), constant_values=255)
                axes.axis("on")
                axes.imshow(np.concatenate(list(apart), axis=1)[:, :-1], interpolation="nearest")
                axes.set(xticks=[], yticks=[])
                axes.set_title(f"{task}, {title}\n{clip.prompt}" if line == 0 else clip.prompt, fontsize=8)
                for spine in axes.spines.values():
                    spine.set(color=RIGHT if right else WRONG, linewidth=3)
    _save(figure, file)


def _save(figure: Any, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=DPI)
    plt.close(figure)
