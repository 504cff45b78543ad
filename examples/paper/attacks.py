"""Adversarial pixels: how little must change in the worse image for a judge to prefer it, and what helps against that."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from generators import load_scorer

from rewarddance_hf import RewardDanceScorer
from rewarddance_hf.shapes.preferences import ShapesPreferences


Margin = Callable[[torch.Tensor], torch.Tensor]
NUM_COPIES = 4
NOISE = 0.04


def attack(
    folder: str,
    judge: str,
    other: str,
    *,
    report: Any,
    paradigm: str,
    num_rows: int,
    radii: list[float],
    steps: int,
) -> dict[str, Any]:
    """
    Change pixels of rejected images by at most a radius each (in [0, 1]), along the gradient of `judge`, so that they are preferred.

    Gives for each radius and row whether the changed image is preferred (`credits` of the attack): by the judge itself (`self`), by
    another training of it (`other`), by the mean of both (`ensemble`), and by the judge where it sees copies with noise in place of the
    image (`augmented`). Radius 0 is the image as it is.
    """
    scorer, second = load_scorer(judge, num_rows), load_scorer(other, num_rows)
    rows = list(ShapesPreferences(num_rows, "id", seed=5))
    processor = VaeImageProcessor(do_resize=False, do_normalize=False)
    worse, better = (processor.preprocess([row[name] for row in rows]) for name in ("rejected", "chosen"))
    first, another = (_margin(of, rows, better, paradigm) for of in (scorer, second))
    found: dict[str, Any] = {}
    for number, radius in enumerate([0.0, *radii]):
        pixels = _climb(first, worse, radius, steps)
        torch.manual_seed(0)
        with torch.no_grad():
            by_self, by_other = first(pixels), another(pixels)
            copies = [(pixels + NOISE * torch.randn_like(pixels)).clamp(0, 1) for _ in range(NUM_COPIES)]
            margins = {
                "self": by_self,
                "other": by_other,
                "ensemble": by_self + by_other,
                "augmented": torch.stack([first(copy) for copy in copies]).mean(0),
            }
        found |= {f"{name}/{radius:g}": (margin > 0).float().tolist() for name, margin in margins.items()}
        report(number + 1, len(radii) + 1)
    return found


def _margin(scorer: RewardDanceScorer, rows: list[dict[str, Any]], better: torch.Tensor, paradigm: str) -> Margin:
    """By how much images of shape `(rows, 3, height, width)` are preferred to the better ones, above 0 if they are."""
    prompts, criteria = ([row[name] for row in rows] for name in ("prompt", "criteria"))
    if paradigm == "pairwise":
        return lambda images: torch.logit(
            scorer.score(images, prompts, references=better, criteria=criteria).clamp(1e-7, 1 - 1e-7)
        )
    squash = torch.log if paradigm == "pointwise" else torch.nn.Identity()
    level = squash(scorer.score(better, prompts, criteria=criteria))
    return lambda images: squash(scorer.score(images, prompts, criteria=criteria)) - level


def _climb(margin: Margin, images: torch.Tensor, radius: float, steps: int) -> torch.Tensor:
    """Projected gradient ascent by signs."""
    changed = images.clone()
    for _ in range(steps if radius else 0):
        changed.requires_grad_(True)
        (gradient,) = torch.autograd.grad(margin(changed).sum(), changed)
        with torch.no_grad():
            stepped = changed + 2.5 * radius / steps * gradient.sign()
            changed = torch.clamp(stepped, images - radius, images + radius).clamp(0, 1)
    return changed.detach()
