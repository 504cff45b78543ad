# /// script
# dependencies = [
#     "rewarddance_hf[demo]",
# ]
# ///
"""
Draw the picture of the README from the judge that `make demo` has trained: samples of the tiny generator, ranked by the judge. Frames
are the verdict of the oracle, which the judge does not know.

    python examples/images/draw_ranking.py --judge outputs/demo/judge --output examples/images/ranking.png
"""

import argparse

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt

from rewarddance_hf import RewardDanceScorer
from rewarddance_hf.shapes.alignment_report import RIGHT, WRONG
from rewarddance_hf.shapes.generated import alignment_holds, sample_images
from rewarddance_hf.shapes.generator import load_generator


NUM_IMAGES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--judge", default="outputs/demo/judge")
    parser.add_argument("--output", default="examples/images/ranking.png")
    parser.add_argument("--prompts", nargs="+", default=["three purple squares", "a white circle and a red triangle"])
    args = parser.parse_args()

    pipeline, scorer = load_generator(), RewardDanceScorer.from_pretrained(args.judge)
    size = (1.3 * NUM_IMAGES, 1.85 * len(args.prompts))
    figures = plt.figure(figsize=size, layout="constrained").subfigures(len(args.prompts), 1, squeeze=False)[:, 0]
    for figure, prompt in zip(figures, args.prompts, strict=True):
        images = sample_images(pipeline, [prompt] * NUM_IMAGES, 0)
        ranking = scorer.rank(images, prompt)
        right = alignment_holds(images, [prompt] * NUM_IMAGES)
        figure.suptitle(f'"{prompt}"', fontsize=11)
        for axes, i in zip(figure.subplots(1, NUM_IMAGES), ranking.order, strict=True):
            axes.imshow(images[i], interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.set_title(f"{ranking.wins[i]:g} wins, {ranking.scores[i]:.2f}", fontsize=9)
            axes.spines[:].set(color=RIGHT if right[i] else WRONG, linewidth=4)
    plt.savefig(args.output, dpi=80)


if __name__ == "__main__":
    main()
