"""Images of questions: each is decoded, identified and preprocessed once, in threads beside the model."""

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
from ...models.question_rewarddance import Question
from ...models.tasks_rewarddance import infer_task
from .image_calls import ImageCalls, learn_call, noise, run_plainly, run_processor


@dataclass(eq=False)
class PreparedImage:
    """Image as a vision-language model takes it."""

    expansion: str  # text that replaces its placeholder
    inputs: dict[str, torch.Tensor]  # of the vision encoder for this image alone; emptied when they have been used
    grid: tuple[int, ...] | None  # time, height and width in patches, if positions depend on them
    requires_grad: bool
    number: int = -1  # in its session: in the order of questions, so that results do not depend on threads
    key: Any = None  # at the desk


class ImageDesk:
    """
    The images of one session. They are the same if their pixels are, and if they are one tensor where they carry a gradient.
    Threads of `executor` decode and preprocess; without it this is done at once.
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
        self._calls = ImageCalls(processor)

    def open(self, questions: list[Question]) -> list[Question]:
        """
        The same questions with their tasks, and with clips opened: the frames that are seen are known, but not
        decoded. A clip that cannot be opened raises when its frames are taken.
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
        """Start to prepare the images of opened questions. Those of each are: of examples, condition, reference, sample."""
        sources: dict[Any, tuple[Any, list[Future]]] = {}  # with the objects, whose `id` names them
        rows: list[list[Future[PreparedImage]]] = []
        for question in questions:
            named = [(image, "examples") for example in question.examples for image in example.question.images]
            own = (question.condition, question.reference, question.sample)
            named += [pair for pair in zip(own, reversed(question.names), strict=True) if pair[0] is not None]
            count = sum(len(media) if isinstance(media, ClipReader) else 1 for media, _ in named)
            alone = self._knows_company and count == 1
            rows.append([])
            for source, name in (part for pair in named for part in _split_frames(*pair)):
                key = (_identity(source), alone)
                if key not in sources:
                    sources[key] = (source, self._submit(source, name, alone))
                rows[-1] += sources[key][1]
        return rows

    def forget(self, key: Any) -> None:
        """Drop an image that has been prepared."""
        with self._lock:
            del self._prepared[key]

    def _submit(self, image: Any, name: str, alone: bool) -> list["Future[PreparedImage]"]:
        """Start to prepare an image, or all frames of a file: they are decoded together, and not kept."""
        if requires_grad(image):  # grad mode belongs to a thread
            self.processor.load_image(image, name, keep_gradient=True)
            return [self._once(("gradient", id(image), alone), lambda: self._prepare(image, name, alone), image)]
        is_clip = isinstance(image, ClipReader)
        names = [f"{image.name}[{index}]" for index in image.indices] if is_clip else [name]
        futures: list[Future[PreparedImage]] = [Future() for _ in names]

        def prepare() -> None:
            try:
                images = image.read() if is_clip else [image]
            except Exception as error:
                for future in futures:
                    future.set_exception(error)
                return
            for future, frame, frame_name in zip(futures, images, names, strict=True):
                _fulfil(future, partial(self._load, frame, frame_name, alone))

        if self.executor is None:
            prepare()
        else:
            self.executor.submit(prepare)
        return futures

    @torch.no_grad()
    def _load(self, image: Any, name: str, alone: bool) -> PreparedImage:
        image = self.processor.load_image(image, name)
        pixels = hashlib.blake2b(np.asarray(image).data, digest_size=16).digest()
        return self._once((pixels, image.size, alone), lambda: self._prepare(image, name, alone)).result()

    def _once(self, key: Any, prepare: Callable[[], PreparedImage], owner: Any = None) -> "Future[PreparedImage]":
        with self._lock:
            is_known = key in self._prepared
            future = self._prepared.setdefault(key, Future())
        if not is_known:
            future.owner = owner  # type: ignore[attr-defined]  # keeps its `id`
            _fulfil(future, lambda: replace(prepare(), key=key))
        return future

    def _prepare(self, image: Any, name: str, alone: bool) -> PreparedImage:
        try:
            return self._process(image, alone)
        except ValueError as error:  # as of a line of pixels
            raise ValueError(
                f"`{name}` cannot be prepared by `{self.processor.vlm_processor_class}` ({error}). Resize it, or drop the row."
            ) from error

    def _process(self, image: Any, alone: bool) -> PreparedImage:
        """Run the wrapped processor on one image; or, where it is known for this size how, its image processor."""
        has_company = self._knows_company and not alone

        def nested(shown: Any) -> list[list[Any]]:
            # The company is a small image, and is thrown away.
            return [[shown, Image.new("RGB", (8, 8))]] if has_company else [[shown]]

        vlm_processor: Any = self.processor.vlm_processor
        question = "\n".join([self._placeholder] * (1 + has_company))
        arguments = {"text": [question], **self.processor.vlm_arguments("")}
        size = (image.shape[-1], image.shape[-2]) if isinstance(image, torch.Tensor) else image.size
        call = self._calls.find((size, alone), lambda: learn_call(vlm_processor, nested(noise(size)), arguments))
        run = preprocess_with_gradient if isinstance(image, torch.Tensor) else run_plainly
        if call is None:
            inputs, expansion, _ = run_processor(vlm_processor, nested(image), arguments, run)
        else:
            inputs, expansion = dict(run(call, nested(image))), call.expansion
        if has_company:
            expansion = expansion.split("\n")[0]
            inputs = {k: v if k == "batch_num_images" else v[:1] for k, v in inputs.items()}
        grid = inputs.get("image_grid_thw")
        with self._lock:
            self.num_preprocessed += 1
        return PreparedImage(
            expansion, inputs, None if grid is None else tuple(grid[0].tolist()), requires_grad(image)
        )


def _split_frames(media: Any, name: str) -> list[tuple[Any, str]]:
    """Images of which an image or opened clip consists, each with its name for error messages; a file stays whole."""
    if not isinstance(media, ClipReader):
        return [(media, name)]
    if media.frames is None:
        return [(media, media.name)]
    return [(frame, f"{media.name}[{index}]") for frame, index in zip(media.frames, media.indices, strict=True)]


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


def _fulfil(future: "Future[Any]", function: Callable[[], Any]) -> None:
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)
