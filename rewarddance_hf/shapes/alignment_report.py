"""The part of the demo's report that is about generators: a table, images before and after, the rewards of each run."""

import textwrap
from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from ..alignment.monitor.callback import PLOT_FILE  # noqa: E402
from .alignment_demo import EVALUATION_SEED, GENERATORS, SAMPLES_PER_PROMPT, load_tuned  # noqa: E402
from .generated import ShapesPrompts, alignment_holds, sample_images  # noqa: E402
from .generator import load_generator  # noqa: E402


NAMES = ("base", *GENERATORS)
DESCRIPTIONS = {
    "base": "base",
    "tuned": "tuned by the judge",
    "hacked": "tuned by the share of right color",
}
SHEET_PROMPTS = 12
RIGHT, WRONG = "#2e8b57", "#c0392b"


def generator_lines(folder: Path, metrics: dict[str, Any]) -> list[str]:
    """Markdown lines about the generators; the folder of each tuned one holds `verdict.txt`."""
    kinds = [key.split("/")[3] for key in metrics if key.startswith("generator/base/kind/")]
    lines = [
        "## A generator, tuned by the judge",
        "",
        "Prompts that the generator draws right in %, by the oracle, on held-out prompts from the same noise, with the 95 % "
        "bootstrap interval over prompts:",
        "",
        f"| generator | all | {' | '.join(kinds)} |",
        "|---|---|" + "---|" * len(kinds),
    ]
    for name in NAMES:
        value, low, high = (100 * metrics[f"generator/{name}/alignment{end}"] for end in ("", "_low", "_high"))
        cells = [f"{100 * metrics[f'generator/{name}/kind/{kind}/alignment']:.0f}" for kind in kinds]
        lines.append(f"| {DESCRIPTIONS[name]} | {value:.1f} ({low:.1f} to {high:.1f}) | {' | '.join(cells)} |")
    gain, low, high = (100 * metrics[f"generator/tuned/gain{end}"] for end in ("", "_low", "_high"))
    lines += [
        "",
        f"Prompt by prompt, the generator {DESCRIPTIONS['tuned']} gains {gain:+.1f} points ({low:+.1f} to {high:+.1f}).",
        "",
        f"Best-of-N references that the judge has chosen: {100 * metrics['generator/references/alignment']:.1f} % right.",
        "",
        "![Images of the same noise, right ones framed in green](generators.png)",
        "",
    ]
    for name in GENERATORS:
        verdict = (folder / name / "verdict.txt").read_text(encoding="utf-8").strip()
        lines += [
            f"The monitor's verdict on the generator {DESCRIPTIONS[name]}: {verdict}",
            "",
            f"![Rewards of the generator {DESCRIPTIONS[name]}]({name}/{PLOT_FILE})",
            "",
        ]
    return lines


def draw_generators(folder: Path) -> Figure:
    """Draw images of all generators for the same held-out prompts and noise, right ones framed in green."""
    rows = ShapesPrompts(SHEET_PROMPTS, "id", EVALUATION_SEED)
    prompts = [rows[i]["prompt"] for i in range(SHEET_PROMPTS)]
    repeated = [prompt for prompt in prompts for _ in range(SAMPLES_PER_PROMPT)]
    figure, grid = plt.subplots(
        len(NAMES) * 2, SHEET_PROMPTS // 2, figsize=(11, 2.05 * len(NAMES) * 2), layout="constrained"
    )
    for line, name in enumerate(NAMES):
        pipeline = load_generator() if name == "base" else load_tuned(folder / name)
        images = sample_images(pipeline, repeated, EVALUATION_SEED)[::SAMPLES_PER_PROMPT]
        right = alignment_holds(images, prompts)
        for i, image in enumerate(images):
            half, column = divmod(i, SHEET_PROMPTS // 2)
            axes = grid[half * len(NAMES) + line, column]
            axes.imshow(image, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(color=RIGHT if right[i] else WRONG, linewidth=3)
            if line == 0:
                axes.set_title(textwrap.fill(prompts[i], 22), fontsize=8)
            if column == 0:
                axes.set_ylabel(textwrap.fill(DESCRIPTIONS[name], 22), fontsize=8)
    return figure
