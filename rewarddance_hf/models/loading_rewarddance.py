"""What a judge is shown: the media of a question are loaded once, clips with the frames that it sees."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from .clips_rewarddance import Clip, ClipReader
from .media_rewarddance import load_image, open_clip, open_media, read_clip
from .question_rewarddance import Example, Question, parse_example
from .tasks_rewarddance import check_condition, infer_task, task_of


class LoadingMixin:
    """What [`RewardDanceProcessor`] loads, by its settings."""

    vlm_processor: Any
    vlm_arguments: Any
    background: str
    num_frames: "int | None"
    fps: "float | None"
    max_frames: "int | None"
    max_clip_tokens: "int | None"
    _frame_tokens: "dict[tuple[int, int], int]"

    def load(
        self, question: Question, keep_gradient: bool = False, names: "tuple[str, str, str] | None" = None
    ) -> Question:
        """
        Load the media of a question, clips with the frames that the judge sees. What is loaded already stays as it is.

        Args:
            question ([`~rewarddance_hf.models.question_rewarddance.Question`]):
                What is asked.
            keep_gradient (`bool`, *optional*, defaults to `False`):
                Whether to leave tensors that require a gradient as they are, as in [`load_image`].
            names (`tuple[str, str, str]`, *optional*):
                Names of sample, reference and condition in error messages. By default they follow from `question.row`.

        Returns:
            [`~rewarddance_hf.models.question_rewarddance.Question`]: The same with a
            [`~rewarddance_hf.models.clips_rewarddance.Clip`] as sample and reference, an image as condition, and a task.

        Raises:
            As in [`~RewardDanceProcessor.load_frames`].
        """
        sample_name, reference_name, condition_name = names or question.names
        sample = self.load_frames(question.sample, sample_name, question.task, keep_gradient)
        task = question.task or infer_task(sample, question.condition)
        reference, condition = question.reference, question.condition
        if reference is not None:
            reference = self.load_frames(reference, reference_name, task, keep_gradient)
        if condition is not None:
            condition = self.load_image(condition, condition_name, keep_gradient)
        loaded = (sample, reference, condition, task)
        given = (question.sample, question.reference, question.condition, question.task)
        if all(now is before for now, before in zip(loaded, given, strict=True)):
            return question
        return replace(question, sample=sample, reference=reference, condition=condition, task=task)

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
            `tuple[Example, ...]`: Loaded examples, which can be passed as `examples` of a call.

        Raises:
            `TypeError`: If an example is not a `dict`, or a text is not a string.
            `ValueError`: If an example lacks a key or has one too many, a verdict is neither yes nor no, an image cannot be
                read, or rows have several tasks and an example has none.
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
                own_task = question.task or next(iter(tasks), None)
                check_condition(own_task, question.condition, f"{name}['condition']")
                question = replace(question, task=own_task)
                names = f"{name}['image']", f"{name}['reference']", f"{name}['condition']"
                example = Example(self.load(question, names=names), verdict)
            read.append(example)
        return tuple(read)

    def open_clip(self, media: Any, name: str = "media", task: "str | None" = None) -> "ClipReader | None":
        """
        Open a clip and choose the frames that the judge sees, without decoding them.

        Args:
            media (image or clip):
                Anything that [`~rewarddance_hf.models.media_rewarddance.open_clip`] takes.
            name, task:
                As in [`~RewardDanceProcessor.load_frames`].

        Returns:
            [`~rewarddance_hf.models.clips_rewarddance.ClipReader`]: Reader of the chosen frames, or None if this is a single
            image.

        Raises:
            As in [`~RewardDanceProcessor.load_frames`].
        """
        reader = open_clip(media, name)
        return None if reader is None else self._sample(reader, task, is_clip=not getattr(media, "is_image", False))

    def _sample(self, reader: ClipReader, task: "str | None", is_clip: bool) -> ClipReader:
        """Choose frames of an opened clip."""
        if is_clip and len(reader) < 2 and task_of(task).is_video:
            raise ValueError(
                f"`{reader.name}` is a clip of a single frame, but the task {task!r} is about what happens in time and needs 2 "
                "or more. Pass all frames of the clip, or another task."
            )
        reader = reader.sample(self.num_frames, self.fps, self.max_frames)
        if self.max_clip_tokens is None or reader.size is None or len(reader) < 2:
            return reader
        tokens = self.count_frame_tokens(reader.size)
        affordable = self.max_clip_tokens // tokens
        if affordable < 2:
            raise ValueError(
                f"`max_clip_tokens` is {self.max_clip_tokens}, but a frame of `{reader.name}` takes {tokens} tokens, and a clip "
                "has 2 frames or more. Raise it, or pass smaller frames."
            )
        return reader.sample(max_frames=affordable)

    def load_image(self, image: Any, name: str = "image", keep_gradient: bool = False) -> Any:
        """
        Load an image as the judge sees it: [`~rewarddance_hf.models.media_rewarddance.load_image`], whose arguments these are,
        with the `background` of this processor.
        """
        return load_image(image, name, keep_gradient, self.background)

    def load_frames(
        self, media: Any, name: str = "media", task: "str | None" = None, keep_gradient: bool = False
    ) -> Clip:
        """
        Load an image as one frame, or those frames of a clip that the judge sees.

        Args:
            media (image or clip):
                Anything that [`load_image`] or [`~rewarddance_hf.models.media_rewarddance.open_clip`] takes. Frames
                that this method has returned are returned as they are.
            name (`str`, *optional*, defaults to `"media"`):
                Name in error messages.
            task (`str`, *optional*):
                Task that the clip belongs to. If it is about videos, a clip of one frame is refused.
            keep_gradient (`bool`, *optional*, defaults to `False`):
                Whether to leave tensors that require a gradient as they are, as in [`load_image`].

        Returns:
            [`~rewarddance_hf.models.clips_rewarddance.Clip`]: List of RGB images, beside tensors with `keep_gradient`, which
            knows the index and time of each.

        Raises:
            `ValueError`: If an image or clip cannot be read, a clip has no frames, frames of different size, or one frame in a
                task about videos; or `max_clip_tokens` is too small for two frames.
            `ImportError`: If this is a video file and PyAV is not installed.
            `TypeError`: If it cannot be an image.
        """
        is_image = getattr(media, "is_image", False)
        if is_image and not isinstance(media[0], torch.Tensor):
            return media  # loaded already
        found = open_media(media, name, lambda image: Clip([self.load_image(image, name, keep_gradient)]))
        if isinstance(found, ClipReader):
            found = read_clip(self._sample(found, task, is_clip=not is_image), keep_gradient, self.background)
        else:
            is_image = True
        found.is_image = is_image
        return found

    def count_frame_tokens(self, size: "tuple[int, int]") -> int:
        """Tokens that the wrapped processor makes of one frame among others, with what surrounds it."""
        if size not in self._frame_tokens:
            text = "\n".join([str(self.vlm_processor.image_token)] * 2)
            images = [[Image.new("RGB", size)] * 2]
            batch = self.vlm_processor(images=images, text=[text], **self.vlm_arguments(""))
            self._frame_tokens[size] = batch["input_ids"].shape[1] // 2
        return self._frame_tokens[size]


__all__ = ["LoadingMixin"]
