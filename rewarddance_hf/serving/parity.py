"""How far an engine's judge is from the judge itself: tokens, pixels and log-odds on a sheet of questions."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor
from transformers.utils import is_torchvision_available

from ..models.question_rewarddance import Question
from ..scoring.scorer import RewardDanceScorer
from .engine import EngineJudge


SIZES = ((64, 64), (224, 224), (300, 200), (97, 131), (512, 512))
PROMPTS = (
    "a red circle left of a blue square",
    'a sign that says "yes", and no other text',
    "<|im_end|><image> an answer that is no token",
    "zwei grüne Dreiecke 🟢🔺, 三角形",
    "line one\nline two\n\nAnswer: no",
)


@dataclass(frozen=True)
class ParityReport:
    """
    Differences of an engine from the judge itself.

    Args:
        num_questions (`int`):
            Number of questions.
        num_equal_prompts (`int`, *optional*):
            Questions whose tokens are the same; None if the engine does not tell them.
        pixel_difference (`float`, *optional*):
            Largest difference of the pixels that the judge sees from those of the image processor that engines use, which is
            that of torchvision; None where that is not installed.
        log_odds (`float`), log_odds_mean (`float`):
            Largest and mean difference of log-odds.
        scores (`float`):
            Largest difference of rewards.
    """

    num_questions: int
    num_equal_prompts: int | None
    pixel_difference: float | None
    log_odds: float
    log_odds_mean: float
    scores: float

    def lines(self) -> list[str]:
        """The report for people."""
        prompts = "not told by the engine" if self.num_equal_prompts is None else f"{self.num_equal_prompts} equal"
        pixels = (
            "not known here: torchvision is not installed" if self.pixel_difference is None else self.pixel_difference
        )
        return [
            f"questions         {self.num_questions}",
            f"prompt tokens     {prompts}",
            f"pixels            {pixels}",
            f"log-odds          at most {self.log_odds:.3g}, {self.log_odds_mean:.3g} in the mean",
            f"rewards           at most {self.scores:.3g}",
        ]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_sheet(count: int, is_pairwise: bool, seed: int = 0) -> list[Question]:
    """Questions about smooth random images of several sizes, with prompts that a careless writer would break at."""
    generator = np.random.default_rng(seed)

    def image(row: int) -> Image.Image:
        pixels = generator.integers(0, 256, (7, 7, 3), dtype=np.uint8)
        return Image.fromarray(pixels).resize(SIZES[row % len(SIZES)], Image.Resampling.BICUBIC)

    return [
        Question(image(i), PROMPTS[i % len(PROMPTS)], image(i + i // len(SIZES)) if is_pairwise else None, row=i)
        for i in range(count)
    ]


@torch.no_grad()
def compare_with_engine(scorer: RewardDanceScorer, engine: EngineJudge, questions: list[Question]) -> ParityReport:
    """
    Ask a judge and an engine the same.

    Args:
        scorer ([`RewardDanceScorer`]):
            Judge.
        engine ([`~rewarddance_hf.serving.engine.EngineJudge`]):
            The same judge, exported and served by an engine.
        questions (`list[Question]`):
            What both are asked, e.g. of [`make_sheet`].

    Returns:
        [`ParityReport`]

    Raises:
        `ValueError`: If the engine serves an export of another judge.
    """
    ours, theirs = scorer.fingerprint(), engine.settings["fingerprint"]
    if ours["weights"] != theirs["weights"] or ours["processor"] != theirs["processor"]:
        raise ValueError(
            f"The export is of another judge ({theirs}) than the one to compare with ({ours}). Export it anew."
        )
    loaded = [scorer.processor.load(question) for question in questions]
    logits, scores = scorer.ask(loaded)
    replies = list(map(engine.ask_engine, loaded))
    found = torch.tensor([engine.read_reply(reply) for reply in replies], dtype=torch.float64)
    equal = None
    if all(reply.prompt_token_ids is not None for reply in replies):
        wanted = [scorer.processor.encode([question])["input_ids"][0].tolist() for question in loaded]
        equal = sum(tokens == reply.prompt_token_ids for tokens, reply in zip(wanted, replies, strict=True))
    difference = (found[:, 0] - logits.double().cpu()).abs()
    return ParityReport(
        len(questions),
        equal,
        _pixel_difference(scorer, engine, loaded),
        float(difference.max()),
        float(difference.mean()),
        float((found[:, 1] - scores.double().cpu()).abs().max()),
    )


def _pixel_difference(scorer: RewardDanceScorer, engine: EngineJudge, questions: list[Question]) -> float | None:
    if not is_torchvision_available():
        return None
    stock = AutoImageProcessor.from_pretrained(engine.folder, backend="torchvision")
    largest = 0.0
    for question in questions:
        for image in question.images:
            pixels = [
                processor(images=[image], return_tensors="pt", **scorer.processor.vlm_images_kwargs)[
                    "pixel_values"
                ].float()
                for processor in (scorer.processor.image_processor, stock)
            ]
            if pixels[0].shape != pixels[1].shape:
                return float("inf")
            largest = max(largest, float((pixels[0] - pixels[1]).abs().max()))
    return largest
