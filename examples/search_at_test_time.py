# /// script
# dependencies = [
#     "rewarddance_hf[diffusers,demo]",
# ]
# ///
"""
Measure search at inference: plain sampling, Best-of-N, zero-order search and Search over Paths at equal numbers of denoiser
evaluations, on the shapes world, whose oracle knows how many prompts are really met.

    python examples/search_at_test_time.py

It trains a pointwise judge first (or takes yours: `--judge`), and needs no download. The oracle as the reward shows how much
there is to gain. To search with your own pipeline and judge, use the command line, or the functions that this script calls:

    rewarddance generate --search paths --budget 256 --pipeline ORG/PIPELINE --model ORG/JUDGE --prompt "a red circle"
"""

import argparse
import json
import time
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset

from rewarddance_hf import (
    RewardDanceEvaluator,
    RewardDanceForYesScoring,
    RewardDanceScorer,
    RewardDanceTrainer,
    RewardDanceTrainingArguments,
)
from rewarddance_hf.alignment.pipelines.loading import load_pipeline
from rewarddance_hf.alignment.search.saving import save_search
from rewarddance_hf.alignment.search.search import best_of_n, search_over_paths, zero_order_search
from rewarddance_hf.evaluation.statistics import bootstrap_interval
from rewarddance_hf.shapes.generated import ShapesPrompts, alignment_holds, alignment_score, generated_preferences
from rewarddance_hf.shapes.generator import BASE_GENERATOR, SAMPLING
from rewarddance_hf.shapes.models import BASE_VLM, judge_processor
from rewarddance_hf.shapes.preferences import ALIGNMENT_CRITERIA, ShapesPreferences


METHODS = {"best-of-n": "Best-of-N", "zero-order": "zero-order", "paths": "Search over Paths"}
JUDGE_BATCH = 48
ZERO_ORDER = {"num_neighbors": 4, "noise_strength": 0.6}
PATHS = {"num_paths": 2, "start_step": 4, "renoise_steps": 2, "denoise_steps": 4}


class Repeated(Dataset):
    """Rows again and again."""

    def __init__(self, rows: list, num_rows: int):
        self.rows, self.num_rows = rows, num_rows

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> dict:
        return self.rows[index % len(self.rows)]


def train_judge(pipeline, folder: Path, steps: int, num_prompts: int) -> None:
    """Pointwise judge for the generator's images: half of its pairs are rendered, half are the generator's own."""
    generated = generated_preferences(pipeline, num_prompts, "train", batch_size=128)
    half = steps * JUDGE_BATCH // 2
    print(f"training a judge on {half} rendered pairs and {len(generated)} generated ones")
    trainer = RewardDanceTrainer(
        model=RewardDanceForYesScoring.from_pretrained(BASE_VLM, paradigm="pointwise"),
        args=RewardDanceTrainingArguments(
            str(folder),
            paradigm="pointwise",
            max_steps=steps,
            per_device_train_batch_size=JUDGE_BATCH,
            learning_rate=7e-4,
            lr_scheduler_type="cosine",
            warmup_steps=min(50, steps // 10),
            weight_decay=0.02,
            adam_beta2=0.98,
            gradient_checkpointing=False,
            logging_steps=max(steps // 10, 1),
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=ConcatDataset([ShapesPreferences(half), Repeated(generated, half)]),
        processing_class=judge_processor(),
    )
    trainer.train()
    trainer.save_model()


def search_at_budgets(method: str, pipeline, prompts: list[str], reward, budgets: list[int], options: dict) -> dict:
    """For each budget the image that the search chose for each prompt, and the denoiser evaluations that it took."""
    if method == "paths":
        found = {}
        for budget in budgets:
            results = search_over_paths(pipeline, prompts, reward, max_denoiser_evaluations=budget, **PATHS, **options)
            found[budget] = ([result.images[0] for result in results], [r.denoiser_evaluations for r in results])
        return found
    # The first images of these two searches are those of a search with a smaller budget: the seeds are the same.
    search = best_of_n if method == "best-of-n" else zero_order_search
    keep_all = {"num_images": max(budgets), "max_denoiser_evaluations": max(budgets)}
    results = search(pipeline, prompts, reward, **({} if method == "best-of-n" else ZERO_ORDER), **keep_all, **options)
    found = {}
    for budget in budgets:
        count = budget // SAMPLING["num_inference_steps"]
        places = [next(i for i, node in enumerate(result.winners) if node < count) for result in results]
        images = [result.images[place] for result, place in zip(results, places, strict=True)]
        found[budget] = (images, [count * SAMPLING["num_inference_steps"]] * len(results))
    return found


def measure(images: list[torch.Tensor], prompts: list[str]) -> dict:
    """Share of prompts that are met completely, its interval, and the share of single facts."""
    holds = alignment_holds(torch.stack(images), prompts).astype(float)
    low, high = bootstrap_interval(holds, num_samples=2000)
    share = float(alignment_score(torch.stack(images), prompts).mean())
    return {"met": float(holds.mean()), "low": low, "high": high, "facts": share, "holds": holds.tolist()}


def main(args: argparse.Namespace) -> dict:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    folder = Path(args.output_dir)
    pipeline = load_pipeline(args.pipeline)
    pipeline.set_progress_bar_config(disable=True)

    judge_folder = Path(args.judge or folder / "judge")
    if not (judge_folder / "config.json").exists():
        train_judge(pipeline, judge_folder, args.judge_steps, args.judge_prompts)
    model = RewardDanceForYesScoring.from_pretrained(judge_folder, paradigm="pointwise").requires_grad_(False)
    scorer = RewardDanceScorer(model, judge_processor(judge_folder), batch_size=128, num_workers=0)
    held_out = generated_preferences(pipeline, args.judge_prompts // 5, args.split, seed=args.seed + 1, batch_size=128)
    judge_accuracy = RewardDanceEvaluator(held_out)(scorer)["accuracy"]
    print(f"the judge is right about {judge_accuracy:.1%} of {len(held_out)} held-out pairs of generated images")

    prompts = [row["prompt"] for row in ShapesPrompts(args.num_prompts, args.split, args.seed)]
    rewards = {
        "judge": lambda images, prompts: scorer.score(images, prompts, criteria=ALIGNMENT_CRITERIA),
        "oracle": alignment_score,
    }
    options = {"output_type": "pt", "batch_size": args.batch_size, "seed": args.seed, **SAMPLING}
    plain = best_of_n(pipeline, prompts, rewards["oracle"], num_candidates=1, **options)
    metrics = {
        "prompts": len(prompts),
        "split": args.split,
        "judge_accuracy": judge_accuracy,
        "plain": measure([result.images[0] for result in plain], prompts),
        "judge": {},
        "oracle": {},
    }
    for name, method in [(name, method) for name in rewards for method in METHODS]:
        start = time.process_time()
        found = search_at_budgets(method, pipeline, prompts, rewards[name], args.budgets, options)
        metrics[name][method] = {
            str(budget): {**measure(images, prompts), "evaluations": float(np.mean(evaluations))}
            for budget, (images, evaluations) in found.items()
        }
        shares = ", ".join(f"{budget}: {m['met']:.1%}" for budget, m in metrics[name][method].items())
        print(f"{METHODS[method]}, judged by the {name}: {shares} ({time.process_time() - start:.0f} s)")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(write_report(metrics, args.budgets), encoding="utf-8")
    draw_curves(metrics, args.budgets).savefig(folder / "curves.png", dpi=150)

    # One search to look at
    options = {**options, "output_type": "pil"}
    missed = [prompt for prompt, met in zip(prompts, metrics["plain"]["holds"], strict=True) if not met]
    prompt = (missed or prompts)[0]
    example = search_over_paths(
        pipeline, prompt, rewards["judge"], max_denoiser_evaluations=max(args.budgets), **PATHS, **options
    )
    save_search(example, folder / "example")
    print(f"wrote {folder}/report.md, curves.png, metrics.json and example/")
    return metrics


def write_report(metrics: dict, budgets: list[int]) -> str:
    """The measurement as Markdown."""
    plain = metrics["plain"]
    lines = [
        "# Search at inference on shapes",
        "",
        f"Share of {metrics['prompts']} held-out prompts (`{metrics['split']}`) that the image meets completely, by the "
        "oracle, with its 95 % bootstrap interval over prompts; in parentheses the share of single facts. Columns are budgets "
        "of denoiser evaluations for each prompt: images times steps, with the two passes of classifier-free guidance counted "
        f"as one. A plain image takes {SAMPLING['num_inference_steps']}. The judge is right about "
        f"{metrics['judge_accuracy']:.1%} of held-out pairs of generated images.",
        "",
        f"| reward | method | {' | '.join(map(str, budgets))} |",
        "|---|---|" + "---|" * len(budgets),
        f"| none | plain sampling ({SAMPLING['num_inference_steps']} evaluations) | {_cell(plain)} |"
        + " |" * (len(budgets) - 1),
    ]
    for reward in ("judge", "oracle"):
        for method, name in METHODS.items():
            cells = [_cell(metrics[reward][method][str(budget)]) for budget in budgets]
            lines.append(f"| {reward} | {name} | {' | '.join(cells)} |")
    lines += ["", "Difference to Best-of-N on the same prompts, in percentage points, with its interval:", ""]
    lines += [f"| reward | method | {' | '.join(map(str, budgets))} |", "|---|---|" + "---|" * len(budgets)]
    for reward in ("judge", "oracle"):
        best = metrics[reward]["best-of-n"]
        for method in ("zero-order", "paths"):
            cells = []
            for budget in map(str, budgets):
                gain = 100 * (np.array(metrics[reward][method][budget]["holds"]) - np.array(best[budget]["holds"]))
                low, high = bootstrap_interval(gain, num_samples=2000)
                cells.append(f"{gain.mean():+.1f} ({low:+.1f} to {high:+.1f})")
            lines.append(f"| {reward} | {METHODS[method]} | {' | '.join(cells)} |")
    used = ", ".join(f"{metrics['judge']['paths'][str(budget)]['evaluations']:.0f} of {budget}" for budget in budgets)
    lines += ["", f"Search over Paths took {used} evaluations; the others all of them.", "", "![](curves.png)", ""]
    return "\n".join(lines)


def _cell(metric: dict) -> str:
    return f"{metric['met']:.1%} ({metric['low']:.1%} to {metric['high']:.1%}; {metric['facts']:.1%})".replace(
        "%", " %"
    )


def draw_curves(metrics: dict, budgets: list[int]):
    """Share of met prompts by budget, one panel for each reward."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axes, reward, title in zip(
        panels, ("judge", "oracle"), ("reward of the judge", "reward of the oracle (upper bound)"), strict=True
    ):
        axes.axhline(100 * metrics["plain"]["met"], color="gray", linestyle="--", label="plain sampling")
        for method, name in METHODS.items():
            values = [metrics[reward][method][str(budget)] for budget in budgets]
            (line,) = axes.plot(budgets, [100 * value["met"] for value in values], marker="o", label=name)
            axes.fill_between(
                budgets,
                [100 * value["low"] for value in values],
                [100 * value["high"] for value in values],
                color=line.get_color(),
                alpha=0.15,
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(budgets, list(map(str, budgets)))
        axes.set_xlabel("denoiser evaluations for each prompt")
        axes.set_title(title)
    panels[0].set_ylabel("prompts that are met completely (%)")
    panels[1].legend(loc="lower right")
    return figure


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measure search at inference on the shapes world.")
    parser.add_argument("--output_dir", default="outputs/search", help="folder for the report")
    parser.add_argument("--pipeline", default=str(BASE_GENERATOR), help="folder of a generator of shapes")
    parser.add_argument("--judge", help="folder of a pointwise judge of shapes (default: train one)")
    parser.add_argument("--judge_steps", type=int, default=500, help="updates of the judge that is trained")
    parser.add_argument("--judge_prompts", type=int, default=1000, help="prompts of its generated pairs")
    parser.add_argument("--num_prompts", type=int, default=300, help="prompts to search for")
    parser.add_argument("--split", default="id", choices=("id", "ood"), help="split of these prompts")
    parser.add_argument("--budgets", type=int, nargs="+", default=[16, 32, 64, 128], help="denoiser evaluations")
    parser.add_argument("--batch_size", type=int, default=128, help="images that are made at once")
    parser.add_argument("--seed", type=int, default=0, help="seed of prompts and search")
    return parser


if __name__ == "__main__":
    main(make_parser().parse_args())
