"""How a judge is asked: wording, criteria, chat, answer tokens and targets; text from users stays text."""

import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature

from .plain_text_rewarddance import ControlTokens
from .question_rewarddance import Question, infer_task, marks_of


PROMPT_LAYOUTS = ("images_first", "text_first")

# Wording of the question. Saved with a checkpoint: a judge is asked as it was trained, whatever later versions say.
PROMPT_TEXTS = {
    "system": "You judge the output of image and video generators.",
    "condition": "Given first frame: ",
    "prompt": "Generation prompt: {prompt}",
    "criteria": "Criteria: {criteria}",
    "pairwise_question": "Is {noun} 2 better than {noun} 1 by these criteria? Answer yes or no.",
    "pointwise_question": "Is this a high-quality result by these criteria? Answer yes or no.",
    "pairwise_reasons_question": (
        'Is {noun} 2 better than {noun} 1 by these criteria? Give your reasons, then on a new line "Answer:" and yes or no.'
    ),
    "pointwise_reasons_question": (
        'Is this a high-quality result by these criteria? Give your reasons, then on a new line "Answer:" and yes or no.'
    ),
    "answer": "\nAnswer:",
    "image": "image",
    "video": "video",
    "first_frame": "{name}, {frame}: ",
    "frame": "{name}, {frame}: ",
    "frame_number": "frame {number}",
    "frame_time": "frame {number} at {time:.2f} s",
}

OVERALL = "overall"  # name of the criteria of a task among its dimensions
FOLDER = Path(__file__).parent / "criteria"


def read_criteria(folder: "str | os.PathLike" = FOLDER) -> "tuple[dict[str, str], dict[str, dict[str, str]]]":
    """
    Read the criteria of tasks from text files, one for each task. Those of this package are the example of their form.

    Args:
        folder (`str` or `os.PathLike`, *optional*):
            Folder with files `TASK.txt`. Defaults to that of this package.

    Returns:
        `tuple`: Criteria by task, and criteria by task and dimension: arguments `criteria` and `dimensions` of
        [`RewardDanceProcessor`].

    Raises:
        `ValueError`: If there are no such files, a paragraph has no name or no text, or a name is there twice.

    Example:

    ```python
    criteria, dimensions = read_criteria("my_criteria")
    processor = RewardDanceProcessor.from_pretrained("org/my-vlm", criteria=criteria, dimensions=dimensions)
    ```
    """
    files = sorted(Path(folder).glob("*.txt"))
    if not files:
        raise ValueError(f"`folder` {os.fspath(folder)!r} has no file `TASK.txt`, e.g. `text-to-image.txt`. Add one.")
    criteria, dimensions = {}, {}
    for file in files:
        named = _read_paragraphs(file)
        if OVERALL in named:
            criteria[file.stem] = named.pop(OVERALL)
        dimensions[file.stem] = named
    return criteria, dimensions


def _read_paragraphs(file: Path) -> "dict[str, str]":
    lines = file.read_text(encoding="utf-8").splitlines()
    paragraphs = "\n".join(line.strip() for line in lines if not line.startswith("#")).split("\n\n")
    named: "dict[str, str]" = {}
    for paragraph in filter(None, map(str.strip, paragraphs)):
        name, _, text = (part.strip() for part in " ".join(paragraph.split()).partition(":"))
        if not text or len(name.split()) != 1 or name in named:
            raise ValueError(
                f"{os.fspath(file)!r} has the paragraph {paragraph[:40]!r}, but each must be a name of its own in one word, a "
                f"colon and a text, e.g. '{OVERALL}: how well it shows the prompt'. Repair it."
            )
        named[name] = text
    return named


# Next to code that came with a checkpoint there are no text files: its processor finds what it was saved with.
CRITERIA, DIMENSIONS = read_criteria() if FOLDER.is_dir() else ({}, {})


def _turn(role: str, text: str) -> "dict[str, Any]":
    return {"role": role, "content": [{"type": "text", "text": text}]}


class PromptingMixin:
    """What [`RewardDanceProcessor`] writes: questions and their answers, with its tokenizer and chat template."""

    tokenizer: Any
    image_processor: Any
    vlm_processor: Any
    apply_chat_template: Any

    def _set_wording(
        self, prompt_layout: str, criteria: Any, dimensions: Any, prompt_texts: Any, yes_word: str, no_word: str
    ) -> None:
        """Check settings about words, and find the answer tokens."""
        if prompt_layout not in PROMPT_LAYOUTS:
            raise ValueError(f"`prompt_layout` is {prompt_layout!r}, but must be one of {PROMPT_LAYOUTS}.")
        unknown = sorted(set(prompt_texts or {}) - set(PROMPT_TEXTS))
        if unknown:
            raise ValueError(f"`prompt_texts` has the keys {unknown}, but only {sorted(PROMPT_TEXTS)} are used.")
        for name, placeholder in {"prompt": "{prompt}", "criteria": "{criteria}"}.items():
            text = (prompt_texts or {}).get(name, placeholder)
            if placeholder not in text and (text or name == "prompt"):
                raise ValueError(f"`prompt_texts[{name!r}]` is {text!r}, but must contain '{placeholder}'.")
        if not (prompt_texts or {}).get("answer", "?").strip():
            raise ValueError("`prompt_texts['answer']` is blank, but must be what stands between reasons and answer.")
        for task, named in (dimensions or {}).items():
            if not isinstance(named, dict):
                raise ValueError(
                    f"`dimensions[{task!r}]` is {named!r}, but must be a dict of criteria by name. Pass e.g. "
                    "`dimensions={'text-to-image': {'logo': 'whether the logo is there'}}`."
                )
        for name, word in {"yes_word": yes_word, "no_word": no_word}.items():
            if not word:
                raise ValueError(f"`{name}` is {word!r}, but must be a word.")
        self.prompt_layout = prompt_layout
        self.criteria = {**CRITERIA, **(criteria or {})}
        given = {**DIMENSIONS, **(dimensions or {})}
        self.dimensions = {task: {**DIMENSIONS.get(task, {}), **named} for task, named in given.items()}
        self.prompt_texts = {**PROMPT_TEXTS, **(prompt_texts or {})}
        self.yes_word = yes_word
        self.no_word = no_word

        self._read_assistant_turn()
        self.yes_token_id = self._find_answer_token("yes_word", yes_word)
        self.no_token_id = self._find_answer_token("no_word", no_word)
        if self.yes_token_id == self.no_token_id:
            raise ValueError(
                f"`yes_word` {yes_word!r} and `no_word` {no_word!r} both become token ID {self.yes_token_id}, but must be "
                "two different tokens. Choose other words."
            )

    def dimension_criteria(self, dimension: str, task: str = "text-to-image") -> str:
        """
        Look up the criteria of a named dimension, which `criteria` of a row or a call can be.

        Args:
            dimension (`str`):
                Name, e.g. `"alignment"`.
            task (`str`, *optional*, defaults to `"text-to-image"`):
                Task that it belongs to.

        Returns:
            `str`: Criteria.

        Raises:
            `ValueError`: If the task has no such dimension.
        """
        if not self.prompt_texts["criteria"]:
            raise ValueError(
                "`prompt_texts['criteria']` is empty, so the question holds no criteria, and all dimensions would be one. Pass a "
                "text with '{criteria}' to `RewardDanceProcessor.from_pretrained`."
            )
        if task not in self.dimensions:
            raise ValueError(
                f"`task` is {task!r}, but the processor has dimensions for {sorted(self.dimensions)} only. Pass `criteria=`."
            )
        if dimension not in self.dimensions[task]:
            raise ValueError(
                f"`dimension` is {dimension!r}, but the task {task!r} has {list(self.dimensions[task])} only. Choose one of them, "
                "or pass `criteria=`."
            )
        return self.dimensions[task][dimension]

    def write_question(self, question: Question) -> str:
        r"""
        Write one chat with the wrapped model's placeholder for each image: those of examples, condition, reference,
        sample. Examples are earlier turns of the chat: the same question, with the verdict as the judge's answer.

        Args:
            question ([`~rewarddance_hf.models.question_rewarddance.Question`]):
                What is asked, with clips that are loaded or at least opened.

        Returns:
            `str`: Text up to the answer, or to the reasons before it.

        Raises:
            `ValueError`: If its task has no criteria.
        """
        return self.apply_chat_template(self._messages(question), add_generation_prompt=True) + self._answer_lead

    def _write_turn(self, question: Question) -> "list[dict[str, str]]":
        """One question, as parts of a turn of the chat."""
        task = question.task or infer_task(question.sample, question.condition)
        criteria = question.criteria
        if criteria is None:
            if task not in self.criteria:
                raise ValueError(
                    f"`task` is {task!r}, but the processor has criteria for {sorted(self.criteria)} only. Pass `criteria=`."
                )
            criteria = self.criteria[task]
        texts, samples = self.prompt_texts, marks_of(question.sample)
        noun = texts["video" if task.endswith("video") or len(samples) > 1 else "image"]
        # JSON quotes the prompt and escapes its quotes and line breaks: its end cannot be faked.
        quoted = json.dumps(self.plain_text(question.prompt, "prompt"), ensure_ascii=False)
        statement = texts["prompt"].format(prompt=quoted)
        if texts["criteria"]:
            statement += "\n" + texts["criteria"].format(criteria=self.plain_text(criteria, "criteria"))
        paradigm = "pointwise" if question.reference is None else "pairwise"
        kind = "reasons_question" if question.reasons_first else "question"
        asked = texts[f"{paradigm}_{kind}"].format(noun=noun)

        label = noun.capitalize()
        if question.reference is None:
            heads = self._frame_heads(label, samples)
        else:
            references = marks_of(question.reference)
            heads = [*self._frame_heads(f"{label} 1", references), *self._frame_heads(f"{label} 2", samples)]
        if question.condition is not None:
            heads = [texts["condition"], *heads]
        content: list[dict[str, str]] = []
        for head in heads:
            content += [{"type": "text", "text": ("\n" if content else "") + head}, {"type": "image"}]
        if self.prompt_layout == "images_first":
            content = [*content, {"type": "text", "text": f"\n{statement}\n{asked}"}]
        else:
            content = [{"type": "text", "text": f"{statement}\n"}, *content, {"type": "text", "text": f"\n{asked}"}]
        return content

    def _frame_heads(self, name: str, frames: "tuple[tuple[int, float | None], ...]") -> "list[str]":
        """What introduces each frame."""
        if len(frames) == 1:
            return [f"{name}: "]
        heads: "list[str]" = []
        for number, time in frames:
            kind = "frame_number" if time is None else "frame_time"
            frame = self.prompt_texts[kind].format(number=number, time=time)
            heads.append(self.prompt_texts["frame" if heads else "first_frame"].format(name=name, frame=frame))
        return heads

    def _messages(self, question: Question) -> "list[dict[str, Any]]":
        """Chat with examples as earlier turns."""
        messages: "list[dict[str, Any]]" = []
        if self.prompt_texts["system"]:
            messages.append(_turn("system", self.prompt_texts["system"]))
        for example in question.examples:
            messages.append({"role": "user", "content": self._write_turn(example.question)})
            messages.append(_turn("assistant", self.yes_word if example.verdict else self.no_word))
        return [*messages, {"role": "user", "content": self._write_turn(question)}]

    def _read_assistant_turn(self) -> None:
        """
        Find how the chat template begins and ends the assistant's turn, so that the answer stands where the model would
        write it: "Assistant:" is followed by " yes", and some templates open and close an empty thought before it.
        """
        chat = [_turn("system", self.prompt_texts["system"])] if self.prompt_texts["system"] else []
        chat.append(_turn("user", "?"))
        opened = self.apply_chat_template(chat, add_generation_prompt=True)
        answered = self.apply_chat_template([*chat, _turn("assistant", self.yes_word)])
        lead, _, end = answered.removeprefix(opened).partition(self.yes_word)
        if not answered.startswith(opened) or self.yes_word not in answered[len(opened) :]:
            lead, end = "", ""
        self._answer_lead = lead.removesuffix(" ")
        self._answer_space = " " if lead.endswith(" ") else ""
        self._answer_end = end or self.tokenizer.eos_token or ""
        self._opened_turn = opened + self._answer_lead
        self._opened_turn_ids = self._token_ids(self._opened_turn)

    def _token_ids(self, text: str) -> "list[int]":
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _find_answer_token(self, name: str, word: str) -> int:
        ids = self._token_ids(self._opened_turn + self._answer_space + word)
        num_opened = len(self._opened_turn_ids)
        if ids[:num_opened] != self._opened_turn_ids or len(ids) != num_opened + 1:
            raise ValueError(
                f"`{name}` is {word!r}, which becomes the tokens {self.tokenizer.convert_ids_to_tokens(ids[num_opened:])} at "
                "the start of the assistant's turn, but must be a single token. Choose another word, e.g. 'Yes' or 'No'."
            )
        if ids[-1] == self.tokenizer.unk_token_id:
            raise ValueError(f"`{name}` is {word!r}, which the tokenizer does not know. Choose another word.")
        return ids[-1]

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
            yes, no = self._token_ids(lead + self.yes_word), self._token_ids(lead + self.no_word)
            if yes[:-1] == no[:-1] and (yes[-1], no[-1]) == (self.yes_token_id, self.no_token_id):
                return phrase + join
            found.append(self.tokenizer.convert_ids_to_tokens([yes[-1], no[-1]]))
        wanted = self.tokenizer.convert_ids_to_tokens([self.yes_token_id, self.no_token_id])
        raise ValueError(
            f"`prompt_texts['answer']` is {phrase!r}, after which the answers end in the tokens {found} (by what follows it: "
            f"space, line break, nothing), but must be the single tokens {wanted} that the model reads. Choose another phrase."
        )

    def _target_ids(self, answer: bool, rationale: "str | None", reasons_first: bool) -> "tuple[list[int], int]":
        """Tokens of a target, and which of them is the answer."""
        opened, num_opened = self._opened_turn + self._answer_space, len(self._opened_turn_ids)
        word = self.yes_word if answer else self.no_word
        if not reasons_first:
            text = opened + word
            if rationale:
                text += "\n" + self.plain_text(rationale, "rationale") + self._answer_end
            return self._token_ids(text)[num_opened:], 0
        if rationale is None or self.split_reasons(rationale) is not None:
            got = "None" if rationale is None else f"a text with {self.prompt_texts['answer']!r} in it"
            raise ValueError(
                f"`rationale` is {got}, but must be reasons that are followed by this phrase and the answer. Drop the row, "
                "remove the phrase, or ask for the decision first."
            )
        reasons = self.plain_text(rationale.strip(), "rationale")
        text = opened + (reasons + self._answer_phrase if reasons else self._answer_phrase.lstrip()) + word
        return self._token_ids(text + self._answer_end)[num_opened:], len(self._token_ids(text)) - num_opened - 1

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
        rows = zip(answers, rationales, formats, strict=True)
        targets, starts = zip(*(self._target_ids(*row) for row in rows), strict=True)
        targets = [torch.tensor(target) for target in targets]
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

    def plain_text(self, text: str, name: str = "text") -> str:
        """
        Make sure that text from users stays text: spellings of special tokens and image placeholders are split by a
        zero-width space.

        Args:
            text (`str`):
                Text from users.
            name (`str`, *optional*, defaults to `"text"`):
                Name of the text in error messages.

        Returns:
            `str`: Text in which the tokenizer finds no special token.

        Raises:
            `ValueError`: If a special token remains, which happens with tokenizers that normalize text first, or the text
                is no valid Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"`{name}` is no valid text ({error}). Repair or drop it; it may be cut in an emoji."
            ) from error
        controls, token_ids = self._control_tokens
        text = controls.split(text)
        found = token_ids.intersection(self._token_ids(text))
        if found:
            raise ValueError(
                f"`{name}` contains the special tokens {self.tokenizer.convert_ids_to_tokens(sorted(found))}, which cannot be "
                "written as plain text. Remove them."
            )
        return text

    @cached_property
    def _control_tokens(self) -> "tuple[ControlTokens, set[int]]":
        """Spellings and IDs of tokens that text from users must not contain."""
        spellings = {token for token in self.tokenizer.get_added_vocab() if len(token) > 1 and token.strip(" \n\t▁")}
        spellings |= {token for token in self.tokenizer.all_special_tokens if len(token) > 1}
        names = ("image_token", "video_token", "boi_token", "audio_token")
        spellings |= {str(token) for name in names if (token := getattr(self.vlm_processor, name, None))}
        token_ids = set(self.tokenizer.convert_tokens_to_ids(sorted(spellings)))
        # A character that the tokenizer does not know controls nothing, unless its token also ends texts.
        if self.tokenizer.unk_token not in (self.tokenizer.bos_token, self.tokenizer.eos_token):
            token_ids.discard(self.tokenizer.unk_token_id)
        return ControlTokens(spellings), token_ids


__all__ = ["CRITERIA", "DIMENSIONS", "PROMPT_TEXTS", "PromptingMixin", "read_criteria"]
