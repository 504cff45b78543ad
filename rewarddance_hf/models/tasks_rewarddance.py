"""What samples were generated for: the tasks that a judge knows, and which one a sample belongs to."""

from dataclasses import dataclass
from typing import Any

from .clips_rewarddance import Clip, ClipReader
from .media_rewarddance import open_clip


@dataclass(frozen=True)
class Task:
    """
    Facts of a task. Its criteria are in a text file of its name in the folder `criteria`.

    Args:
        is_video (`bool`, *optional*, defaults to `False`):
            Whether its samples are clips.
        has_condition (`bool`, *optional*, defaults to `False`):
            Whether a generator is given an image beside the prompt. Samples with one belong to this task by default.
        needs_condition (`bool`, *optional*, defaults to `False`):
            Whether nothing can be said about a sample without that image.
        condition_text, prompt_text (`str`, *optional*):
            Names of the wording, in `prompt_texts` of the processor, that introduces that image and the prompt.
    """

    is_video: bool = False
    has_condition: bool = False
    needs_condition: bool = False
    condition_text: str = "condition"
    prompt_text: str = "prompt"


TASKS = {
    "text-to-image": Task(),
    "text-to-video": Task(is_video=True),
    "image-to-video": Task(is_video=True, has_condition=True),
    "image-editing": Task(
        has_condition=True, needs_condition=True, condition_text="source_image", prompt_text="instruction"
    ),
}


def task_of(name: "str | None") -> Task:
    """Facts of a task by its name. Of one that only its user's criteria know, the name tells whether it is about videos."""
    return TASKS.get(name or "") or Task(is_video=(name or "").endswith("video"))


def infer_task(sample: Any, condition: Any = None) -> str:
    """
    Task of a sample that comes without one: `"text-to-image"` for an image, `"text-to-video"` for a clip; with a condition
    `"image-editing"` and `"image-to-video"`. A file is opened for this; one that is loaded or opened is not.
    """
    if not isinstance(sample, (Clip, ClipReader)):
        sample = open_clip(sample, "sample")
    facts = (sample is not None and len(sample) > 1, condition is not None)
    return next(name for name, task in TASKS.items() if (task.is_video, task.has_condition) == facts)


def check_condition(task: "str | None", condition: Any, name: str = "condition") -> None:
    """Raise a `ValueError` if a task needs a condition, called `name` in it, and there is none."""
    if condition is None and task_of(task).needs_condition:
        raise ValueError(
            f"`{name}` is None, but the task is {task!r}: its samples are judged beside the image that they were made from. "
            "Pass the source image, or another task."
        )


__all__ = ["TASKS", "Task", "check_condition", "infer_task", "task_of"]
