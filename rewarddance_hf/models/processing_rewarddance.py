"""RewardDance processor: images, prompt and criteria become the question that a vision-language model answers."""

import inspect
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.utils import is_torchvision_available, logging

from .criteria_rewarddance import CRITERIA, DIMENSIONS
from .media_rewarddance import load_frames, load_image, read_clip
from .pixels_rewarddance import preprocess_with_gradient
from .question_rewarddance import Example, Question, infer_task, marks_of, parse_example
from .video_rewarddance import Clip, ClipReader, check_sampling, open_clip
from .vlm_processor_rewarddance import image_only_processor


logger = logging.get_logger(__name__)

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

# Splits the spelling of a special token without showing.
ZERO_WIDTH_SPACE = "\u200b"


class RewardDanceProcessor(ProcessorMixin):
    r"""
    Turn images, prompts and criteria into inputs of [`RewardDanceForYesScoring`], with the processor of any
    vision-language model inside.

    Tensors that require a gradient get one: `pixel_values` are equal to those of the same image rounded to 8 bits, and
    the gradient passes through as if nothing were rounded.

    `from_pretrained` takes a RewardDance checkpoint or that of any image-text-to-text model of transformers. No part of
    it needs torchvision as long as the wrapped model has a PIL image processor.

    Args:
        image_processor (`BaseImageProcessor`):
            Image processor of the wrapped model.
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer of the wrapped model. Set to pad on the left.
        chat_template (`str`, *optional*, defaults to that of `tokenizer`):
            Chat template of the wrapped model.
        vlm_processor_class (`str`):
            Name of the processor class of the wrapped model, e.g. `"InternVLProcessor"`.
        vlm_processor_kwargs (`dict`, *optional*):
            Further arguments of that class, e.g. `{"image_seq_length": 256}`.
        vlm_images_kwargs (`dict`, *optional*):
            Arguments for its image processor at each call, e.g. `{"crop_to_patches": False}`, with which InternVL sees
            an image as 256 tokens without tiles.
        prompt_layout (`str`, *optional*, defaults to `"images_first"`):
            `"images_first"` asks as in Figure 3 of the paper; `"text_first"` puts prompt and criteria before images, so
            that samples of a prompt share a longer prefix.
        criteria (`dict[str, str]`, *optional*):
            Criteria by task, in place of or beside the default ones of `"text-to-image"`, `"text-to-video"` and
            `"image-to-video"` (Section 3.2.1), which are in text files beside this module.
        dimensions (`dict[str, dict[str, str]]`, *optional*):
            Criteria by task and name of a dimension, in place of or beside the default ones: `"alignment"`, `"counting"`,
            `"binding"`, `"relations"`, `"text"`, `"aesthetics"` and `"structure"`; for videos also `"motion"`,
            `"consistency"` and `"physics"`; for those with a given first frame also `"faithfulness"`.
        prompt_texts (`dict[str, str]`, *optional*):
            Wording of the question, in place of the default one.
        num_frames (`int`, *optional*):
            Number of frames that are taken of a clip, at equal distances. By default all are, up to `max_frames`.
        fps (`float`, *optional*):
            Frames that are taken for each second of a clip, in place of `num_frames`. Lists and tensors have no times: pass
            them as [`~rewarddance_hf.models.video_rewarddance.Clip`] then.
        max_frames (`int`, *optional*, defaults to `16`):
            Largest number of frames of a clip. Of longer ones so many are taken, at equal distances.
        max_clip_tokens (`int`, *optional*):
            Largest number of tokens for the frames of a clip. Of clips that need more, fewer frames are taken.
        yes_word (`str`, *optional*, defaults to `"yes"`):
            Answer for a better sample. Must be a single token at the start of the assistant's turn.
        no_word (`str`, *optional*, defaults to `"no"`):
            Answer for a sample that is not better.

    Raises:
        `ValueError`: If there is no chat template, an argument has none of the values above, or an answer word is not
            a single token of its own.

    Example:

    ```python
    processor = RewardDanceProcessor.from_pretrained("OpenGVLab/InternVL3_5-2B-HF")
    batch = processor(images=[sample], prompts=["a red circle"], references=[reference])
    ```
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: "str | dict[str, str] | None" = None,
        vlm_processor_class: "str | None" = None,
        vlm_processor_kwargs: "dict[str, Any] | None" = None,
        vlm_images_kwargs: "dict[str, Any] | None" = None,
        prompt_layout: str = "images_first",
        criteria: "dict[str, str] | None" = None,
        dimensions: "dict[str, dict[str, str]] | None" = None,
        prompt_texts: "dict[str, str] | None" = None,
        num_frames: "int | None" = None,
        fps: "float | None" = None,
        max_frames: "int | None" = 16,
        max_clip_tokens: "int | None" = None,
        yes_word: str = "yes",
        no_word: str = "no",
    ) -> None:
        chat_template = chat_template or tokenizer.chat_template
        if isinstance(chat_template, dict):
            chat_template = chat_template["default"]
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        if not isinstance(chat_template, str):
            raise ValueError(
                f"`chat_template` is None and `{vlm_processor_class}` has none, but the judge is asked in a chat. Pass "
                "`chat_template=`, or start from an instruction-tuned checkpoint."
            )
        if not hasattr(transformers, str(vlm_processor_class)):
            raise ValueError(
                f"`vlm_processor_class` is {vlm_processor_class!r}, but must be the name of a processor class of "
                "transformers, e.g. 'InternVLProcessor'. Load the processor with `from_pretrained`, which finds it."
            )
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
        check_sampling(num_frames, fps, max_frames)
        if max_clip_tokens is not None and max_clip_tokens < 1:
            raise ValueError(
                f"`max_clip_tokens` is {max_clip_tokens}, but must be a positive number of tokens, or None."
            )
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.vlm_processor_class = vlm_processor_class
        self.vlm_processor_kwargs = vlm_processor_kwargs or {}
        self.vlm_images_kwargs = vlm_images_kwargs or {}
        self.prompt_layout = prompt_layout
        self.criteria = {**CRITERIA, **(criteria or {})}
        given = dimensions or {}
        self.dimensions = {
            task: {**DIMENSIONS.get(task, {}), **given.get(task, {})} for task in {**DIMENSIONS, **given}
        }
        self.prompt_texts = {**PROMPT_TEXTS, **(prompt_texts or {})}
        self.num_frames = num_frames
        self.fps = fps
        self.max_frames = max_frames
        self.max_clip_tokens = max_clip_tokens
        self.yes_word = yes_word
        self.no_word = no_word
        self._frame_tokens: dict[tuple[int, int], int] = {}

        self._read_assistant_turn()
        self.yes_token_id = self._find_answer_token("yes_word", yes_word)
        self.no_token_id = self._find_answer_token("no_word", no_word)
        if self.yes_token_id == self.no_token_id:
            raise ValueError(
                f"`yes_word` {yes_word!r} and `no_word` {no_word!r} both become token ID {self.yes_token_id}, but must be "
                "two different tokens. Choose other words."
            )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, backend: "str | None" = None, **kwargs: Any
    ) -> "RewardDanceProcessor":
        """
        Load the processor of a RewardDance checkpoint, or wrap that of a plain vision-language model.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                Repository ID on the Hub or local folder.
            backend (`str`, *optional*):
                Image processor to use: `"pil"` or `"torchvision"`, whose pixels differ slightly. Defaults to the one
                that the RewardDance checkpoint was saved with, and to `"pil"` for other checkpoints.
            kwargs:
                Arguments of this class, in place of saved ones, and `revision`, `token`, `cache_dir`, ... of the Hub.

        Returns:
            [`RewardDanceProcessor`]
        """
        settings = {
            name: kwargs.pop(name) for name in list(inspect.signature(cls.__init__).parameters) if name in kwargs
        }
        saved, _ = cls.get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if "vlm_processor_class" not in saved:
            saved = cls._wrap_saved(saved, pretrained_model_name_or_path, **kwargs)
        if backend is None:
            backend = saved.get("image_backend", "pil")
            if backend == "torchvision" and not is_torchvision_available():
                backend = "pil"
                logger.warning(
                    f"{str(pretrained_model_name_or_path)!r} was trained with the torchvision image processor, but torchvision "
                    "is not installed: its PIL counterpart is used, and scores may differ slightly. Install torchvision, or "
                    'pass `backend="pil"` to silence this.'
                )
        names = inspect.signature(cls.__init__).parameters
        return cls(
            image_processor=AutoImageProcessor.from_pretrained(
                pretrained_model_name_or_path, backend=backend, **kwargs
            ),
            tokenizer=AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs),
            **{
                **{k: v for k, v in saved.items() if k in names and k not in ("image_processor", "tokenizer")},
                **settings,
            },
        )

    @staticmethod
    def _wrap_saved(saved: "dict[str, Any]", path: Any, **kwargs: Any) -> "dict[str, Any]":
        """Settings for the checkpoint of a plain vision-language model."""
        processor_class = saved.get("processor_class")
        if processor_class is None:  # older repositories name it by model type only
            from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

            model_type = AutoConfig.from_pretrained(path, **kwargs).model_type
            processor_class = PROCESSOR_MAPPING_NAMES.get(model_type)
            if processor_class is None:
                raise ValueError(
                    f"{str(path)!r} is a {model_type!r} checkpoint without a processor, but a judge needs that of a "
                    "vision-language model. Start from one, e.g. `OpenGVLab/InternVL3_5-2B-HF`."
                )
        parts = ("processor_class", "auto_map", "chat_template")
        return {
            "vlm_processor_class": processor_class,
            "vlm_processor_kwargs": {
                k: v
                for k, v in saved.items()
                if k not in parts and not k.endswith(("processor", "extractor", "tokenizer"))
            },
            "chat_template": saved.get("chat_template"),
        }

    @cached_property
    def vlm_processor(self) -> ProcessorMixin:
        """Processor of the wrapped model, without video and audio parts."""
        processor_class = image_only_processor(getattr(transformers, self.vlm_processor_class))
        accepted = inspect.signature(processor_class.__init__).parameters
        return processor_class(
            image_processor=self.image_processor,
            tokenizer=self.tokenizer,
            chat_template=self.chat_template,
            **{k: v for k, v in self.vlm_processor_kwargs.items() if k in accepted},
        )

    def __getstate__(self) -> "dict[str, Any]":
        # The wrapped processor's class is made at run time and cannot be pickled; it is made again when needed.
        return {k: v for k, v in self.__dict__.items() if k != "vlm_processor"}

    def to_dict(self) -> "dict[str, Any]":
        self.__dict__.pop("vlm_processor", None)
        # transformers saves PIL image processors under the name of their torchvision counterparts.
        is_pil = type(self.image_processor).__name__.endswith("Pil")
        return {**super().to_dict(), "image_backend": "pil" if is_pil else "torchvision"}

    def __call__(
        self,
        images: "list[Any]",
        prompts: "list[str]",
        references: "list[Any] | None" = None,
        conditions: "list[Any] | None" = None,
        task: "str | list[str | None] | None" = None,
        criteria: "str | list[str | None] | None" = None,
        reasons_first: "bool | list[bool]" = False,
        examples: "Sequence[Mapping[str, Any] | Example] | None" = None,
        return_tensors: str = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        r"""
        Make a batch of questions from lists, as [`~RewardDanceProcessor.encode`] makes it of
        [`~rewarddance_hf.models.question_rewarddance.Question`].

        Args:
            images (`list`):
                Samples to be judged: anything that [`load_image`] takes; or clips: lists of those, tensors of shape
                `(frames, 3, height, width)`, animated images, video files.
            prompts (`list[str]`):
                Prompts that the samples were generated from. Plain data: no text can add special tokens or images.
            references (`list`, *optional*):
                Samples to compare with, image 1 of the question. Without them the pointwise question is asked.
            conditions (`list`, *optional*):
                First frames that were given to an image-to-video generator.
            task (`str` or `list`, *optional*):
                Task whose criteria are used, for all rows or one each. By default it follows from each sample, as
                [`~rewarddance_hf.models.question_rewarddance.infer_task`] says.
            criteria (`str` or `list`, *optional*):
                Criteria in place of those of `task`, for all rows or one each.
            reasons_first (`bool` or `list[bool]`, *optional*, defaults to `False`):
                Whether to ask for reasons before the answer, for all rows or one each.
            examples (`list[dict]`, *optional*):
                Judgements with known verdicts that are shown before the question of each row, as in
                [`~RewardDanceProcessor.read_examples`].
            return_tensors (`str`, *optional*, defaults to `"pt"`):
                Kind of tensors. Only `"pt"` is supported.
            kwargs:
                Further arguments of the wrapped processor.

        Returns:
            [`~transformers.BatchFeature`]: Tensors for [`RewardDanceForYesScoring`], padded on the left.

        Raises:
            `ValueError`: If lists differ in length, an image or clip cannot be read, `task` has no criteria, or it is about
                videos and a clip has one frame only.
            `ImportError`: If a sample is a video file and PyAV is not installed.
            `TypeError`: If a prompt is not a string.
            `NotImplementedError`: If an image requires a gradient that cannot pass through the image processor.
        """
        if isinstance(images, (str, bytes, dict, os.PathLike, Image.Image)):
            raise TypeError(
                f"`images` is of type `{type(images).__name__}`, but must be a list with one sample per prompt. Put it into one."
            )
        count = len(images)
        for name, column in {"prompts": prompts, "references": references, "conditions": conditions}.items():
            if column is not None and (isinstance(column, str) or len(column) != count):
                got = "one string" if isinstance(column, str) else f"{len(column)} entries"
                raise ValueError(
                    f"`{name}` has {got} for {count} images, but must be a list with one entry per image."
                )
        each = {
            name: [value] * count if value is None or isinstance(value, (str, bool)) else value
            for name, value in {"task": task, "criteria": criteria, "reasons_first": reasons_first}.items()
        }
        for name, column in each.items():
            if len(column) != count:
                raise ValueError(
                    f"`{name}` has {len(column)} entries for {count} images, but must be one value or a list with one entry "
                    "per image."
                )
        shown = self.read_examples(examples, each["task"], references is not None)
        questions = [
            Question(
                sample=images[i],
                prompt=prompts[i],
                reference=None if references is None else references[i],
                condition=None if conditions is None else conditions[i],
                examples=shown,
                row=i,
                **{name: column[i] for name, column in each.items()},
            )
            for i in range(count)
        ]
        if references is not None:
            for question in questions:
                if question.reference is None:
                    raise TypeError(
                        f"`{question.names[1]}` is of type `NoneType`, but must be an image or a clip. Drop the row, or pass its "
                        "reference."
                    )
        return self.encode(questions, return_tensors, **kwargs)

    def encode(self, questions: "Sequence[Question]", return_tensors: str = "pt", **kwargs: Any) -> BatchFeature:
        r"""
        Make a batch of questions.

        Args:
            questions (`list[Question]`):
                What is asked. Media that are loaded already are not loaded again.
            return_tensors (`str`, *optional*, defaults to `"pt"`):
                Kind of tensors. Only `"pt"` is supported.
            kwargs:
                Further arguments of the wrapped processor.

        Returns:
            [`~transformers.BatchFeature`]: Tensors for [`RewardDanceForYesScoring`], padded on the left.

        Raises:
            `ValueError`: As in [`~RewardDanceProcessor.load`], if a task has no criteria, or there is no question.
            `ImportError`: If a sample is a video file and PyAV is not installed.
            `NotImplementedError`: If an image requires a gradient that cannot pass through the image processor.
        """
        if return_tensors != "pt":
            raise ValueError(
                f"`return_tensors` is {return_tensors!r}, but the model takes PyTorch tensors. Leave it at 'pt'."
            )
        if len(questions) == 0:
            raise ValueError("`images` is empty, but must hold at least one sample.")
        loaded = [
            self.load(question if question.row is not None else replace(question, row=i), keep_gradient=True)
            for i, question in enumerate(questions)
        ]
        texts, media = [self.write_question(question) for question in loaded], [q.images for q in loaded]
        inputs = {"text": texts, "padding": True, **self.vlm_arguments(texts[0]), **kwargs}
        if any(isinstance(image, torch.Tensor) for row in media for image in row):
            return preprocess_with_gradient(self.vlm_processor, media, **inputs)
        return self.vlm_processor(images=media, **inputs)

    def load(
        self, question: Question, keep_gradient: bool = False, names: "tuple[str, str, str] | None" = None
    ) -> Question:
        """
        Load the media of a question: those frames of clips that the judge sees. What is loaded already stays as it is.

        Args:
            question ([`~rewarddance_hf.models.question_rewarddance.Question`]):
                What is asked.
            keep_gradient (`bool`, *optional*, defaults to `False`):
                Whether to leave tensors that require a gradient as they are, as in [`load_image`].
            names (`tuple[str, str, str]`, *optional*):
                Names of sample, reference and condition in error messages. By default they follow from `question.row`.

        Returns:
            [`~rewarddance_hf.models.question_rewarddance.Question`]: The same with a
            [`~rewarddance_hf.models.video_rewarddance.Clip`] as sample and reference, an image as condition, and a task.

        Raises:
            `ValueError`: If an image or clip cannot be read, or is a clip of one frame and the task is about videos.
            `ImportError`: If this is a video file and PyAV is not installed.
            `TypeError`: If an image is nothing that can be one.
        """
        sample_name, reference_name, condition_name = names or question.names
        sample = self.load_frames(question.sample, sample_name, question.task, keep_gradient)
        task = question.task or infer_task(sample, question.condition)
        reference, condition = question.reference, question.condition
        if reference is not None:
            reference = self.load_frames(reference, reference_name, task, keep_gradient)
        if condition is not None:
            condition = load_image(condition, condition_name, keep_gradient)
        return replace(question, sample=sample, reference=reference, condition=condition, task=task)

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
                "`prompt_texts['criteria']` is empty, so that no criteria are asked by and all dimensions would be one. Pass a "
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

    def read_examples(
        self,
        examples: "Sequence[Mapping[str, Any] | Example] | None",
        task: "str | Sequence[str | None] | None" = None,
        is_pairwise: bool = True,
    ) -> "tuple[Example, ...]":
        """
        Check in-context examples and load their images, once for many calls.

        Args:
            examples (`list[dict]`, *optional*):
                Examples in the order in which they are shown. Each has `image`, `prompt`, `verdict` (a bool, or `"yes"` or
                `"no"`), for a pairwise judge `reference`, and optional `condition`, `criteria` and `task`. Without `criteria`
                they state those of their task. Texts are plain data, as in the question.
            task (`str` or `list`, *optional*):
                Task of examples that name none: that of all rows. By default it follows from each example's own sample.
            is_pairwise (`bool`, *optional*, defaults to `True`):
                Whether a judge sees a reference.

        Returns:
            `tuple[Example, ...]`: What `examples` of a call can be, too.

        Raises:
            `TypeError`: If an example is no `dict`, or a text no string.
            `ValueError`: If an example lacks a key or has one too many, a verdict is neither yes nor no, an image cannot be
                read, or rows have several tasks and an example none.
        """
        if examples is None:
            return ()
        if isinstance(examples, (str, bytes, Mapping)) or not isinstance(examples, Sequence):
            raise TypeError(
                f"`examples` is of type `{type(examples).__name__}`, but must be a list of dicts. Wrap it in one."
            )
        tasks = {task} if task is None or isinstance(task, str) else set(task)
        read = []
        for i, example in enumerate(examples):
            if not isinstance(example, Example):
                name = f"examples[{i}]"
                question, verdict = parse_example(example, name, is_pairwise)
                if question.task is None and len(tasks) > 1:
                    raise ValueError(
                        f"`{name}` has no `task`, and the rows have several, but its criteria depend on it. Add one."
                    )
                question = replace(question, task=question.task or next(iter(tasks), None))
                names = f"{name}['image']", f"{name}['reference']", f"{name}['condition']"
                example = Example(self.load(question, names=names), verdict)
            read.append(example)
        return tuple(read)

    def open_clip(self, media: Any, name: str = "media", task: "str | None" = None) -> "ClipReader | None":
        """
        Open a clip and choose the frames that the judge sees, without decoding them.

        Args:
            media (image or clip):
                Anything that [`~rewarddance_hf.models.video_rewarddance.open_clip`] takes.
            name (`str`, *optional*, defaults to `"media"`):
                Name in error messages.
            task (`str`, *optional*):
                Task that the clip belongs to. If it is about videos, a clip of one frame is refused.

        Returns:
            [`~rewarddance_hf.models.video_rewarddance.ClipReader`]: Reader of the chosen frames, or None if this is a single
            image.

        Raises:
            `ValueError`: If the clip cannot be read, has no frames or frames of different size, or one frame in a task about
                videos; or `max_clip_tokens` is too small for two frames.
            `ImportError`: If this is a video file and PyAV is not installed.
        """
        reader = open_clip(media, name)
        if reader is None:
            return None
        is_image = isinstance(media, Clip) and media.is_image
        if len(reader) < 2 and not is_image and task is not None and task.endswith("video"):
            raise ValueError(
                f"`{name}` is a clip of a single frame, but the task {task!r} is about what happens in time and needs 2 or "
                "more. Pass all frames of the clip, or another task."
            )
        reader = reader.sample(self.num_frames, self.fps, self.max_frames)
        if self.max_clip_tokens is None or reader.size is None or len(reader) < 2:
            return reader
        tokens = self._count_frame_tokens(reader.size)
        affordable = self.max_clip_tokens // tokens
        if affordable < 2:
            raise ValueError(
                f"`max_clip_tokens` is {self.max_clip_tokens}, but a frame of `{name}` takes {tokens} tokens, and a clip has 2 "
                "frames or more. Raise it, or pass smaller frames."
            )
        return reader.sample(max_frames=affordable)

    def load_frames(
        self, media: Any, name: str = "media", task: "str | None" = None, keep_gradient: bool = False
    ) -> Clip:
        """
        Load an image as one frame, or those frames of a clip that the judge sees.

        Args:
            media (image or clip):
                Anything that [`load_image`] or [`~rewarddance_hf.models.video_rewarddance.open_clip`] takes. Frames that
                this method gave are given back.
            name (`str`, *optional*, defaults to `"media"`):
                Name in error messages.
            task (`str`, *optional*):
                Task that the clip belongs to. If it is about videos, a clip of one frame is refused.
            keep_gradient (`bool`, *optional*, defaults to `False`):
                Whether to leave tensors that require a gradient as they are, as in [`load_image`].

        Returns:
            [`~rewarddance_hf.models.video_rewarddance.Clip`]: List of RGB images, beside tensors with `keep_gradient`, which
            knows the index and time of each.

        Raises:
            `ValueError`: As in [`~RewardDanceProcessor.open_clip`], and if an image cannot be read.
            `ImportError`: If this is a video file and PyAV is not installed.
        """
        reader = self.open_clip(media, name, task)
        clip = Clip([load_image(media, name, keep_gradient)]) if reader is None else read_clip(reader, keep_gradient)
        clip.is_image = reader is None or (isinstance(media, Clip) and media.is_image)
        return clip

    def _count_frame_tokens(self, size: "tuple[int, int]") -> int:
        """Tokens of a frame with what surrounds it, as the wrapped processor makes them of frames in company."""
        if size not in self._frame_tokens:
            text = "\n".join([str(self.vlm_processor.image_token)] * 2)
            images = [[Image.new("RGB", size)] * 2]
            batch = self.vlm_processor(images=images, text=[text], **self.vlm_arguments(""))
            self._frame_tokens[size] = batch["input_ids"].shape[1] // 2
        return self._frame_tokens[size]

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
            rationales (`list[str]`):
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
        length = max(map(len, targets))
        ids = torch.full((batch_size, length), self.tokenizer.pad_token_id)
        mask = torch.zeros(batch_size, length, dtype=batch["attention_mask"].dtype)
        for i, target in enumerate(targets):
            ids[i, : len(target)] = torch.tensor(target)
            mask[i, : len(target)] = 1
        labels = torch.where(mask.bool(), ids, -100)
        answer_starts = torch.tensor(starts)
        labels[torch.arange(batch_size), answer_starts] = -100  # the answer itself has its own loss

        batch["input_ids"] = torch.cat([batch["input_ids"], ids], dim=1)
        batch["attention_mask"] = torch.cat([batch["attention_mask"], mask], dim=1)
        for name in ("mm_token_type_ids", "token_type_ids"):  # 0 is text in every model that has them
            if name in batch:
                batch[name] = torch.nn.functional.pad(batch[name], (0, length))
        batch["rationale_labels"] = torch.nn.functional.pad(labels, (question_length, 0), value=-100)
        batch["answer_index"] = answer_starts + question_length - 1
        return batch

    def split_reasons(self, text: str) -> "str | None":
        """
        Take the reasons out of what a judge says that was asked for reasons first.

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
        pattern, token_ids = self._control_tokens
        # Splitting one token may uncover another that overlaps with it.
        while match := pattern.search(text):
            text = text[: match.start() + 1] + ZERO_WIDTH_SPACE + text[match.start() + 1 :]
        found = token_ids.intersection(self._encode(text))
        if found:
            raise ValueError(
                f"`{name}` contains the special tokens {self.tokenizer.convert_ids_to_tokens(sorted(found))}, which cannot be "
                "written as plain text. Remove them."
            )
        return text

    @cached_property
    def _control_tokens(self) -> "tuple[re.Pattern[str], set[int]]":
        """Spellings and IDs of tokens that text from users must not contain."""
        spellings = {token for token in self.tokenizer.get_added_vocab() if len(token) > 1 and token.strip(" \n\t▁")}
        spellings |= {token for token in self.tokenizer.all_special_tokens if len(token) > 1}
        placeholders = [
            getattr(self.vlm_processor, f"{name}_token", None) for name in ("image", "video", "boi", "audio")
        ]
        spellings |= {str(token) for token in placeholders if token}
        pattern = "|".join(re.escape(token) for token in sorted(spellings, key=len, reverse=True))
        token_ids = set(self.tokenizer.convert_tokens_to_ids(sorted(spellings)))
        # A character that the tokenizer does not know controls nothing, unless its token also ends texts.
        if self.tokenizer.unk_token not in (self.tokenizer.bos_token, self.tokenizer.eos_token):
            token_ids.discard(self.tokenizer.unk_token_id)
        return re.compile(pattern or r"(?!)"), token_ids

    def vlm_arguments(self, text: str) -> "dict[str, Any]":
        """
        Arguments, beside images and texts, that the wrapped processor is called with.

        Args:
            text (`str`):
                First of the texts, as written by [`~RewardDanceProcessor.write_question`].

        Returns:
            `dict[str, Any]`: Keyword arguments.
        """
        bos_token = self.tokenizer.bos_token
        return {
            "return_tensors": "pt",
            # A chat template writes the first token itself; the tokenizer must not write it again.
            **({"add_special_tokens": False} if bos_token and text.startswith(bos_token) else {}),
            **({"images_kwargs": self.vlm_images_kwargs} if self.vlm_images_kwargs else {}),
        }

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
        turns = [
            (self._write_turn(example.question), self._verdict_word(example.verdict)) for example in question.examples
        ]
        return self._chat(self._write_turn(question), turns=turns)

    def write_messages(self, question: Question) -> "tuple[list[dict[str, Any]], list[Image.Image]]":
        r"""
        Write one question as chat messages, for what applies a chat template itself: trainers of TRL, model servers.

        Args:
            question ([`~rewarddance_hf.models.question_rewarddance.Question`]):
                What is asked.

        Returns:
            `tuple[list[dict], list[PIL.Image.Image]]`: Messages, whose parts are `{"type": "text", "text": ...}` and
            `{"type": "image"}`, and the images of the latter.

        Raises:
            `ValueError`: If an image cannot be read, or the task has no criteria.
        """
        question = self.load(question)
        turns = [
            (self._write_turn(example.question), self._verdict_word(example.verdict)) for example in question.examples
        ]
        return self._messages(self._write_turn(question), turns), question.images

    def _verdict_word(self, verdict: bool) -> str:
        return self.yes_word if verdict else self.no_word

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
        sample_frames = marks_of(question.sample)
        reference_frames = () if question.reference is None else marks_of(question.reference)
        texts = self.prompt_texts
        noun = texts["video" if task.endswith("video") or len(sample_frames) > 1 else "image"]
        pairwise = len(reference_frames) > 0
        # JSON quotes the prompt and escapes its quotes and line breaks: its end cannot be faked.
        quoted = json.dumps(self.plain_text(question.prompt, "prompt"), ensure_ascii=False)
        statement = texts["prompt"].format(prompt=quoted)
        if texts["criteria"]:
            statement += "\n" + texts["criteria"].format(criteria=self.plain_text(criteria, "criteria"))
        paradigm, kind = (
            "pairwise" if pairwise else "pointwise",
            "reasons_question" if question.reasons_first else "question",
        )
        asked = texts[f"{paradigm}_{kind}"].format(noun=noun)

        label = noun.capitalize()
        if pairwise:
            heads = [
                *self._frame_heads(f"{label} 1", reference_frames),
                *self._frame_heads(f"{label} 2", sample_frames),
            ]
        else:
            heads = self._frame_heads(label, sample_frames)
        heads = [texts["condition"]] * (question.condition is not None) + heads
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
            frame = self.prompt_texts["frame_number" if time is None else "frame_time"].format(
                number=number, time=time
            )
            heads.append(self.prompt_texts["frame" if heads else "first_frame"].format(name=name, frame=frame))
        return heads

    def _chat(
        self,
        content: "list[dict[str, str]]",
        answer: "str | None" = None,
        turns: "list[tuple[list[dict[str, str]], str]] | tuple[()]" = (),
    ) -> str:
        """Chat up to the answer, or with it; `turns` are earlier questions and their answers."""
        messages = self._messages(content, turns)
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
            return self.apply_chat_template(messages)
        return self.apply_chat_template(messages, add_generation_prompt=True) + self._answer_lead

    def _messages(
        self, content: "list[dict[str, str]]", turns: "list[tuple[list[dict[str, str]], str]] | tuple[()]" = ()
    ) -> "list[dict[str, Any]]":
        messages: "list[dict[str, Any]]" = []
        if self.prompt_texts["system"]:
            messages.append({"role": "system", "content": [{"type": "text", "text": self.prompt_texts["system"]}]})
        for asked, answered in turns:
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answered}]})
        messages.append({"role": "user", "content": content})
        return messages

    def _read_assistant_turn(self) -> None:
        """
        Find how the chat template begins and ends the assistant's turn, so that the answer stands where the model would
        write it: "Assistant:" is followed by " yes", and some templates open and close an empty thought before it.
        """
        content = [{"type": "text", "text": "?"}]
        self._answer_lead = ""
        opened, answered = self._chat(content), self._chat(content, answer=self.yes_word)
        lead, _, end = answered.removeprefix(opened).partition(self.yes_word)
        if not answered.startswith(opened) or self.yes_word not in answered[len(opened) :]:
            lead, end = "", ""
        self._answer_lead = lead.removesuffix(" ")
        self._answer_space = " " if lead.endswith(" ") else ""
        self._answer_end = end or self.tokenizer.eos_token or ""
        self._opened_turn = self._chat(content)
        self._opened_turn_ids = self._encode(self._opened_turn)

    def _encode(self, text: str) -> "list[int]":
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _find_answer_token(self, name: str, word: str) -> int:
        ids = self._encode(self._opened_turn + self._answer_space + word)
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
            yes, no = self._encode(lead + self.yes_word), self._encode(lead + self.no_word)
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
            return self._encode(text)[num_opened:], 0
        if rationale is None or self.split_reasons(rationale) is not None:
            got = "None" if rationale is None else f"a text with {self.prompt_texts['answer']!r} in it"
            raise ValueError(
                f"`rationale` is {got}, but must be reasons that are followed by this phrase and the answer. Drop the row, "
                "remove the phrase, or ask for the decision first."
            )
        reasons = self.plain_text(rationale.strip(), "rationale")
        text = opened + (reasons + self._answer_phrase if reasons else self._answer_phrase.lstrip()) + word
        return self._encode(text + self._answer_end)[num_opened:], len(self._encode(text)) - num_opened - 1


__all__ = ["RewardDanceProcessor", "load_frames", "load_image"]
