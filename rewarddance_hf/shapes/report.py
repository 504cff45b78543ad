"""Report of the demo: tables in Markdown, a learning curve, and sheets of judged images."""

import json
import random
import shutil
import textwrap
import time
from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from ..scoring.scorer import RewardDanceScorer  # noqa: E402
from .alignment_demo import gains  # noqa: E402
from .alignment_report import RIGHT, WRONG, draw_generators, generator_lines  # noqa: E402
from .captions import canonical_caption
from .demo import METRICS_FILE, SPLIT_NAMES, TITLES, metric_files  # noqa: E402
from .drawing import OUT_OF_DOMAIN, render_scene
from .judges_demo import read_history  # noqa: E402
from .preferences import CATEGORIES, ShapesPreferences  # noqa: E402
from .scenes import Scene, SceneObject
from .stages import Report


COLORS = {"untrained": "#8a8a8a", "regressive": "#d1812b", "judge": "#1f6f8b"}
SHEET_ROWS = 12
SMALLEST_PART = 0.1  # of a difference, in points, that is told
RANKING_FILE = "ranking.txt"
STUDY_IMAGE = Path(__file__).parent / "images" / "paradigms.png"
# Of `examples/paper/README.md`
STUDY_LINES = (
    "## More trainings and other amounts of data",
    "",
    "One training of each model cannot tell models apart that are a point or two from each other. The study in `examples/paper` of the "
    "repository (`make paper`) makes three of each from the same base model, over the amount of preference data:",
    "",
    f"![Accuracy over the amount of preference data]({STUDY_IMAGE.name})",
    "",
    "The base model is right on 91.2 % of pairs in domain without any preference, if it is asked about single images; a scalar head of 100 pairs "
    "on 89.2 %. With 100 pairs a pointwise judge is 2.8 points ahead of the scalar head in domain (0.9 to 4.8); with 14,400 neither can be told "
    "from the other. A pairwise judge, as the one above, is 1.4 points in domain and 3.0 out of it behind a pointwise one then, and "
    "cannot be told from it if it is asked in both orders.",
    "",
)


def draw_judge(output_dir: str, *, report: Report) -> None:
    """Draw what the judge in the folder of the demo says of pairs, and how it ranks images."""
    folder = Path(output_dir)
    scorer = RewardDanceScorer.from_pretrained(folder / "judge", batch_size=100)
    draw_judged_pairs(scorer, report).savefig(folder / "judged_pairs.png", dpi=110)
    figure, ranking = draw_ranking(scorer)
    figure.savefig(folder / "ranking.png", dpi=130)
    (folder / RANKING_FILE).write_text(ranking + "\n", encoding="utf-8")
    plt.close("all")


def write_report(output_dir: str, has_generators: bool, start_time: float, *, report: Report) -> None:
    """Write `metrics.json` and `report.md`, with the images that are not drawn yet, from what stages left in the folder of the demo."""
    folder = Path(output_dir)
    metrics: dict[str, Any] = {}
    for file in metric_files(folder, has_generators):
        metrics |= json.loads(file.read_text(encoding="utf-8"))
    if has_generators:
        metrics |= gains(folder)
    draw_learning_curve(folder, metrics).savefig(folder / "learning_curve.png", dpi=130)
    ranking = (folder / RANKING_FILE).read_text(encoding="utf-8").strip()
    splits = [split for split in SPLIT_NAMES if f"judge/{split}/accuracy" in metrics]
    if has_generators:
        draw_generators(folder).savefig(folder / "generators.png", dpi=110)
    shutil.copy(STUDY_IMAGE, folder)
    plt.close("all")
    metrics["seconds"] = time.time() - start_time
    steps = read_history(folder / "judge")[-1]["step"]
    samples = ", the last of them with as many pairs of a generator's samples as of drawings" if has_generators else ""
    lines = [
        "# A judge of shapes",
        "",
        f"Fine-tuned for {steps} steps from the tiny base model{samples}, beside a regressive baseline with the same rows, in "
        f"{metrics['seconds']:.0f} s for all. Accuracy on held-out preference pairs in %, ties left out, both orders of each "
        "pair, with the 95 % bootstrap interval:",
        "",
        f"| model | {' | '.join(SPLIT_NAMES[split] for split in splits)} | order consistency | calibration error |",
        "|---|---|---|" + "---|" * len(splits),
    ]
    for name in COLORS:
        cells = [TITLES[name]]
        for split in splits:
            value, low, high = (100 * metrics[f"{name}/{split}/accuracy{end}"] for end in ("", "_low", "_high"))
            cells.append(f"{value:.1f} ({low:.1f} to {high:.1f})")
        cells += [f"{100 * metrics[f'{name}/id/order_consistency']:.1f}", f"{metrics[f'{name}/id/ece']:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    columns = [(name, split) for name in COLORS for split in ("id", "ood")]
    lines += ["", "By what the rejected image has wrong:", ""]
    lines += [f"| category | {' | '.join(map(', '.join, columns))} |", "|" + "---|" * (1 + len(columns))]
    for category in CATEGORIES:
        values = [metrics.get(f"{name}/{split}/category/{category}/accuracy") for name, split in columns]
        cells = ["-" if value is None else f"{100 * value:.1f}" for value in values]
        lines.append(f"| {category} | {' | '.join(cells)} |")
    lines += [
        "",
        *_difference_lines(metrics),
        "",
        "![Held-out accuracy during training](learning_curve.png)",
        "",
        f"Held-out pairs and what the judge says of them. {ranking}",
        "",
        "![Judged pairs](judged_pairs.png)",
        "",
        "![Ranking](ranking.png)",
        "",
        *STUDY_LINES,
        *(generator_lines(folder, metrics) if has_generators else []),
    ]
    (folder / "report.md").write_text("\n".join(lines), encoding="utf-8")
    (folder / METRICS_FILE).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def _difference_lines(metrics: dict[str, Any]) -> list[str]:
    """What the judge is ahead of the baseline or behind it, and how much of that each category makes."""
    lines = [
        "The base model has been taught to say whether an image is right, which is all that the baseline has to score. Which of two images "
        "is better, it was never asked: that the judge learns here. What each category adds to the difference of their accuracies, in "
        "points:",
        "",
    ]
    for split in ("id", "ood"):
        judge, baseline = f"judge/{split}", f"regressive/{split}"
        difference = 100 * (metrics[f"{judge}/accuracy"] - metrics[f"{baseline}/accuracy"])
        parts = {}
        for category in CATEGORIES:
            key = f"category/{category}"
            if f"{judge}/{key}/accuracy" in metrics:
                share = metrics[f"{judge}/{key}/num_rows"] / metrics[f"{judge}/num_rows"]
                parts[category] = (
                    100 * share * (metrics[f"{judge}/{key}/accuracy"] - metrics[f"{baseline}/{key}/accuracy"])
                )
        by_size = sorted(parts.items(), key=lambda item: -abs(item[1]))
        told = ", ".join(f"{category} {part:+.1f}" for category, part in by_size if abs(part) >= SMALLEST_PART)
        lines.append(
            f"- {SPLIT_NAMES[split].capitalize()} the judge is {abs(difference):.1f} points "
            f"{'ahead' if difference > 0 else 'behind'}: {told or 'no category adds much'}."
        )
    return lines


def draw_learning_curve(folder: Path, metrics: dict[str, Any]) -> Figure:
    """Draw held-out accuracy during training."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name in ("judge", "regressive"):
        history = read_history(folder / name)
        for split, style in (("id", "-"), ("ood", "--")):
            key = f"eval_{split}_accuracy"
            points = [(log["step"], 100 * log[key]) for log in history if key in log]
            axes.plot(*zip(*points, strict=True), style, color=COLORS[name], label=f"{name}, {SPLIT_NAMES[split]}")
    switch, *more = [log["step"] for log in read_history(folder / "judge") if "train_runtime" in log]
    if more:
        axes.axvline(switch, color="#bbbbbb", linewidth=1)
        axes.text(switch, 41, " generator's samples too", fontsize=7, color="#777777", rotation=90, va="bottom")
    untrained = 100 * metrics["untrained/id/accuracy"]
    axes.axhline(untrained, color=COLORS["untrained"], linewidth=1, label=f"{TITLES['untrained']}, in domain")
    axes.set(xlabel="training step", ylabel="held-out accuracy, %", ylim=(40, 101))
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="lower left")
    return figure


def draw_judged_pairs(scorer: RewardDanceScorer, report: Report) -> Figure:
    """Draw held-out pairs in random order with the judge's verdict and rationale."""
    rng = random.Random(0)
    dataset = ShapesPreferences(400, "ood", seed=2)
    by_category: dict[str, list[dict[str, Any]]] = {}
    for i in range(len(dataset)):
        by_category.setdefault(dataset[i]["category"], []).append(dataset[i])
    picked = [rows[i] for i in range(SHEET_ROWS) for rows in by_category.values() if i < len(rows)][:SHEET_ROWS]
    figure, grid = plt.subplots(
        SHEET_ROWS // 2, 6, figsize=(13, 2.15 * SHEET_ROWS // 2), width_ratios=(1, 1, 1.1) * 2, layout="constrained"
    )
    for axes in grid.flat:
        axes.set_axis_off()
    for i, row in enumerate(picked):
        report(i, len(picked))
        second_is_chosen = rng.random() < 0.5
        pair = (row["rejected"], row["chosen"]) if second_is_chosen else (row["chosen"], row["rejected"])
        verdict = scorer.compare(*pair, row["prompt"], criteria=row["criteria"], explain=True, max_new_tokens=60)
        right = (verdict.winner == "b") == second_is_chosen
        for j, image in enumerate(pair):
            axes = grid[i // 2, 3 * (i % 2) + j]
            axes.imshow(image, interpolation="nearest")
            better = second_is_chosen == (j == 1)
            axes.set_title(f"image {j + 1}" + (", in truth the better one" if better else ""), fontsize=8)
        certainty = verdict.probability_b if verdict.winner == "b" else 1 - verdict.probability_b
        paragraphs = [
            f'"{row["prompt"]}"',
            f"Judged by {row['criteria']}.",
            f"The judge: image {2 if verdict.winner == 'b' else 1} is better ({100 * certainty:.0f}\u00a0%). "
            f"{'Right.' if right else 'WRONG.'}",
            *(verdict.rationale or "").replace(". ", ".|").split("|"),
        ]
        text = "\n".join(textwrap.fill(paragraph, 34) for paragraph in paragraphs)
        color = RIGHT if right else WRONG
        grid[i // 2, 3 * (i % 2) + 2].text(0, 0.98, text, fontsize=8, va="top", linespacing=1.4, color=color)
    return figure


def draw_ranking(scorer: RewardDanceScorer) -> tuple[Figure, str]:
    """Rank images of one prompt, from right to more and more wrong: a figure, and a sentence that says how well that went."""

    def scene(first: tuple[str, str], second: tuple[str, str]) -> Scene:
        return Scene("binding", (SceneObject(*first), SceneObject(*second)))

    wanted = scene(("red", "circle"), ("blue", "square"))
    shown = [
        wanted,
        scene(("red", "circle"), ("white", "square")),
        scene(("purple", "circle"), ("white", "square")),
        scene(("purple", "triangle"), ("white", "circle")),
    ]
    rng = random.Random(1)
    images = [render_scene(scene, rng, OUT_OF_DOMAIN) for scene in shown]
    prompt = canonical_caption(wanted)
    ranking = scorer.rank(images, prompt)
    figure, grid = plt.subplots(1, len(images), figsize=(9, 2.9), layout="constrained")
    figure.suptitle(f'"{prompt}": all against all, best first', fontsize=10)
    for axes, index in zip(grid, ranking.order, strict=True):
        axes.imshow(images[index], interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(f"wins: {ranking.wins[index]:g}, reward {ranking.scores[index]:.2f}", fontsize=9)
    place = ("first", "second", "third", "last")[ranking.order.index(0)]
    return figure, f"In the ranking, the image that shows its prompt comes {place}."
