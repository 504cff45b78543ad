"""How a judge is asked: wording, criteria, chat and answer tokens; text from users stays text."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .chats_rewarddance import render_alike
from .question_rewarddance import Question, marks_of
from .targets_rewarddance import TargetsMixin
from .tasks_rewarddance import infer_task, task_of


PROMPT_LAYOUTS = ("images_first", "text_first", "text_after_each")

# Wording of the question. Saved with a checkpoint: a judge is asked as it was trained, whatever later versions say.
PROMPT_TEXTS = {
    "system": "You judge the output of image and video generators.",
    "condition": "Given first frame: ",
    "source_image": "Source image: ",
    "prompt": "Generation prompt: {prompt}",
    "instruction": "Editing instruction: {prompt}",
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


def _quoted(prompt: str) -> str:
    # JSON quotes the prompt and escapes its quotes and line breaks: its end cannot be faked.
    return json.dumps(prompt, ensure_ascii=False)


class PromptingMixin(TargetsMixin):
    """What [`RewardDanceProcessor`] writes: questions and their answers, with its tokenizer and chat template."""

    chat_template: Any
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
        placeholders = {"prompt": "{prompt}", "instruction": "{prompt}", "criteria": "{criteria}"}
        for name, placeholder in placeholders.items():
            text = (prompt_texts or {}).get(name, placeholder)
            if placeholder not in text and (text or name != "criteria"):
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
        return self.write_questions([question])[0]

    def write_questions(self, questions: "Sequence[Question]") -> "list[str]":
        """
        Write several chats as [`~PromptingMixin.write_question`] writes one. Texts from users are tokenized in one call, and
        questions that differ in their prompts alone share what the chat template makes of the rest.
        """
        plain = self._plain_parts(questions)
        alike: "dict[Any, list[int]]" = {}
        for i, question in enumerate(questions):
            alike.setdefault(question.asked[1:], []).append(i)
        chats = [""] * len(questions)
        for rows in alike.values():
            one = questions[rows[0]]
            prompts = [_quoted(plain[questions[i].prompt]) for i in rows]

            def render(prompt: str, one: Question = one) -> str:
                messages = self._messages(one, plain, prompt)
                return self.apply_chat_template(messages, add_generation_prompt=True)

            for i, chat in zip(rows, render_alike(render, prompts, self.chat_template), strict=True):
                chats[i] = chat + self._answer_lead
        return chats

    def _plain_parts(self, questions: "Sequence[Question]") -> "dict[str, str]":
        """All texts from users in questions and their examples, made plain."""
        named: "list[tuple[str, str]]" = []
        for question in questions:
            for asked in (*(example.question for example in question.examples), question):
                named.append((asked.prompt, "prompt"))
                criteria = self._criteria(asked)
                if self.prompt_texts["criteria"]:
                    named.append((criteria, "criteria"))
        return self._plain_texts(named)

    def _criteria(self, question: Question) -> str:
        """Criteria that a question states."""
        if question.criteria is not None:
            return question.criteria
        task = question.task or infer_task(question.sample, question.condition)
        if task not in self.criteria:
            raise ValueError(
                f"`task` is {task!r}, but the processor has criteria for {sorted(self.criteria)} only. Pass `criteria=`."
            )
        return self.criteria[task]

    def _write_turn(self, question: Question, plain: "dict[str, str]", prompt: str) -> "list[dict[str, str]]":
        """One question, as parts of a turn of the chat, with a quoted prompt."""
        task = task_of(question.task or infer_task(question.sample, question.condition))
        texts, samples = self.prompt_texts, marks_of(question.sample)
        noun = texts["video" if task.is_video or len(samples) > 1 else "image"]
        statement = texts[task.prompt_text].format(prompt=prompt)
        if texts["criteria"]:
            statement += "\n" + texts["criteria"].format(criteria=plain[self._criteria(question)])
        paradigm = "pointwise" if question.reference is None else "pairwise"
        kind = "reasons_question" if question.reasons_first else "question"
        asked = texts[f"{paradigm}_{kind}"].format(noun=noun)

        label = noun.capitalize()
        sample_heads = self._frame_heads(label if question.reference is None else f"{label} 2", samples)
        heads = [] if question.condition is None else [texts[task.condition_text]]
        if question.reference is not None:
            heads += self._frame_heads(f"{label} 1", marks_of(question.reference))
            if self.prompt_layout == "text_after_each":
                sample_heads = [f"{statement}\n{sample_heads[0]}", *sample_heads[1:]]
        content: list[dict[str, str]] = []
        for head in [*heads, *sample_heads]:
            content += [{"type": "text", "text": ("\n" if content else "") + head}, {"type": "image"}]
        if self.prompt_layout == "text_first":
            content = [{"type": "text", "text": f"{statement}\n"}, *content, {"type": "text", "text": f"\n{asked}"}]
        else:
            content = [*content, {"type": "text", "text": f"\n{statement}\n{asked}"}]
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

    def _chat(self, question: Question) -> "list[dict[str, Any]]":
        """Messages of one question."""
        plain = self._plain_parts([question])
        return self._messages(question, plain, _quoted(plain[question.prompt]))

    def _messages(self, question: Question, plain: "dict[str, str]", prompt: str) -> "list[dict[str, Any]]":
        """Chat with examples as earlier turns, by plain texts and the quoted prompt of the question."""
        messages: "list[dict[str, Any]]" = []
        if self.prompt_texts["system"]:
            messages.append(_turn("system", self.prompt_texts["system"]))
        for example in question.examples:
            shown = example.question
            content = self._write_turn(shown, plain, _quoted(plain[shown.prompt]))
            messages.append({"role": "user", "content": content})
            messages.append(_turn("assistant", self.yes_word if example.verdict else self.no_word))
        return [*messages, {"role": "user", "content": self._write_turn(question, plain, prompt)}]

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
        (self._opened_turn_ids,) = self._token_ids([self._opened_turn])

    def _find_answer_token(self, name: str, word: str) -> int:
        (ids,) = self._token_ids([self._opened_turn + self._answer_space + word])
        num_opened = len(self._opened_turn_ids)
        if ids[:num_opened] != self._opened_turn_ids or len(ids) != num_opened + 1:
            raise ValueError(
                f"`{name}` is {word!r}, which becomes the tokens {self.tokenizer.convert_ids_to_tokens(ids[num_opened:])} at "
                "the start of the assistant's turn, but must be a single token. Choose another word, e.g. 'Yes' or 'No'."
            )
        if ids[-1] == self.tokenizer.unk_token_id:
            raise ValueError(f"`{name}` is {word!r}, which the tokenizer does not know. Choose another word.")
        return ids[-1]


__all__ = ["CRITERIA", "DIMENSIONS", "PROMPT_TEXTS", "PromptingMixin", "read_criteria"]
