# /// script
# dependencies = [
#     "rewarddance_hf[scripts]",
# ]
# ///
"""
Measure a judge on held-out preference pairs: accuracy with its interval, order consistency, calibration.

    python examples/evaluate_reward_model.py --model outputs/shapes_judge --dataset shapes:ood
    python examples/evaluate_reward_model.py --model outputs/judge \
        --dataset data-is-better-together/open-image-preferences-v1-binarized --split "train[:5%]"

Every argument is that of `rewarddance evaluate`; this file shows the library calls behind it.
"""

from dataclasses import dataclass, field

from trl import TrlParser


@dataclass
class EvaluationArguments:
    """What to measure, and on what."""

    model: str = field(metadata={"help": "Judge: repository ID or folder."})
    dataset: str = field(
        metadata={"help": "Repository ID or folder of preference rows, or shapes:id, shapes:ood, shapes:video-id, ..."}
    )
    split: str = field(default="test", metadata={"help": "Split, or a slice of one."})
    limit: int = field(default=1000, metadata={"help": "Number of rows to use."})
    batch_size: int = field(default=16, metadata={"help": "Questions per forward pass."})
    calibrate_to: str | None = field(
        default=None, metadata={"help": "Folder for the judge with a temperature fitted on these rows."}
    )


def main(args: EvaluationArguments) -> dict[str, float]:
    from rewarddance_hf import RewardDanceEvaluator, RewardDanceScorer

    if args.dataset.startswith("shapes:"):
        from rewarddance_hf.shapes.loading import load_shapes

        rows = load_shapes(args.dataset.removeprefix("shapes:"), args.limit)
    else:
        from datasets import load_dataset

        rows = load_dataset(args.dataset, split=args.split)
        rows = rows.select(range(min(args.limit, len(rows))))
    scorer = RewardDanceScorer.from_pretrained(args.model, batch_size=args.batch_size)
    evaluator = RewardDanceEvaluator(rows, show_progress=True)
    metrics = evaluator(scorer)
    for name, value in metrics.items():
        print(f"{name:32} {value:.4f}")
    if args.calibrate_to:
        print(evaluator.calibrate(scorer, results=evaluator.results))
        scorer.save_pretrained(args.calibrate_to)
    return metrics


if __name__ == "__main__":
    main(*TrlParser((EvaluationArguments,)).parse_args_and_config())
