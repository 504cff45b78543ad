"""Collator: preference rows become batches of questions, in an order that a judge cannot learn."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image

from ..models import RewardDanceProcessor
from ..models.configuration_rewarddance import PARADIGMS
from ..models.processing_rewarddance import load_picture
from .preference import check_row, rationale_text


class DataCollatorForRewardDance:
    r"""
    Turn preference rows into batches for [`RewardDanceForYesScoring`].

    Pairwise: one question per row. Which of the two pictures comes second is drawn at random from seed, epoch and the
    row's content (public datasets store the winner first; a judge trained without this learns the position).
    Pointwise and regressive: two questions per row, all chosen samples first, then all rejected ones.

    Args:
        processor ([`RewardDanceProcessor`]):
            Processor of the judge.
        paradigm (`str`, *optional*, defaults to `"pairwise"`):
            Training variant: `"pairwise"`, `"pointwise"` or `"regressive"`.
        with_rationales (`bool`, *optional*, defaults to `False`):
            Whether to append answers and the rows' rationales as targets ("decision first"). Pairwise only.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order.

    Inputs:
        Rows as described by [`~rewarddance_hf.data.preference.check_row`].

    Returns:
        `dict[str, torch.Tensor]`: Inputs of the model, and
        - `labels` of shape `(rows,)`: pairwise: target probability of "yes", 1 if the chosen picture is image 2, 0 if it
          is image 1, 0.5 for a tie; else: target probability that the chosen sample is better, 1, or 0.5 for a tie;
        - `margin` of shape `(rows,)`, if any row has one.

    Raises:
        `ValueError`: If a row lacks a column, or a picture cannot be read; the message names the row.
    """

    def __init__(
        self,
        processor: RewardDanceProcessor,
        paradigm: str = "pairwise",
        with_rationales: bool = False,
        seed: int = 0,
    ) -> None:
        if paradigm not in PARADIGMS:
            raise ValueError(f"`paradigm` is {paradigm!r}, but must be one of {PARADIGMS}.")
        if with_rationales and paradigm != "pairwise":
            raise ValueError(
                f"`with_rationales` is True, but the {paradigm} paradigm has no rationales. Use `paradigm='pairwise'`."
            )
        self.processor = processor
        self.paradigm = paradigm
        self.with_rationales = with_rationales
        self.seed = seed
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
            None if row.get("condition") is None else load_picture(row["condition"], f"condition of {name}")
            for row, name in zip(rows, names, strict=True)
        ]
        prompts = [row["prompt"] for row in rows]
        criteria = [row.get("criteria") for row in rows]
        ties = torch.tensor([bool(row.get("tie")) for row in rows])

        if self.paradigm == "pairwise":
            swaps = [self._chosen_is_second(*row) for row in zip(prompts, chosen, rejected, strict=True)]
            pairs = [(r, c) if swap else (c, r) for c, r, swap in zip(chosen, rejected, swaps, strict=True)]
            references, samples = map(list, zip(*pairs, strict=True))
            batch = self.processor(samples, prompts, references, conditions, task=tasks, criteria=criteria)
            if self.with_rationales:
                rationales = [rationale_text(row, swap) for row, swap in zip(rows, swaps, strict=True)]
                batch = self.processor.append_answers(batch, swaps, rationales)
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

    def _chosen_is_second(self, prompt: str, chosen: list[Image.Image], rejected: list[Image.Image]) -> bool:
        """Order of a row: a function of seed, epoch and content, so that a resumed or sharded run sees the same."""
        digest = hashlib.blake2b(f"{self.seed}:{int(self._epoch)}:{prompt}".encode(), digest_size=1)
        for frame in (chosen[0], rejected[0]):
            digest.update(frame.resize((16, 16), Image.Resampling.NEAREST).tobytes())
        return bool(digest.digest()[0] & 1)
