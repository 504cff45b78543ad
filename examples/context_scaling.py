# /// script
# dependencies = [
#     "rewarddance_hf[scripts]",
# ]
# ///
"""
Measure what a judge gains from its context (Section 3.2.1 of the paper): criteria, chain of thought, and clips.

Everything runs on the shapes world, whose truth is known, from the tiny base model, on CPU and without a download:

    python examples/context_scaling.py --parts criteria rationales faults --output_dir outputs/context_scaling

- `criteria`: each pair comes twice, with opposite labels under different criteria. A judge that is told them, and one that
  is not.
- `rationales`: judges trained with rationales after the answer, without, and with them before it, for as many steps and from
  the same seeds. The last ones reason before they answer.
- `faults`: the rationales that a judge generates, read back and held against the true scenes: do they name what is wrong?
- `video`: a judge of clips that was trained by `examples/configs/shapes_video.yaml` (`--video_judge`), in domain, out of
  domain, with the frames shuffled, and with one frame of each clip in place of all.

Results are written as `results.json` and printed as tables. Trained judges stay in the output folder, and a second run uses
them again.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from rewarddance_hf import (
    RewardDanceEvaluator,
    RewardDanceForYesScoring,
    RewardDanceScorer,
    RewardDanceTrainer,
    RewardDanceTrainingArguments,
)
from rewarddance_hf.evaluation import statistics
from rewarddance_hf.scoring.reasoning import NoAnswerError
from rewarddance_hf.shapes.clips import NUM_FRAMES
from rewarddance_hf.shapes.loading import load_shapes
from rewarddance_hf.shapes.models import BASE_VLM, PROMPT_TEXTS, judge_processor
from rewarddance_hf.shapes.opposing import ShapesOpposingCriteria
from rewarddance_hf.shapes.preferences import ShapesPreferences
from rewarddance_hf.shapes.rationales import check_rationale, summarize_checks


PARTS = ("criteria", "rationales", "faults", "video")
BATCH_SIZE = 48
MAX_NEW_TOKENS = 64
# Arms of part "rationales" and their formats. Reasons are asked for in words that the base model knows.
ARMS = {"with rationale": "decision_first", "without": None, "reasons first": "reasons_first"}
REASONS_TEXTS = {
    **PROMPT_TEXTS,
    "pairwise_reasons_question": "Describe it. Is {noun} 2 better than {noun} 1?",
    "answer": "\nIs it better:",
}
VIDEO_ROWS = ("t2v-id", "i2v-id", "t2v-ood", "i2v-ood", "t2v-id-shuffled", "i2v-id-shuffled")


def train(
    rows: Any, output_dir: Path, steps: int, seed: int = 0, rationale: str | None = "decision_first", **processor: Any
) -> Path:
    """Fine-tune the base model as the demo does, unless the folder holds a judge already."""
    if (output_dir / "config.json").is_file():
        return output_dir
    arguments = RewardDanceTrainingArguments(
        str(output_dir),
        rationale=rationale,
        rationale_weight=0.5,
        max_steps=steps,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=7e-4,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        weight_decay=0.02,
        adam_beta2=0.98,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        seed=seed,
        disable_tqdm=True,
        log_level="error",
    )
    trainer = RewardDanceTrainer(
        model=RewardDanceForYesScoring.from_pretrained(BASE_VLM),
        args=arguments,
        train_dataset=rows,
        processing_class=judge_processor(**processor),
    )
    trainer.train()
    trainer.save_model()
    return output_dir


def accuracy(judge: Path, rows: Any) -> dict[str, float]:
    """Accuracy on rows with its interval, and that of each category."""
    metrics = RewardDanceEvaluator(rows)(RewardDanceScorer.from_pretrained(judge, batch_size=100))
    names = ("accuracy", "accuracy_low", "accuracy_high", "order_consistency", "num_rows")
    return {name: value for name, value in metrics.items() if name in names or name.startswith("category/")}


def accuracy_after_reasons(judge: Path, rows: Any) -> dict[str, float]:
    """
    The same for a judge that is asked for its reasons first: one greedy chain for each order of a row. One that reaches no
    answer is wrong, and counted in `no_answer`.
    """
    scorer = RewardDanceScorer.from_pretrained(judge, batch_size=100, score_normalization="yes_no")
    rows = list(rows)  # which are made when they are asked for
    columns = {name: [row[name] for row in rows] for name in ("chosen", "rejected", "prompt", "criteria", "category")}
    try:
        scores = scorer.reason(
            columns["chosen"] + columns["rejected"],
            columns["prompt"] * 2,
            references=columns["rejected"] + columns["chosen"],
            criteria=columns["criteria"] * 2,
            max_new_tokens=MAX_NEW_TOKENS,
        ).scores
    except NoAnswerError:
        scores = torch.full((2 * len(rows),), torch.nan)
    # Above 0 where the chosen image is preferred, of shape `(rows, 2)`.
    margins = ((scores.view(2, -1).T - 0.5) * torch.tensor([1, -1])).nan_to_num(-1.0).numpy()
    row_credits = statistics.verdict_credits(margins).mean(axis=1)
    low, high = statistics.bootstrap_interval(row_credits, 1000, seed=0)
    categories = np.array(columns["category"])
    return {
        "accuracy": float(row_credits.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        "order_consistency": statistics.order_consistency(margins),
        "no_answer": scores.isnan().double().mean().item(),
        **{
            f"category/{name}/accuracy": float(row_credits[categories == name].mean())
            for name in sorted({*categories})
        },
        "num_rows": len(margins),
    }


def measure_criteria(args: argparse.Namespace) -> dict[str, Any]:
    rows = ShapesOpposingCriteria(args.steps * BATCH_SIZE)
    without = {"prompt_texts": {**PROMPT_TEXTS, "criteria": ""}}
    results = {}
    for name, processor in (("with criteria", {}), ("without", without)):
        judge = train(rows, args.output_dir / f"criteria_{name.split()[0]}", args.steps, **processor)
        results[name] = accuracy(judge, ShapesOpposingCriteria(args.rows, "id"))
    return results


def measure_rationales(args: argparse.Namespace) -> dict[str, Any]:
    results = {}
    for steps in args.rationale_steps:
        for seed in range(args.seeds):
            for name, rationale in ARMS.items():
                folder = args.output_dir / f"rationales_{name.split()[0]}_{steps}_{seed}"
                rows = ShapesPreferences(steps * BATCH_SIZE, seed=seed)
                judge = train(rows, folder, steps, seed, rationale, prompt_texts=REASONS_TEXTS)
                measure = accuracy_after_reasons if rationale == "reasons_first" else accuracy
                for split in ("id", "ood"):
                    key = f"{name}, {steps} steps, seed {seed}, {split}"
                    results[key] = measure(judge, ShapesPreferences(args.rows, split))
    return results


def measure_faults(args: argparse.Namespace) -> dict[str, Any]:
    """Let the judge explain each row, with the chosen image in turn second and first."""
    judge = args.judge or train(ShapesPreferences(700 * BATCH_SIZE), args.output_dir / "judge", 700)
    scorer = RewardDanceScorer.from_pretrained(judge, batch_size=2)
    results = {}
    for split in ("id", "ood"):
        checks = defaultdict(list)
        for index, row in enumerate(ShapesPreferences(args.fault_rows, split)):
            is_second = index % 2 == 0
            pair = (row["rejected"], row["chosen"]) if is_second else (row["chosen"], row["rejected"])
            verdict = scorer.compare(
                *pair, row["prompt"], criteria=row["criteria"], explain=True, max_new_tokens=MAX_NEW_TOKENS
            )
            check = check_rationale(verdict.rationale, row, is_second)
            right = verdict.winner == ("b" if is_second else "a")
            for group in ("all", row["category"], "right verdicts" if right else "wrong verdicts"):
                checks[group].append(check)
        for group, found in checks.items():
            results[f"{split}, {group}"] = summarize_checks(found)
    return results


def repeat_frame(rows: Any, frame: int) -> list[dict[str, Any]]:
    """Rows of clips in which one frame of each clip stands in place of all."""
    return [{**row, **{name: [row[name][frame]] * NUM_FRAMES for name in ("chosen", "rejected")}} for row in rows]


def measure_video(args: argparse.Namespace) -> dict[str, Any]:
    if args.video_judge is None:
        raise SystemExit("Part 'video' measures a trained judge: pass its folder as --video_judge.")
    results = {name: accuracy(args.video_judge, load_shapes(name, args.rows)) for name in VIDEO_ROWS}
    for name in VIDEO_ROWS[:2]:
        for frame in range(NUM_FRAMES):
            rows = repeat_frame(load_shapes(name, args.rows), frame)
            results[f"{name}, frame {frame + 1} only"] = accuracy(args.video_judge, rows)
    return results


def print_table(title: str, results: dict[str, dict[str, float]]) -> None:
    columns = list(dict.fromkeys(name for row in results.values() for name in row if name != "num_rows"))
    names = [name.removeprefix("category/").removesuffix("/accuracy") for name in columns]
    print(f"\n{title} (%)\n| | {' | '.join(names)} | rows |\n|---|{'---|' * (len(names) + 1)}")
    for name, row in results.items():
        cells = [f"{100 * row[column]:.1f}" if column in row else "" for column in columns]
        print(f"| {name} | {' | '.join(cells)} | {row['num_rows']:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what a judge gains from its context, on the shapes world.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS[:3]), help="what to measure")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/context_scaling"), help="folder for results")
    parser.add_argument("--rows", type=int, default=1000, help="held-out rows for each accuracy")
    parser.add_argument("--steps", type=int, default=150, help="updates of each judge of part 'criteria'")
    parser.add_argument("--rationale_steps", type=int, nargs="+", default=[350, 700], help="of part 'rationales'")
    parser.add_argument("--seeds", type=int, default=2, help="seeds of part 'rationales'")
    parser.add_argument("--fault_rows", type=int, default=400, help="held-out rows of part 'faults', for each split")
    parser.add_argument("--judge", type=Path, help="judge of part 'faults' (default: train that of the demo)")
    parser.add_argument("--video_judge", type=Path, help="judge of part 'video'")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    measures = {
        "criteria": measure_criteria,
        "rationales": measure_rationales,
        "faults": measure_faults,
        "video": measure_video,
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    file = args.output_dir / "results.json"
    for part in args.parts:
        results = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        results[part] = measures[part](args)
        file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        print_table(part, results[part])


if __name__ == "__main__":
    main()
