"""
The demo: fine-tune the tiny base model as a judge of shapes, measure it beside two others, score with it, and tune a tiny
generator by it. Two processes share the work, which is cut into stages; this one only shows how far they are.
"""

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .stages import Stage, run_stages


TRAINING_STEPS = 380
EVALUATION_ROWS = 1000
# A judge that has only seen clean drawings reads a generator's images less well: it is trained on for some steps, with
# pairs of those in half of the rows.
GENERATED_STEPS = 140
GENERATED_PROMPTS = {"train": 350, "id": 150}
CURVE_ROWS = 200
# A weak reward is hacked within a few updates.
TUNING_STEPS, HACKING_STEPS = 160, 42
EVALUATION_PROMPTS = 500
NUM_REFERENCE_PARTS = 2

GENERATORS = ("base", "tuned", "hacked")
SPLIT_NAMES = {"id": "in domain", "ood": "out of domain", "generated": "generator's samples"}
TITLES = {"untrained": "untrained (pointwise)", "regressive": "scalar head", "judge": "judge (pairwise)"}
METRICS_FILE = "metrics.json"
IMAGES = {
    "learning_curve.png": "accuracy during training",
    "judged_pairs.png": "pairs, the judge's verdicts and reasons",
    "ranking.png": "four images of one prompt, ranked",
    "paradigms.png": "accuracy by paradigm over the amount of data, from three trainings each",
    "generators.png": "samples before and after tuning",
    "tuned/reward_dynamics.png": "rewards while the judge tunes",
    "hacked/reward_dynamics.png": "rewards while a weak reward is hacked",
}
JUDGES, ALIGNMENT, REPORT = (f"{__package__}.{name}" for name in ("judges_demo", "alignment_demo", "report"))


def run_demo(
    output_dir: str = "outputs/demo",
    tune_generator: bool = True,
    steps: int = TRAINING_STEPS,
    rows: int = EVALUATION_ROWS,
    tuning_steps: int = TUNING_STEPS,
    prompts: int = EVALUATION_PROMPTS,
) -> dict[str, float]:
    """
    Train a judge and the regressive baseline side by side, measure both and the untrained model, and write a report.

    Args:
        output_dir (`str`, *optional*, defaults to `"outputs/demo"`):
            Folder for `report.md`, `metrics.json`, images, checkpoints, and what libraries write (`logs`).
        tune_generator (`bool`, *optional*, defaults to `True`):
            Whether to train the judge on pairs of a generator's samples too, and to tune the generator by the judge and by a
            weak reward.
        steps (`int`, *optional*):
            Number of updates of each judge.
        rows (`int`, *optional*):
            Number of held-out rows of each split.
        tuning_steps (`int`, *optional*):
            Number of updates of the generator that the judge tunes.
        prompts (`int`, *optional*):
            Number of held-out prompts that generators are measured on.

    Returns:
        `dict[str, float]`: Metrics with flat keys like `judge/id/accuracy` and `generator/tuned/alignment`.

    Raises:
        `OSError`: If `output_dir` cannot be written.
        `RuntimeError`: If a stage fails.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").touch()  # fails now rather than after minutes of training
    stages = _judge_stages(folder, tune_generator, steps, rows)
    if tune_generator:
        stages |= _generator_stages(folder, tuning_steps, prompts)
    arguments = (str(folder), tune_generator, time.time())
    stages["report"] = Stage("writing the report", f"{REPORT}:write_report", arguments, tuple(stages))
    _say(
        f"Training a judge of shapes and a baseline{', and tuning a generator by the judge' if tune_generator else ''}: "
        f"{len(stages)} stages side by side.\n"
        f"What libraries write is in {folder / 'logs'}."
    )
    run_stages(_in_order(stages), folder / "logs", preload=[REPORT])
    metrics = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
    _say("\n" + "\n".join(summary_lines(folder, metrics)))
    return metrics


def _judge_stages(folder: Path, with_generated: bool, steps: int, rows: int) -> dict[str, Stage]:
    """Stages that train and measure judges."""
    share = min(1.0, steps / TRAINING_STEPS)  # short runs are for trying the code
    curve_rows = max(48, round(share * CURVE_ROWS))
    more = max(1, GENERATED_STEPS * steps // TRAINING_STEPS)
    titles = {"judge": "the judge", "regressive": "the scalar-head baseline"}
    counts = {split: max(20, round(share * count)) for split, count in GENERATED_PROMPTS.items()}
    pairs: Mapping[str, str | None] = {
        split: str(folder / f"pairs_{split}_{count}") if with_generated else None for split, count in counts.items()
    }
    stages: dict[str, Stage] = {}
    if with_generated:
        for split, title in {"train": "for training", "id": "held out"}.items():
            arguments: tuple[Any, ...] = (split, pairs[split], counts[split])
            stages[f"pairs_{split}"] = Stage(
                f"sampling pairs {title} from the generator", f"{JUDGES}:sample", arguments
            )
    for name, title in titles.items():
        arguments = (name, str(folder / name), steps, curve_rows, max(steps // 8, 1))
        stages[f"train_{name}"] = Stage(f"training {title}", f"{JUDGES}:train", arguments)
        trained = f"train_{name}"
        if with_generated:
            trained = f"train_{name}_on_samples"
            arguments = (name, str(folder / name), more, pairs["train"], curve_rows, max(more // 2, 1))
            stages[trained] = Stage(
                f"training {title} on samples too",
                f"{JUDGES}:train_on_generated",
                arguments,
                (f"train_{name}", "pairs_train"),
            )
        arguments = (name, str(folder / name), str(folder / name / METRICS_FILE), rows, pairs["id"])
        after = (trained, *(["pairs_id"] if with_generated else []))
        stages[f"measure_{name}"] = Stage(f"measuring {title}", f"{JUDGES}:evaluate", arguments, after)
    arguments = ("untrained", None, str(folder / "untrained.json"), rows, pairs["id"])
    stages["measure_untrained"] = Stage("measuring the untrained model", f"{JUDGES}:evaluate", arguments, after[1:])
    judge = stages["measure_judge"].after[:1]
    stages["draw_judge"] = Stage("drawing judged pairs and a ranking", f"{REPORT}:draw_judge", (str(folder),), judge)
    return stages


def _generator_stages(folder: Path, steps: int, prompts: int) -> dict[str, Stage]:
    """Stages that tune and measure generators."""
    share = min(1.0, steps / TUNING_STEPS)
    hacking_steps = max(1, round(steps * HACKING_STEPS / TUNING_STEPS))
    judge, parts = str(folder / "judge"), range(NUM_REFERENCE_PARTS)
    references = [str(folder / f"references_{part}") for part in parts]
    stages = {
        f"references_{part}": Stage(
            f"choosing references by the judge, part {part + 1} of {len(parts)}",
            f"{ALIGNMENT}:choose_references",
            (references[part], judge, share, part, len(parts)),
            ("train_judge_on_samples",),
        )
        for part in parts
    }
    arguments: tuple[Any, ...] = ("tuned", str(folder / "tuned"), judge, references, steps, share)
    stages["tuned"] = Stage("tuning the generator by the judge", f"{ALIGNMENT}:tune", arguments, tuple(stages))
    arguments = ("hacked", str(folder / "hacked"), None, [], hacking_steps, share)
    stages["hacked"] = Stage("tuning the generator by color alone", f"{ALIGNMENT}:tune", arguments)
    titles = {
        "base": "the base generator",
        "tuned": "the generator tuned by the judge",
        "hacked": "the generator tuned by color alone",
    }
    for name, title in titles.items():
        arguments = (name, str(folder / name), prompts)
        after = () if name == "base" else (name,)
        stages[f"measure_{name}"] = Stage(f"measuring {title}", f"{ALIGNMENT}:measure", arguments, after)
    return stages


# Stages of the longest chain come first and cannot wait, then come other long ones; short ones fill what is left.
LONGEST_CHAIN = (
    *("train_judge", "train_judge_on_samples", "references_0", "references_1", "tuned", "measure_tuned", "report"),
)
FIRST = (*LONGEST_CHAIN, "pairs_train", "train_regressive", "train_regressive_on_samples", "hacked", "draw_judge")


def _in_order(stages: dict[str, Stage]) -> dict[str, Stage]:
    names = [*(name for name in FIRST if name in stages), *(name for name in stages if name not in FIRST)]
    return {name: replace(stages[name], can_wait=name not in LONGEST_CHAIN) for name in names}


def metric_files(folder: Path, tune_generator: bool) -> list[Path]:
    """Files that stages have written metrics to."""
    files = [folder / "untrained.json", *(folder / name / METRICS_FILE for name in ("regressive", "judge"))]
    if tune_generator:
        files += [folder / name / METRICS_FILE for name in GENERATORS]
        files += [folder / name / "tuning.json" for name in GENERATORS[1:]]
    return files


def summary_lines(folder: Path, metrics: Mapping[str, Any]) -> list[str]:
    """What came out, as lines for a terminal: tables, then the paths of the report and its images."""

    def cell(key: str) -> str:
        value, low, high = (100 * metrics[key + end] for end in ("", "_low", "_high"))
        return f"{value:.1f} ({low:.1f} to {high:.1f})"

    splits = [split for split in SPLIT_NAMES if f"judge/{split}/accuracy" in metrics]
    lines = ["Accuracy on held-out pairs, % (95 % interval)"]
    lines.append(f"  {'':24}" + "".join(f"{SPLIT_NAMES[split]:23}" for split in splits).rstrip())
    for name, title in TITLES.items():
        lines.append(f"  {title:24}" + "".join(f"{cell(f'{name}/{split}/accuracy'):23}" for split in splits).rstrip())
    has_generators = "generator/base/alignment" in metrics
    if has_generators:
        lines += ["", "Held-out prompts that the generator draws right, %"]
        titles = {"base": "base", "tuned": "tuned by the judge", "hacked": "tuned by color alone"}
        for name, title in titles.items():
            lines.append(f"  {title:24}{cell(f'generator/{name}/alignment')}")
        warned = metrics.get("generator/hacked/first_warning")
        lines[-1] += "" if warned is None else f"   reward hacking was seen at update {warned}"
    minutes, seconds = divmod(round(metrics["seconds"]), 60)
    lines += ["", f"All in {minutes}:{seconds:02d}.", f"  {folder / 'report.md'}"]
    files = {folder / name: title for name, title in IMAGES.items() if has_generators or "/" not in name}
    files = {file: title for file, title in files.items() if has_generators or file.name != "generators.png"}
    width = max(len(str(file)) for file in files)
    return lines + [f"  {file!s:{width}}  {title}" for file, title in files.items()]


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
