"""Clips: which of their frames a judge sees, and where in the clip these were."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image


def sample_frame_indices(
    num_source_frames: int,
    num_frames: "int | None" = None,
    fps: "float | None" = None,
    times: "list[float] | None" = None,
    max_frames: "int | None" = None,
) -> "list[int]":
    """
    Choose frames of a clip, never at random: all, `num_frames` at equal distances (the first and the last one
    among them), or those nearest to `fps` frames a second, which needs `times` in seconds. Where more than
    `max_frames` were chosen, they are thinned out at equal distances. Gives their indices, in order.

    ```python
    >>> sample_frame_indices(9, num_frames=3)
    [0, 4, 8]
    >>> sample_frame_indices(6, fps=4, times=[0.0, 0.125, 0.25, 0.375, 0.5, 0.625])
    [0, 2, 4]
    ```
    """
    check_sampling(num_frames, fps, max_frames)
    chosen = list(range(num_source_frames))
    if fps is not None:
        if times is None:
            raise ValueError(
                f"`fps` is {fps}, but `times` is None. Pass the time of each frame, or sample by `num_frames`."
            )
        seconds = np.asarray(times)
        wanted = seconds[0] + np.arange(int((seconds[-1] - seconds[0]) * fps + 1e-6) + 1) / fps
        chosen = sorted({int(np.abs(seconds - moment).argmin()) for moment in wanted})
    for limit in (num_frames, max_frames):
        if limit is not None and len(chosen) > limit:
            last, steps = len(chosen) - 1, limit - 1
            chosen = [chosen[(2 * step * last + steps) // (2 * steps)] for step in range(limit)]
    return chosen


def check_sampling(num_frames: "int | None", fps: "float | None", max_frames: "int | None") -> None:
    """Make sure that frames can be chosen by these arguments of [`sample_frame_indices`]."""
    if num_frames is not None and fps is not None:
        raise ValueError(
            f"`num_frames` is {num_frames} and `fps` is {fps}, but only one of them can choose the frames. Drop the other."
        )
    for name, value in {"num_frames": num_frames, "max_frames": max_frames}.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 2):
            raise ValueError(f"`{name}` is {value!r}, but a clip has 2 frames or more. Pass such a number, or None.")
    if fps is not None and (isinstance(fps, bool) or not isinstance(fps, (int, float)) or not 0 < fps < float("inf")):
        raise ValueError(f"`fps` is {fps!r}, but must be a positive number of frames a second. Pass one, or None.")


class Clip(list):
    """
    Frames of a clip, and where in the clip they were.

    A plain list of frames is a clip too, but has no times; a judge that samples by `fps` needs this class.

    Args:
        frames (`list`):
            Frames that the clip consists of, or that were taken of it.
        fps (`float`, *optional*):
            Frames a second, from which `times` follow.
        indices (`list[int]`, *optional*):
            Index of each frame in the source that it was taken from. Defaults to all frames of a source.
        times (`list[float]`, *optional*):
            Time of each frame in seconds.
        num_source_frames (`int`, *optional*):
            Number of frames of the source.

    Raises:
        `ValueError`: If there is not one index and time for each frame, or `fps` is out of range.

    Example:

    ```python
    scorer.score([Clip(frames, fps=24)], ["a red circle moves up"], task="text-to-video")
    ```
    """

    # Whether this is a single image, and no clip of one frame; for loaded images only.
    is_image = False

    def __init__(
        self,
        frames: Any = (),
        fps: "float | None" = None,
        indices: "list[int] | None" = None,
        times: "list[float] | None" = None,
        num_source_frames: "int | None" = None,
    ) -> None:
        super().__init__(frames)
        check_sampling(None, fps, None)
        self.indices = list(range(len(self))) if indices is None else list(indices)
        self.times = times if fps is None else [index / fps for index in self.indices]
        self.num_source_frames = len(self) if num_source_frames is None else num_source_frames
        for name, values in {"indices": self.indices, "times": self.times}.items():
            if values is not None and len(values) != len(self):
                raise ValueError(
                    f"`{name}` has {len(values)} entries for {len(self)} frames, but must have one for each."
                )

    @property
    def marks(self) -> "tuple[tuple[int, float | None], ...]":
        """Number, from 1, and time of each frame, as a judge is told them."""
        return _marks(self.indices, self.times)


@dataclass(eq=False)
class ClipReader:
    """Clip whose frames are not decoded yet. Made by [`open_clip`]."""

    name: str  # in error messages
    indices: "list[int]"  # of each frame in the source
    times: "list[float] | None"  # of each frame in seconds
    num_source_frames: int
    frames: "list[Any] | None" = None  # of a clip that is in memory: anything that is an image
    decode: "Callable[[list[int]], list[Image.Image]] | None" = None  # frames of a file by their indices
    size: "tuple[int, int] | None" = None  # width and height of frames, where they are known

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def marks(self) -> "tuple[tuple[int, float | None], ...]":
        """Number, from 1, and time of each frame, as a judge is told them."""
        return _marks(self.indices, self.times)

    def sample(
        self, num_frames: "int | None" = None, fps: "float | None" = None, max_frames: "int | None" = None
    ) -> "ClipReader":
        """Reader of fewer frames, as [`sample_frame_indices`] chooses them."""
        if fps is not None and self.times is None:
            raise ValueError(
                f"`{self.name}` has no times, but frames are sampled by `fps`. Pass `Clip(frames, fps=...)`, or set "
                "`num_frames` of the processor instead of `fps`."
            )
        chosen = sample_frame_indices(len(self), num_frames, fps, self.times, max_frames)
        return replace(
            self,
            indices=[self.indices[i] for i in chosen],
            times=None if self.times is None else [self.times[i] for i in chosen],
            frames=None if self.frames is None else [self.frames[i] for i in chosen],
        )

    def read(self) -> Clip:
        """The frames, decoded if they are in a file; else they may still be any kind of image."""
        frames = self.frames
        if frames is None:
            frames = self.decode(self.indices)
        return Clip(frames, indices=self.indices, times=self.times, num_source_frames=self.num_source_frames)


def _marks(indices: "list[int]", times: "list[float] | None") -> "tuple[tuple[int, float | None], ...]":
    return tuple((index + 1, times[i] if times else None) for i, index in enumerate(indices))


__all__ = ["Clip", "ClipReader", "check_sampling", "sample_frame_indices"]
