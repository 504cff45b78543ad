"""Collator: preference rows become batches of questions, in an order that a judge cannot learn."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature

from ..models import RewardDanceConfig, RewardDanceProcessor
from ..models.question_rewarddance import Question
from .preference import check_row, rationale_text, row_question


RATIONALE_FORMATS = ("decision_first", "reasons_first", "mixed")


class DataCollatorForRewardDance:
    r"""
    Turn preference rows into batches for [`RewardDanceForYesScoring`].

    Pairwise: one question per row. Which of the two images comes second is drawn at random from seed, epoch and the
    row's content (public datasets store the winner first; a judge trained without this learns the position).
    Pointwise and regressive: two questions per row, all chosen samples first, then all rejected ones.

    Args:
        processor ([`RewardDanceProcessor`]):
            Processor of the judge.
        paradigm (`str`, *optional*, defaults to `"pairwise"`):
            Training variant: `"pairwise"`, `"pointwise"` or `"regressive"`.
        with_rationales (`bool`, *optional*, defaults to `False`):
            Whether to append answers and the rows' rationales as targets. Pairwise only.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order.
        rationale_format (`str`, *optional*, defaults to `"decision_first"`):
            `"decision_first"` appends the answer, then its reasons; `"reasons_first"` asks for reasons first, and
            appends the answer after them; `"mixed"` draws one of the two for each row and epoch, as it draws the
            order. Rows without a rationale are always asked for the decision only. Only used with `with_rationales`.

    Inputs:
        Rows as described by [`~rewarddance_hf.data.preference.check_row`].

    Returns:
        `dict[str, torch.Tensor]`: Inputs of the model, and
        - `labels` of shape `(rows,)`: pairwise: target probability of "yes", 1 if the chosen image is image 2, 0 if it
          is image 1, 0.5 for a tie; else: target probability that the chosen sample is better, 1, or 0.5 for a tie;
        - `margin` of shape `(rows,)`, if any row has one.

    Raises:
        `ValueError`: If a row lacks a column, or an image cannot be read; the message names the row.
    """

    def __init__(
        self,
        processor: RewardDanceProcessor,
        paradigm: str = "pairwise",
        with_rationales: bool = False,
        seed: int = 0,
        rationale_format: str = "decision_first",
    ) -> None:
        self.uses_reference = RewardDanceConfig(paradigm=paradigm).uses_reference
        if with_rationales and not self.uses_reference:
            raise ValueError(
                f"`with_rationales` is True, but the {paradigm} paradigm has no rationales. Use `paradigm='pairwise'`."
            )
        if rationale_format not in RATIONALE_FORMATS:
            raise ValueError(f"`rationale_format` is {rationale_format!r}, but must be one of {RATIONALE_FORMATS}.")
        self.processor = processor
        self.paradigm = paradigm
        self.with_rationales = with_rationales
        self.seed = seed
        self.rationale_format = rationale_format
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()  # seen by running data loader workers

    def set_epoch(self, epoch: int) -> None:
        """
        Draw new orders for an epoch.

        Args:
            epoch (`int`):
                Index of the epoch.
        """
        self._epoch.fill_(epoch)

    def __call__(self, rows: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        names = [str(row.get("row", f"row {i} of the batch")) for i, row in enumerate(rows)]
        for row, name in zip(rows, names, strict=True):
            check_row(row, name)
        questions = [
            self.processor.load(
                row_question(row), names=(f"chosen of {name}", f"rejected of {name}", f"condition of {name}")
            )
            for row, name in zip(rows, names, strict=True)
        ]
        ties = torch.tensor([bool(row.get("tie")) for row in rows])
        if self.uses_reference:
            swaps, batch = self._ask_about_pairs(rows, questions, names)
            labels = torch.tensor(swaps, dtype=torch.float)
        else:
            chosen = [replace(question, reference=None) for question in questions]
            rejected = [replace(question, sample=question.reference, reference=None) for question in questions]
            batch = self.processor.encode(chosen + rejected)
            labels = torch.ones(len(rows))
        # Labels come first: the Trainer takes the number of rows from the first tensor, and `input_ids` may have two per row.
        inputs = {"labels": torch.where(ties, 0.5, labels), **batch}
        if any(row.get("margin") is not None for row in rows):
            inputs["margin"] = torch.tensor([float(row.get("margin") or 0.0) for row in rows])
        return inputs

    def _ask_about_pairs(
        self, rows: list[Mapping[str, Any]], questions: list[Question], names: list[str]
    ) -> tuple[list[bool], BatchFeature]:
        """Whether the chosen image of each row is second, and the questions in this order, with targets."""
        swaps = [self._toss("", question) for question in questions]
        rationales: list[str | None] = [None] * len(rows)
        if self.with_rationales:
            rationales = [
                rationale_text({**row, "task": question.task}, swap)
                for row, question, swap in zip(rows, questions, swaps, strict=True)
            ]
        reasons_first = [
            rationale is not None and self._reasons_come_first(question)
            for rationale, question in zip(rationales, questions, strict=True)
        ]
        for rationale, first, name in zip(rationales, reasons_first, names, strict=True):
            if first and self.processor.split_reasons(str(rationale)) is not None:
                raise ValueError(
                    f"`rationale` of {name} contains {self.processor.prompt_texts['answer']!r}, which stands between "
                    "reasons and answer. Remove it from the text, or drop the row."
                )
        asked = [
            replace(question, reasons_first=first)
            if swap
            else replace(question, sample=question.reference, reference=question.sample, reasons_first=first)
            for question, swap, first in zip(questions, swaps, reasons_first, strict=True)
        ]
        batch = self.processor.encode(asked)
        if self.with_rationales:
            batch = self.processor.append_answers(batch, swaps, rationales, reasons_first)
        return swaps, batch

    def _reasons_come_first(self, question: Question) -> bool:
        if self.rationale_format == "mixed":
            return self._toss("format:", question)
        return self.rationale_format == "reasons_first"

    def _toss(self, purpose: str, question: Question) -> bool:
        """
        Order of a row (whether the chosen image is second), or its format: a function of seed, epoch and content, so that
        a resumed or sharded run sees the same.
        """
        seed = f"{purpose}{self.seed}:{int(self._epoch)}:{question.prompt}"
        digest = hashlib.blake2b(seed.encode(), digest_size=1)
        for clip in (question.sample, question.reference):
            digest.update(clip[0].resize((16, 16), Image.Resampling.NEAREST).tobytes())
        return bool(digest.digest()[0] & 1)
