"""RewardDance processor: images, prompt and criteria become the question that a vision-language model answers."""

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
import transformers
from PIL import Image, ImageColor
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.utils import is_torchvision_available, logging

from .clips_rewarddance import check_sampling
from .loading_rewarddance import LoadingMixin
from .pixels_rewarddance import preprocess_with_gradient
from .prompting_rewarddance import PromptingMixin
from .question_rewarddance import Example, Question
from .vlm_processor_rewarddance import image_only_processor, without_idle_resizes


logger = logging.get_logger(__name__)


class RewardDanceProcessor(LoadingMixin, PromptingMixin, ProcessorMixin):
    r"""Turn images, prompts and criteria into inputs of [`RewardDanceForYesScoring`], with the processor of a
    vision-language model inside.

    Tensors that require a gradient get one: `pixel_values` are equal to those of the same image rounded to 8 bits, and
    the gradient passes through as if nothing were rounded.

    `from_pretrained` takes a RewardDance checkpoint, or a plain one of an image-text-to-text model of transformers
    that has a chat template. No part of it needs torchvision as long as the wrapped model has a PIL image processor.

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
            that samples of a prompt share a longer prefix; `"text_after_each"` is as the first, but a pairwise question has
            them after the reference as well as after the sample, so that each is read beside its image.
        criteria (`dict[str, str]`, *optional*):
            Criteria by task, in place of or beside the default ones of
            [`~rewarddance_hf.models.tasks_rewarddance.TASKS`] (Section 3.2.1), which are in text files beside this module.
        dimensions (`dict[str, dict[str, str]]`, *optional*):
            Criteria by task and name of a dimension, in place of or beside the default ones: `"alignment"`, `"counting"`,
            `"binding"`, `"relations"`, `"text"`, `"aesthetics"` and `"structure"`; for videos also `"motion"`,
            `"consistency"` and `"physics"`; where an image is given to the generator also `"faithfulness"`.
        prompt_texts (`dict[str, str]`, *optional*):
            Wording of the question, in place of the default one.
        num_frames (`int`, *optional*):
            Number of frames that are taken of a clip, at equal distances. By default all are, up to `max_frames`.
        fps (`float`, *optional*):
            Frames that are taken for each second of a clip, in place of `num_frames`. Lists and tensors have no times: pass
            them as [`~rewarddance_hf.models.clips_rewarddance.Clip`] then.
        max_frames (`int`, *optional*, defaults to `16`):
            Largest number of frames of a clip. Of longer ones so many are taken, at equal distances.
        max_clip_tokens (`int`, *optional*):
            Largest number of tokens for the frames of a clip. Of clips that need more, fewer frames are taken.
        yes_word (`str`, *optional*, defaults to `"yes"`):
            Answer for a better sample. Must be a single token at the start of the assistant's turn.
        no_word (`str`, *optional*, defaults to `"no"`):
            Answer for a sample that is not better.
        background (`str`, *optional*, defaults to `"white"`):
            Color that is shown where an image is transparent: a name or `"#rrggbb"`.

    Raises:
        `ValueError`: If there is no chat template, an argument has none of the values above, or an answer word is not
            a single token, different from the other.

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
        background: str = "white",
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
        check_sampling(num_frames, fps, max_frames)
        if max_clip_tokens is not None and max_clip_tokens < 1:
            raise ValueError(
                f"`max_clip_tokens` is {max_clip_tokens}, but must be a positive number of tokens, or None."
            )
        try:
            ImageColor.getrgb(background)
        except (AttributeError, ValueError) as error:
            raise ValueError(
                f"`background` is {background!r}, but must be a color, e.g. 'white' or '#ffffff'."
            ) from error
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.vlm_processor_class = vlm_processor_class
        self.vlm_processor_kwargs = vlm_processor_kwargs or {}
        self.vlm_images_kwargs = vlm_images_kwargs or {}
        self.num_frames = num_frames
        self.fps = fps
        self.max_frames = max_frames
        self.max_clip_tokens = max_clip_tokens
        self.background = background
        self._frame_tokens: dict[tuple[int, int], int] = {}
        self._set_wording(prompt_layout, criteria, dimensions, prompt_texts, yes_word, no_word)

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
        settings = {"chat_template": self.chat_template, **self.vlm_processor_kwargs}
        return processor_class(
            image_processor=self.image_processor,
            tokenizer=self.tokenizer,
            **{k: v for k, v in settings.items() if k in accepted},
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
                Images that were given to the generator beside the prompt: first frame of image-to-video, source image of an
                edit.
            task (`str` or `list`, *optional*):
                Task whose criteria are used, for all rows or one each. By default it follows from each sample.
            criteria (`str` or `list`, *optional*):
                Criteria in place of those of `task`, for all rows or one each.
            reasons_first (`bool` or `list[bool]`, *optional*, defaults to `False`):
                Whether to ask for reasons before the answer, for all rows or one each.
            examples (`list[dict]`, *optional*):
                Questions with known verdicts that are shown before the question of each row, as in
                [`~RewardDanceProcessor.read_examples`].
            return_tensors (`str`, *optional*, defaults to `"pt"`):
                Kind of tensors. Only `"pt"` is supported.
            kwargs:
                Further arguments of the wrapped processor.

        Returns:
            [`~transformers.BatchFeature`]: Tensors for [`RewardDanceForYesScoring`], padded on the left.

        Raises:
            `ValueError`: If lists differ in length, an image or clip cannot be read, `task` has no criteria, it is about
                videos and a clip has one frame only, or it is `"image-editing"` and there is no condition.
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
            return_tensors, kwargs:
                As in calling the processor, and so is what is returned and raised.
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
        texts, media = self.write_questions(loaded), [question.images for question in loaded]
        arguments = {"padding": True, **self.vlm_arguments(texts[0]), **kwargs}
        try:
            return self._prepare(texts, media, arguments)
        except ValueError as error:
            for question, text, images in zip(loaded, texts, media, strict=True):
                try:
                    self._prepare([text], [images], arguments)
                except ValueError as reason:
                    raise ValueError(
                        f"`{question.names[0]}` and what it is shown with cannot be prepared by "
                        f"`{self.vlm_processor_class}` ({reason}). Resize its images, or drop the row."
                    ) from error
            raise

    def _prepare(self, texts: "list[str]", media: "list[list[Any]]", arguments: "dict[str, Any]") -> BatchFeature:
        if any(isinstance(image, torch.Tensor) for row in media for image in row):
            return preprocess_with_gradient(self.vlm_processor, media, text=texts, **arguments)
        return without_idle_resizes(self.vlm_processor)(images=media, text=texts, **arguments)

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
        return self._chat(question), question.images

    def apply_chat_template(
        self, conversation: Any, chat_template: "str | None" = None, tokenize: bool = False, **kwargs: Any
    ) -> Any:
        """
        Write any chat with the wrapped model's template; arguments and returns are those of
        [`~transformers.ProcessorMixin.apply_chat_template`]. With `tokenize=True` the wrapped processor makes inputs of it.
        """
        processor = self.vlm_processor if tokenize else self
        if tokenize and self.vlm_images_kwargs:
            given = dict(kwargs.get("processor_kwargs") or {})
            kwargs["processor_kwargs"] = {"images_kwargs": self.vlm_images_kwargs, **given}
        return ProcessorMixin.apply_chat_template(
            processor, conversation, chat_template or self.chat_template, tokenize=tokenize, **kwargs
        )

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


__all__ = ["RewardDanceProcessor"]
