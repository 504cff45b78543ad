"""What a judge learns to say: answers and reasons as targets after a question."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature

from .plain_text_rewarddance import PlainTextMixin


class TargetsMixin(PlainTextMixin):
    """What [`RewardDanceProcessor`] writes after a question, by its answer words and what opens the assistant's turn."""

    image_processor: Any
    prompt_texts: "dict[str, str]"
    yes_word: str
    no_word: str
    yes_token_id: int
    no_token_id: int
    _answer_space: str
    _answer_end: str
    _opened_turn: str
    _opened_turn_ids: "list[int]"

    @cached_property
    def _answer_phrase(self) -> str:
        """
        What stands between reasons and answer: the phrase, and a space or line break after which the answer is the same
        token as at the start of the assistant's turn.
        """
        phrase = self.prompt_texts["answer"].rstrip()
        found = []
        for join in (" ", "\n", ""):
            lead = f"{self._opened_turn}{self._answer_space}?{phrase}{join}"
            yes, no = self._token_ids([lead + self.yes_word, lead + self.no_word])
            if yes[:-1] == no[:-1] and (yes[-1], no[-1]) == (self.yes_token_id, self.no_token_id):
                return phrase + join
            found.append(self.tokenizer.convert_ids_to_tokens([yes[-1], no[-1]]))
        wanted = self.tokenizer.convert_ids_to_tokens([self.yes_token_id, self.no_token_id])
        raise ValueError(
            f"`prompt_texts['answer']` is {phrase!r}, after which the answers end in the tokens {found} (by what follows it: "
            f"space, line break, nothing), but must be the single tokens {wanted} that the model reads. Choose another phrase."
        )

    def _target_ids(
        self, answers: "Sequence[bool]", rationales: "Sequence[str | None]", reasons_first: "Sequence[bool]"
    ) -> "tuple[list[list[int]], list[int]]":
        """Tokens of targets, and which token of each is the answer."""
        given = [
            (rationale or "").strip() if first else rationale or ""
            for rationale, first in zip(rationales, reasons_first, strict=True)
        ]
        for rationale, first in zip(rationales, reasons_first, strict=True):
            if first and (rationale is None or self.split_reasons(rationale) is not None):
                got = "None" if rationale is None else f"a text with {self.prompt_texts['answer']!r} in it"
                raise ValueError(
                    f"`rationale` is {got}, but must be reasons that are followed by this phrase and the answer. Drop the row, "
                    "remove the phrase, or ask for the decision first."
                )
        plain = self._plain_texts((text, "rationale") for text in given if text)
        opened, num_opened = self._opened_turn + self._answer_space, len(self._opened_turn_ids)
        texts, up_to_answer = [], []
        for answer, text, first in zip(answers, given, reasons_first, strict=True):
            word, reasons = self.yes_word if answer else self.no_word, plain.get(text, "")
            if first:
                asked = opened + (reasons + self._answer_phrase if reasons else self._answer_phrase.lstrip()) + word
                up_to_answer.append(asked)
                texts.append(asked + self._answer_end)
            else:
                texts.append(opened + word + ("\n" + reasons + self._answer_end if reasons else ""))
        ids = self._token_ids([*texts, *up_to_answer])
        lengths = iter([len(found) for found in ids[len(texts) :]])
        starts = [next(lengths) - num_opened - 1 if first else 0 for first in reasons_first]
        return [found[num_opened:] for found in ids[: len(texts)]], starts

    def append_answers(
        self,
        batch: BatchFeature,
        answers: "list[bool]",
        rationales: "list[str | None]",
        reasons_first: "bool | list[bool]" = False,
    ) -> BatchFeature:
        r"""
        Append answers and rationales as training targets: the answer, then its reasons ("decision first", Section 3.2.1),
        or reasons, a fixed phrase (`prompt_texts["answer"]`) and the answer ("reasons first").

        Args:
            batch ([`~transformers.BatchFeature`]):
                Questions, as made by calling the processor.
            answers (`list[bool]`):
                Whether the answer is "yes", for each row.
            rationales (`list`):
                Reasons that follow the answer or precede it, or None for rows without any.
            reasons_first (`bool` or `list[bool]`, *optional*, defaults to `False`):
                Whether reasons precede the answer, for all rows or one each. Questions must have asked so.

        Returns:
            [`~transformers.BatchFeature`]: The batch with longer `input_ids`, and with `rationale_labels` and
            `answer_index`.

        Raises:
            `ValueError`: If lists differ in length, or `reasons_first` holds for a row whose rationale is None or contains
                the phrase, or a tokenizer after whose phrase the answer is another token than at the start of the turn.
        """
        batch_size, question_length = batch["input_ids"].shape
        formats = [reasons_first] * batch_size if isinstance(reasons_first, bool) else reasons_first
        for name, column in {"answers": answers, "rationales": rationales, "reasons_first": formats}.items():
            if len(column) != batch_size:
                raise ValueError(f"`{name}` has {len(column)} entries, but `batch` has {batch_size} rows.")
        found, starts = self._target_ids(answers, rationales, formats)
        targets = [torch.tensor(target) for target in found]
        ids = pad_sequence(targets, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        mask = pad_sequence([torch.ones_like(target) for target in targets], batch_first=True)
        labels = torch.where(mask.bool(), ids, -100)
        answer_starts = torch.tensor(starts)
        labels[torch.arange(batch_size), answer_starts] = -100  # the answer itself has its own loss

        appended = {"input_ids": ids, "attention_mask": mask}
        of_images = self.image_processor.model_input_names
        for name, values in batch.items():
            is_per_token = torch.is_tensor(values) and values.shape[:2] == (batch_size, question_length)
            if is_per_token and name not in of_images:
                # Targets are text, as the last token of the question is.
                more = appended.get(name, values[:, -1:].expand(-1, ids.shape[1], *values.shape[2:]))
                batch[name] = torch.cat([values, more.to(values)], dim=1)
        batch["rationale_labels"] = torch.nn.functional.pad(labels, (question_length, 0), value=-100)
        batch["answer_index"] = answer_starts + question_length - 1
        return batch

    def split_reasons(self, text: str) -> "str | None":
        """
        Extract the reasons from what a judge says that was asked for them first.

        Args:
            text (`str`):
                Text from the start of the judge's turn.

        Returns:
            `str` or `None`: What stands before the first phrase `prompt_texts["answer"]`, or None if the text does not reach
            an answer.
        """
        reasons, phrase, _ = f"\n{text.strip()}".partition(self.prompt_texts["answer"].rstrip())
        return reasons.strip() if phrase else None


__all__ = ["TargetsMixin"]
