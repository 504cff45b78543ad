"""Images of questions: each is decoded, identified and preprocessed once, in threads beside the model."""

import copy
import hashlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from ...models import RewardDanceProcessor
from ...models.clips_rewarddance import ClipReader
from ...models.pixels_rewarddance import preprocess_with_gradient
from ...models.question_rewarddance import Question, infer_task


SEPARATOR = "\n"
# Inputs that belong to the text, in the output of a processor.
TEXT_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


@dataclass(eq=False)
class PreparedImage:
    """Image as a vision-language model takes it."""

    expansion: str  # text that replaces its placeholder
    inputs: dict[str, torch.Tensor]  # of the vision encoder for this image alone; emptied when they have been used
    grid: tuple[int, ...] | None  # time, height and width in patches, if positions depend on them
    requires_grad: bool
    number: int = (
        -1
    )  # in its session, in the order of questions and not of threads, so that results do not depend on these


class ImageDesk:
    """
    Everything about images in one session. Images are the same if their pixels are; those that carry a gradient are the same
    if they are one tensor. Threads of `executor` decode and preprocess; without it this is done at once.
    """

    def __init__(self, processor: RewardDanceProcessor, executor: Executor | None = None) -> None:
        self.processor = processor
        self.executor = executor
        self.num_preprocessed = 0
        self._prepared: dict[Any, Future] = {}
        self._lock = threading.Lock()
        # LLaVA-OneVision cuts an image into tiles only if it is the only one of a question.
        self._knows_company = "batch_num_images" in processor.image_processor.model_input_names
        vlm_processor: Any = processor.vlm_processor
        self._placeholder = str(vlm_processor.image_token)

    def open(self, questions: list[Question]) -> list[Question]:
        """
        Find out which frames of clips are seen, without decoding them, and what task questions without one have. A clip that
        cannot be opened says so when its frames are taken.
        """
        readers: dict[Any, ClipReader | None] = {}

        def opened(media: Any, name: str, task: str | None) -> ClipReader | None:
            key = (_identity(media), task)
            if key not in readers:
                try:
                    readers[key] = self.processor.open_clip(media, name, task)
                except Exception as error:
                    readers[key] = _broken_clip(error, name)
            return readers[key]

        found = []
        for question in questions:
            sample_name, reference_name, _ = question.names
            sample, reference = opened(question.sample, sample_name, question.task), question.reference
            task = question.task or infer_task(sample, question.condition)
            if reference is not None:
                reference = opened(reference, reference_name, task) or reference
            found.append(replace(question, sample=sample or question.sample, reference=reference, task=task))
        return found

    def take(self, questions: list[Question]) -> list[list["Future[PreparedImage]"]]:
        """
        Start to prepare the images of opened questions. Gives those of each in their order: of examples, first frame,
        reference, sample.
        """
        # Objects are kept until the end, as their `id` names them.
        sources: dict[Any, tuple[Any, list[Future]]] = {}
        rows = []
        for question in questions:
            named = [(image, "examples") for example in question.examples for image in example.question.images]
            own = (question.condition, question.reference, question.sample)
            named += [pair for pair in zip(own, reversed(question.names), strict=True) if pair[0] is not None]
            alone = self._knows_company and sum(num_frames(media) for media, _ in named) == 1
            row: list[Future[PreparedImage]] = []
            for media, name in named:
                for source, source_name in split_frames(media, name):
                    key = (_identity(source), alone)
                    if key not in sources:
                        sources[key] = (source, self._submit(source, source_name, alone))
                    row += sources[key][1]
            rows.append(row)
        return rows

    def forget(self, numbers: set[int]) -> None:
        """Drop images by number; they are prepared anew when they come again."""
        with self._lock:
            self._prepared = {
                key: future
                for key, future in self._prepared.items()
                if not future.done() or future.exception() is not None or future.result().number not in numbers
            }

    def _submit(self, image: Any, name: str, alone: bool) -> list["Future[PreparedImage]"]:
        if isinstance(image, ClipReader):
            return self._submit_clip(image, alone)
        if requires_grad(image):  # grad mode belongs to a thread
            self.processor.load_image(image, name, keep_gradient=True)
            return [self._once(("gradient", id(image), alone), lambda: self._prepare(image, alone), image)]
        if self.executor is None:
            return [_done(lambda: self._load(image, name, alone))]
        return [self.executor.submit(self._load, image, name, alone)]

    def _submit_clip(self, reader: ClipReader, alone: bool) -> list["Future[PreparedImage]"]:
        """Frames of a file are decoded together, and not kept."""
        futures: list[Future[PreparedImage]] = [Future() for _ in reader.indices]

        def prepare() -> None:
            try:
                frames = reader.read()
            except Exception as error:
                for future in futures:
                    future.set_exception(error)
                return
            for future, frame, index in zip(futures, frames, reader.indices, strict=True):
                _fulfil(future, partial(self._load, frame, f"{reader.name}[{index}]", alone))

        if self.executor is None:
            prepare()
        else:
            self.executor.submit(prepare)
        return futures

    @torch.no_grad()
    def _load(self, image: Any, name: str, alone: bool) -> PreparedImage:
        image = self.processor.load_image(image, name)
        pixels = hashlib.blake2b(np.asarray(image).data, digest_size=16).digest()
        return self._once((pixels, image.size, alone), lambda: self._prepare(image, alone)).result()

    def _once(self, key: Any, prepare: Callable[[], PreparedImage], owner: Any = None) -> "Future[PreparedImage]":
        with self._lock:
            is_known = key in self._prepared
            future = self._prepared.setdefault(key, Future())
        if not is_known:
            future.owner = owner  # type: ignore[attr-defined]  # keeps its `id`
            _fulfil(future, prepare)
        return future

    def _prepare(self, image: Any, alone: bool) -> PreparedImage:
        """Run the wrapped processor on one image, and listen to what text it gives to its tokenizer."""
        texts: list[str] = []
        vlm_processor = copy.copy(self.processor.vlm_processor)
        vlm_processor.tokenizer = _listening(vlm_processor.tokenizer, texts)
        has_company = self._knows_company and not alone
        # The company is a small image, and is thrown away.
        images = [[image, Image.new("RGB", (8, 8))]] if has_company else [[image]]
        question = SEPARATOR.join([self._placeholder] * len(images[0]))
        arguments = {"text": [question], **self.processor.vlm_arguments("")}
        if isinstance(image, torch.Tensor):
            batch = preprocess_with_gradient(vlm_processor, images, **arguments)
        else:
            batch = vlm_processor(images=images, **arguments)
        inputs = {name: value for name, value in batch.items() if name not in TEXT_INPUTS}
        expansion = texts[-1]
        if has_company:
            expansion = expansion.split(SEPARATOR)[0]
            inputs = {k: v if k == "batch_num_images" else v[:1] for k, v in inputs.items()}
        grid = inputs.get("image_grid_thw")
        with self._lock:
            self.num_preprocessed += 1
        return PreparedImage(
            expansion=expansion,
            inputs=inputs,
            grid=None if grid is None else tuple(grid[0].tolist()),
            requires_grad=requires_grad(image),
        )


def split_frames(media: Any, name: str) -> list[tuple[Any, str]]:
    """Images that an image or opened clip consists of, each with its name for error messages; a file stays whole."""
    if not isinstance(media, ClipReader):
        return [(media, name)]
    if media.frames is None:
        return [(media, media.name)]
    names = [f"{media.name}[{index}]" for index in media.indices]
    return list(zip(media.frames, names, strict=True))


def num_frames(media: Any) -> int:
    """Number of frames of an image or opened clip."""
    return len(media) if isinstance(media, ClipReader) else 1


def _identity(media: Any) -> Any:
    return os.fspath(media) if isinstance(media, (str, os.PathLike)) else id(media)


def _broken_clip(error: Exception, name: str) -> ClipReader:
    def fail(indices: list[int]) -> list[Image.Image]:
        raise error

    return ClipReader(name, [0], None, 1, decode=fail)


def requires_grad(image: Any) -> bool:
    """Whether the score of an image is to carry a gradient to it."""
    return isinstance(image, torch.Tensor) and image.requires_grad and torch.is_grad_enabled()


def needs_graph(model: torch.nn.Module, is_sample: bool) -> bool:
    """Whether something is to carry a gradient: below images that do, and everywhere in a judge that is trained."""
    return torch.is_grad_enabled() and (is_sample or any(weights.requires_grad for weights in model.parameters()))


def _done(function: Callable[[], Any]) -> "Future[Any]":
    future: Future[Any] = Future()
    _fulfil(future, function)
    return future


def _fulfil(future: "Future[Any]", function: Callable[[], Any]) -> None:
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)


def _listening(tokenizer: Any, texts: list[str]) -> Any:
    """Copy of a tokenizer that writes down what it is given."""

    def __call__(self: Any, text: list[str], *args: Any, **kwargs: Any) -> Any:
        texts.extend(text)
        return type(tokenizer).__call__(self, text, *args, **kwargs)

    listener = copy.copy(tokenizer)
    listener.__class__ = type(type(tokenizer).__name__, (type(tokenizer),), {"__call__": __call__})
    return listener
