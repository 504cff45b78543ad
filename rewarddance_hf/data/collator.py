"""Collator: preference rows become batches of questions, in an order that a judge cannot learn."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image

from ..models import RewardDanceProcessor
from ..models.configuration_rewarddance import PARADIGMS
from ..models.media_rewarddance import load_image
from .preference import check_row, rationale_text


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
            `"decision_first"` appends the answer, then its reasons; `"reasons_first"` asks for reasons first, and appends
            the answer after them; `"mixed"` draws one of both for each row and epoch, in the way of the order. Rows without
            a rationale are always asked for the decision only. Matters with `with_rationales` only.

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
        if paradigm not in PARADIGMS:
            raise ValueError(f"`paradigm` is {paradigm!r}, but must be one of {PARADIGMS}.")
        if with_rationales and paradigm != "pairwise":
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
        Draw other orders than in the epochs before.

        Args:
            epoch (`int`):
                Index of the epoch.
        """
        self._epoch.fill_(epoch)

    def __call__(self, rows: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        names = [str(row.get("row", f"row {i} of the batch")) for i, row in enumerate(rows)]
        for row, name in zip(rows, names, strict=True):
            check_row(row, name)
        tasks = [row.get("task") or "text-to-image" for row in rows]
        chosen, rejected = (
            [
                self.processor.load_frames(row[column], f"{column} of {name}", task)
                for row, name, task in zip(rows, names, tasks, strict=True)
            ]
            for column in ("chosen", "rejected")
        )
        conditions = [
            None if row.get("condition") is None else load_image(row["condition"], f"condition of {name}")
            for row, name in zip(rows, names, strict=True)
        ]
        prompts = [row["prompt"] for row in rows]
        criteria = [row.get("criteria") for row in rows]
        ties = torch.tensor([bool(row.get("tie")) for row in rows])

        if self.paradigm == "pairwise":
            swaps = [self._toss("", *row) for row in zip(prompts, chosen, rejected, strict=True)]
            pairs = [(r, c) if swap else (c, r) for c, r, swap in zip(chosen, rejected, swaps, strict=True)]
            references, samples = map(list, zip(*pairs, strict=True))
            rationales: list[str | None] = [None] * len(rows)
            if self.with_rationales:
                rationales = [rationale_text(row, swap) for row, swap in zip(rows, swaps, strict=True)]
            reasons_first = [
                rationale is not None and self._reasons_come_first(*row)
                for rationale, *row in zip(rationales, prompts, chosen, rejected, strict=True)
            ]
            for rationale, first, name in zip(rationales, reasons_first, names, strict=True):
                if first and self.processor.split_reasons(str(rationale)) is not None:
                    raise ValueError(
                        f"`rationale` of {name} contains {self.processor.prompt_texts['answer']!r}, which stands between "
                        "reasons and answer. Remove it from the text, or drop the row."
                    )
            batch = self.processor(
                samples,
                prompts,
                references,
                conditions,
                task=tasks,
                criteria=criteria,
                reasons_first=reasons_first,
            )
            if self.with_rationales:
                batch = self.processor.append_answers(batch, swaps, rationales, reasons_first)
            labels = torch.tensor(swaps, dtype=torch.float)
        else:
            batch = self.processor(
                chosen + rejected, prompts * 2, conditions=conditions * 2, task=tasks * 2, criteria=criteria * 2
            )
            labels = torch.ones(len(rows))
        # Labels come first: the Trainer takes the number of rows from the first tensor, and `input_ids` may have two per row.
        inputs = {"labels": torch.where(ties, 0.5, labels), **batch}
        if any(row.get("margin") is not None for row in rows):
            inputs["margin"] = torch.tensor([float(row.get("margin") or 0.0) for row in rows])
        return inputs

    def _reasons_come_first(self, prompt: str, chosen: list[Image.Image], rejected: list[Image.Image]) -> bool:
        if self.rationale_format == "mixed":
            return self._toss("format:", prompt, chosen, rejected)
        return self.rationale_format == "reasons_first"

    def _toss(self, purpose: str, prompt: str, chosen: list[Image.Image], rejected: list[Image.Image]) -> bool:
        """
        Order of a row (whether the chosen image is second), or its format: a function of seed, epoch and content, so that
        a resumed or sharded run sees the same.
        """
        digest = hashlib.blake2b(f"{purpose}{self.seed}:{int(self._epoch)}:{prompt}".encode(), digest_size=1)
        for frame in (chosen[0], rejected[0]):
            digest.update(frame.resize((16, 16), Image.Resampling.NEAREST).tobytes())
        return bool(digest.digest()[0] & 1)
