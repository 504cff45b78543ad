"""
What a base model of shapes knows, and how it judges before it has seen a single preference.

    python -m rewarddance_hf.shapes.knowledge --model outputs/shapes_base_2m    # a minute or two
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from ..evaluation.evaluator import RewardDanceEvaluator
from ..models import RewardDanceForYesScoring
from ..models.prompting_rewarddance import PROMPT_LAYOUTS
from ..scoring.scorer import RewardDanceScorer
from .lessons import ShapesLessons
from .models import BASE_VLM, LADDER_LAYOUT, judge_processor
from .preferences import ShapesPreferences
from .questions import QuestionCollator


SPLITS = ("id", "ood")
LESSON_ROWS = 600
JUDGED_ROWS = 1000
BATCH_SIZE = 50


def answer_accuracy(
    model: str | Path = BASE_VLM, split: str = "id", num_rows: int = LESSON_ROWS, seed: int = 0
) -> dict[str, float]:
    """
    Share of held-out questions that a base model answers word for word, by topic.

    Args:
        model (`str` or `os.PathLike`, *optional*, defaults to the model that ships): Plain checkpoint of a base model.
        split (`str`, *optional*, defaults to `"id"`): `"id"` or `"ood"`.
        num_rows (`int`, *optional*, defaults to 600): Number of rows of [`~rewarddance_hf.shapes.lessons.ShapesLessons`].
        seed (`int`, *optional*, defaults to 0): Seed of the rows.

    Returns:
        `dict[str, float]`: Shares in [0, 1] by topic, in alphabetical order.
    """
    vlm = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
    collator = QuestionCollator(judge_processor(model).vlm_processor)
    lessons = ShapesLessons(num_rows, split, seed)
    right: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, num_rows, BATCH_SIZE):
        rows = [lessons[index] for index in range(start, min(start + BATCH_SIZE, num_rows))]
        batch = collator(rows)
        labels = batch.pop("labels")[:, 1:]
        with torch.no_grad():
            said = vlm(**batch).logits[:, :-1].argmax(-1)
        # Greedy decoding gives an answer exactly where each of its tokens is the likeliest after those before it.
        wrong = (said != labels) & (labels != -100)
        for row, row_wrong, answered in zip(rows, wrong, labels != -100, strict=True):
            # An answer follows its question, so that runs of labels are answers.
            starts = answered & ~torch.nn.functional.pad(answered[:-1], (1, 0))
            numbers = starts.cumsum(0)[answered]
            faults = torch.zeros(len(row["topics"])).index_add_(0, numbers - 1, row_wrong[answered].float())
            for topic, fault in zip(row["topics"], faults.tolist(), strict=True):
                right[topic].append(not fault)
    return {topic: sum(values) / len(values) for topic, values in sorted(right.items())}


def zero_shot_accuracy(
    model: str | Path = BASE_VLM,
    split: str = "id",
    paradigm: str = "pointwise",
    num_rows: int = JUDGED_ROWS,
    prompt_layout: str = LADDER_LAYOUT,
) -> dict[str, float]:
    """
    Metrics of [`RewardDanceEvaluator`] of a base model that judges `num_rows` preference rows without any training for it.

    `paradigm` is `"pointwise"` or `"pairwise"`, `prompt_layout` that of [`RewardDanceProcessor`].
    """
    scorer = RewardDanceScorer(
        RewardDanceForYesScoring.from_pretrained(model, paradigm=paradigm, dtype=torch.float32),
        judge_processor(model, prompt_layout=prompt_layout),
        batch_size=100,
    )
    return RewardDanceEvaluator(ShapesPreferences(num_rows, split))(scorer)


def measure_knowledge(
    model: str | Path = BASE_VLM,
    lesson_rows: int = LESSON_ROWS,
    judged_rows: int = JUDGED_ROWS,
    prompt_layout: str = LADDER_LAYOUT,
) -> dict[str, Any]:
    """Answers by topic, and zero-shot judging of either kind by category, in and out of domain."""
    knowledge: dict[str, Any] = {}
    for split in SPLITS:
        knowledge |= {
            f"{split}/answers/{topic}": share for topic, share in answer_accuracy(model, split, lesson_rows).items()
        }
        for paradigm in ("pointwise", "pairwise"):
            metrics = zero_shot_accuracy(model, split, paradigm, judged_rows, prompt_layout)
            knowledge |= {
                f"{split}/{paradigm}/{name.removeprefix('category/').removesuffix('/accuracy')}": value
                for name, value in metrics.items()
                if name == "accuracy" or name.startswith("category/")
            }
    return knowledge


def knowledge_table(knowledge: dict[str, Any]) -> str:
    """Markdown table with a row for each topic and category and a column for each split, in percent."""
    names = sorted({key.partition("/")[2] for key in knowledge})
    lines = ["| knowledge | in domain | out of domain |", "|---|---|---|"]
    for name in names:
        cells = [
            f"{100 * knowledge[key]:.1f} %" if (key := f"{split}/{name}") in knowledge else "-" for split in SPLITS
        ]
        lines.append(f"| {name.replace('/', ': ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BASE_VLM)
    parser.add_argument("--prompt_layout", choices=PROMPT_LAYOUTS, default=LADDER_LAYOUT)
    parser.add_argument("--output_file", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    knowledge = measure_knowledge(options.model, prompt_layout=options.prompt_layout)
    sys.stdout.write(f"{knowledge_table(knowledge)}\n")
    if options.output_file is not None:
        options.output_file.write_text(json.dumps(knowledge, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
