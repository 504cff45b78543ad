"""Batches of what a base model of shapes is taught: questions about images that do not see each other."""

from typing import Any

import torch

from .models import IMAGE_SEQ_LENGTH


class QuestionCollator:
    """
    Turn rows of questions about images into batches in which each question sees the opening and itself only.

    Every question stands at the positions right after the opening, as if it were the only one. A row holds `images`, `opening`
    (`str`) and `questions` (pairs of question and answer). `"{}"` in opening or question stands for the next image.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        tokenizer = self.processor.tokenizer
        context = tokenizer.context_image_token * IMAGE_SEQ_LENGTH
        self.image = f"{tokenizer.start_image_token}{context}{tokenizer.end_image_token}"
        self.pad_token_id = tokenizer.pad_token_id
        self._ids: dict[str, list[int]] = {}

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        columns: dict[str, list[torch.Tensor]] = {"input_ids": [], "labels": [], "position_ids": [], "parts": []}
        for row in rows:
            opening = self._encode("<|user|>" + row["opening"])
            ids, labels = list(opening), [-100] * len(opening)
            positions, parts = list(range(len(opening))), [0] * len(opening)
            for number, (question, answer) in enumerate(row["questions"], start=1):
                asked, answered = self._encode(f"{question}<|end|><|assistant|>"), self._encode(f"{answer}<|end|>")
                ids += asked + answered
                labels += [-100] * len(asked) + answered
                positions += range(len(opening), len(opening) + len(asked) + len(answered))
                parts += [number] * (len(asked) + len(answered))
            for name, values in zip(columns, (ids, labels, positions, parts), strict=True):
                columns[name].append(torch.tensor(values))
        fillers = {"input_ids": self.pad_token_id, "labels": -100, "position_ids": 0, "parts": -1}
        batch = {
            name: torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fillers[name])
            for name, values in columns.items()
        }
        owners = batch.pop("parts")
        seen = (owners[:, None, :] == owners[:, :, None]) | (owners == 0)[:, None, :]
        batch["attention_mask"] = seen.tril()[:, None]
        images = [image for row in rows for image in row["images"]]
        pixels = self.processor.image_processor(images, return_tensors="pt", crop_to_patches=False)
        return {**batch, "pixel_values": pixels["pixel_values"]}

    def _encode(self, text: str) -> list[int]:
        if text not in self._ids:
            written = text.replace("{}", self.image)
            self._ids[text] = self.processor.tokenizer(written, add_special_tokens=False)["input_ids"]
        return self._ids[text]
