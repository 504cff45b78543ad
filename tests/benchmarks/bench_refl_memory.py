"""
Memory of the example configurations that tune large generators, counted by `rewarddance estimate`: the script's own loaders and the
real trainer at full size, without values.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import yaml

from rewarddance_hf.memory.apart import run_apart
from rewarddance_hf.memory.report import BEFORE


CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
RECIPES = ("refl_sd35", "refl_flux_dev", "refl_qwen_image", "refl_wan_t2v")
JUDGE = "OpenGVLab/InternVL3_5-2B-HF"


def count(recipe: str, has_judge: bool = True) -> dict[str, float]:
    """
    Count a configuration of `examples/configs`.

    Args:
        recipe (`str`):
            Its name.
        has_judge (`bool`, *optional*, defaults to `True`):
            Whether the judges are on the same GPU, that of the recipe and the held-out one.

    Returns:
        `dict[str, float]`: Gibibytes of all weights, and at the peak before the first update and in one.
    """
    from released_pipelines import PIPELINES
    from released_vlms import VLMS

    from rewarddance_hf.scripts.estimate import estimate, parse

    path = CONFIGS / f"{recipe}.yaml"
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as root:
        folders = {
            name: Path(root) / name for name in (settings["model_name_or_path"], JUDGE, settings["held_out_judge"])
        }
        for name, folder in folders.items():
            {**PIPELINES, **VLMS}[name](folder)
        arguments = ["--config", str(path), "--model_name_or_path", str(folders[settings["model_name_or_path"]])]
        arguments += ["--held_out_judge", str(folders[settings["held_out_judge"]])] if has_judge else []
        arguments += (
            ["--judge", str(folders[JUDGE])]
            if has_judge
            else ["--held_out_judge", "null", "--judge", "http://judge:8000"]
        )
        task, parsed = parse(arguments)
        found = estimate(task, *parsed)[1]
    base = found.peak - max(found.phases.values())
    update = max(value for name, value in found.phases.items() if name != BEFORE)
    weights = sum(size for name, size in found.parts.items() if name not in ("gradients", "optimizer", "activations"))
    results = {"weights_gib": weights, "before_gib": base + found.phases[BEFORE], "update_gib": base + update}
    parts = {**found.parts, **found.phases}
    return results | {f"{name.replace(' ', '_')}_gib": size for name, size in parts.items()}


def measurements(is_full: bool = False) -> dict[str, Callable[[], dict[str, float]]]:
    """One recipe, or all of them if `is_full`, with the judges beside the generator and on another device."""
    return {
        f"{recipe}{suffix}": partial(run_apart, count, recipe, has_judge)
        for recipe in (RECIPES if is_full else list(RECIPES)[:1])
        for suffix, has_judge in (("", True), ("/judge_elsewhere", False))
    }
