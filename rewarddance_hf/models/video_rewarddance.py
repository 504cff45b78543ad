"""Clips: which frames of a list, tensor, animated image or video file a judge sees, and where they were in it."""

import bisect
import io
import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError


# Other files of several images (TIFF, the MPO of cameras) are no clips.
ANIMATED_FORMATS = ("AVIF", "GIF", "PNG", "WEBP")
# What viewers take where a file gives none.
DEFAULT_DURATION = 100  # milliseconds

# Of what Pillow raises for damaged animations, beside `OSError`.
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, Image.DecompressionBombError)


def sample_frame_indices(
    num_source_frames: int,
    num_frames: "int | None" = None,
    fps: "float | None" = None,
    times: "list[float] | None" = None,
    max_frames: "int | None" = None,
) -> "list[int]":
    """
    Choose frames of a clip. Nothing is drawn at random: the same clip always gives the same frames.

    Args:
        num_source_frames (`int`):
            Number of frames of the clip.
        num_frames (`int`, *optional*):
            Number of frames to take at equal distances, the first and the last one among them. A clip with fewer frames
            gives all.
        fps (`float`, *optional*):
            Frames to take for each second, from the first one on: those that are nearest in time. A clip with fewer frames
            a second gives all.
        times (`list[float]`, *optional*):
            Time of each frame of the clip in seconds. Needed for `fps`.
        max_frames (`int`, *optional*):
            Largest number of frames. Where more were chosen, these are thinned out at equal distances.

    Returns:
        `list[int]`: Indices of frames, in order.

    Raises:
        `ValueError`: If both `num_frames` and `fps` are given, `fps` without `times`, or a number is out of range.

    Example:

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
    """
    Make sure that frames can be chosen so.

    Args:
        num_frames (`int`, *optional*):
            Number of frames.
        fps (`float`, *optional*):
            Frames for each second.
        max_frames (`int`, *optional*):
            Largest number of frames.

    Raises:
        `ValueError`: If both `num_frames` and `fps` are given, or a number is out of range.
    """
    if num_frames is not None and fps is not None:
        raise ValueError(
            f"`num_frames` is {num_frames} and `fps` is {fps}, but frames are chosen by one. Drop the other."
        )
    for name, value in {"num_frames": num_frames, "max_frames": max_frames}.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 2):
            raise ValueError(f"`{name}` is {value!r}, but a clip has 2 frames or more. Pass such a number, or None.")
    if fps is not None and (isinstance(fps, bool) or not isinstance(fps, (int, float)) or not 0 < fps < float("inf")):
        raise ValueError(f"`fps` is {fps!r}, but must be a positive number of frames a second. Pass one, or None.")


class Clip(list):
    """
    Frames of a clip, with where they were in it.

    A plain list of frames is a clip too, but has no times: this class tells them to a judge that samples by `fps`.

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
        """`tuple[tuple[int, float | None], ...]`: Number, from 1, and time of each frame, as a judge is told them."""
        return _marks(self.indices, self.times)


@dataclass(eq=False)
class ClipReader:
    """
    Clip whose frames are not decoded yet. Made by [`open_clip`].

    Args:
        name (`str`):
            Name of the clip in error messages.
        indices (`list[int]`):
            Index of each frame in the source that it was or will be taken from.
        times (`list[float]`, *optional*):
            Time of each frame in seconds.
        num_source_frames (`int`):
            Number of frames of the source.
        frames (`list`, *optional*):
            Frames of a clip that is in memory: anything that is an image.
        decode (`Callable[[list[int]], list[PIL.Image.Image]]`, *optional*):
            Function that decodes frames of a file by their indices.
        size (`tuple[int, int]`, *optional*):
            Width and height of frames, where they are known.
    """

    name: str
    indices: "list[int]"
    times: "list[float] | None"
    num_source_frames: int
    frames: "list[Any] | None" = None
    decode: "Callable[[list[int]], list[Image.Image]] | None" = None
    size: "tuple[int, int] | None" = None

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def marks(self) -> "tuple[tuple[int, float | None], ...]":
        """`tuple[tuple[int, float | None], ...]`: Number, from 1, and time of each frame, as a judge is told them."""
        return _marks(self.indices, self.times)

    def sample(
        self, num_frames: "int | None" = None, fps: "float | None" = None, max_frames: "int | None" = None
    ) -> "ClipReader":
        """
        Take fewer frames, as [`sample_frame_indices`] chooses them.

        Args:
            num_frames (`int`, *optional*):
                Number of frames.
            fps (`float`, *optional*):
                Frames for each second.
            max_frames (`int`, *optional*):
                Largest number of frames.

        Returns:
            [`ClipReader`]: Reader of these frames.

        Raises:
            `ValueError`: If `fps` is given and the clip has no times.
        """
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
        """
        Give the frames, after decoding those that are needed.

        Returns:
            [`Clip`]: Frames, which may still be any kind of image if the clip was in memory.

        Raises:
            `ValueError`: If the file cannot be decoded, or frames differ in size.
        """
        frames = self.frames
        if frames is None:
            frames = self.decode(self.indices)
            _check_sizes(frames, self.name)
        return Clip(frames, indices=self.indices, times=self.times, num_source_frames=self.num_source_frames)


def _marks(indices: "list[int]", times: "list[float] | None") -> "tuple[tuple[int, float | None], ...]":
    return tuple((index + 1, times[i] if times else None) for i, index in enumerate(indices))


def open_clip(media: Any, name: str = "media") -> "ClipReader | None":
    """
    Open a clip without decoding its frames.

    Args:
        media (`list` of images, `torch.Tensor`, `numpy.ndarray`, [`Clip`], `PIL.Image.Image`, `str`, `os.PathLike`, `bytes` or `dict`):
            Frames, also as a tensor of shape `(frames, 3, height, width)` or an array of shape
            `(frames, height, width, 3)`; or an animated image (GIF, WebP, APNG, AVIF) or video file, as path, as bytes or
            as `{"bytes": ..., "path": ...}`. Video files need PyAV.
        name (`str`, *optional*, defaults to `"media"`):
            Name of the clip in error messages.

    Returns:
        [`ClipReader`] or None, if this is no clip. It may be an image, or nothing that can be read.

    Raises:
        `ValueError`: If the clip is damaged, has no frames, or its frames differ in size.
        `ImportError`: If this is a video file and PyAV is not installed.
    """
    if isinstance(media, ClipReader):
        return media
    if isinstance(media, dict):
        media = media.get("bytes") or media.get("path")
    if isinstance(media, (list, tuple)) or (isinstance(media, (torch.Tensor, np.ndarray)) and media.ndim == 4):
        if len(media) == 0:
            raise ValueError(f"`{name}` is a clip without frames, but must have at least one.")
        clip = media if isinstance(media, Clip) else Clip(media)
        size = _check_sizes(clip, name)
        return ClipReader(name, clip.indices, clip.times, clip.num_source_frames, frames=list(clip), size=size)
    if isinstance(media, Image.Image):
        return _open_animation(media, name) if _is_animated(media, name) else None
    if not isinstance(media, (str, os.PathLike, bytes)):
        return None
    try:
        with _opened(media) as file, Image.open(file) as image:
            return _open_animation(media, name) if _is_animated(image, name) else None
    except UnidentifiedImageError:
        with _opened(media) as file:
            head = file.read(377)
        return _open_video(media, name) if _looks_like_video(head) else None
    except IMAGE_ERRORS as error:
        if isinstance(error, ClipError):
            raise
        return None  # whoever reads it as an image will say why it cannot be


class ClipError(ValueError):
    """A clip cannot be read."""


def _unreadable(name: str, reason: Any) -> ClipError:
    return ClipError(
        f"`{name}` cannot be read as a clip ({reason}). Drop or replace it; it may be truncated or no clip."
    )


@contextmanager
def _opened(media: Any) -> Any:
    """File object: libraries that get a name would also open network addresses."""
    if isinstance(media, bytes):
        yield io.BytesIO(media)
    else:
        with open(media, "rb") as file:
            yield file


def _check_sizes(frames: "list[Any]", name: str) -> "tuple[int, int] | None":
    """Width and height that all frames have, as far as they can be told without decoding."""
    sizes = [_frame_size(frame) for frame in frames]
    known = [(i, size) for i, size in enumerate(sizes) if size is not None]
    for i, size in known:
        if size != known[0][1]:
            raise ClipError(
                f"`{name}[{i}]` has size {size}, but `{name}[{known[0][0]}]` has {known[0][1]}, and frames of a clip must be "
                "equal in size. Resize them, or pass images that belong to no clip one by one."
            )
    return known[0][1] if known else None


def _frame_size(frame: Any) -> "tuple[int, int] | None":
    if isinstance(frame, dict):
        frame = frame.get("bytes") or frame.get("path")
    if isinstance(frame, (str, os.PathLike, bytes)):
        try:
            with _opened(frame) as file, Image.open(file) as image:
                return _shown_size(image)
        except IMAGE_ERRORS:
            return None
    if isinstance(frame, Image.Image):
        return _shown_size(frame)
    if isinstance(frame, (torch.Tensor, np.ndarray)) and frame.ndim == 3:
        height, width = frame.shape[1:] if isinstance(frame, torch.Tensor) else frame.shape[:2]
        return int(width), int(height)
    return None


def _shown_size(image: Image.Image) -> "tuple[int, int]":
    is_turned = image.getexif().get(0x0112, 1) >= 5
    return image.size[::-1] if is_turned else image.size


# ---- animated images ----


def _is_animated(image: Image.Image, name: str) -> bool:
    if image.format not in ANIMATED_FORMATS:
        return False
    try:
        return getattr(image, "n_frames", 1) > 1
    except IMAGE_ERRORS as error:
        raise _unreadable(name, error) from error


@contextmanager
def _animation(media: Any, name: str) -> Any:
    """Opened image, which is left as it was found."""
    try:
        if isinstance(media, Image.Image):
            before = media.tell()
            try:
                yield media
            finally:
                media.seek(before)
        else:
            with _opened(media) as file, Image.open(file) as image:
                yield image
    except IMAGE_ERRORS as error:
        raise _unreadable(name, error) from error


def _open_animation(media: Any, name: str) -> ClipReader:
    """Frames are made of those before, so all are decoded here to find damage and times, and kept nowhere."""
    times, time = [], 0.0
    with _animation(media, name) as image:
        if image.format == "GIF" and image.fp is not None:
            _check_end_of_gif(image.fp)
        for index in range(image.n_frames):
            image.seek(index)
            image.load()
            times.append(time)
            time += (image.info.get("duration") or DEFAULT_DURATION) / 1000
        size = image.size

    def decode(indices: "list[int]") -> "list[Image.Image]":
        frames = []
        with _animation(media, name) as image:
            for index in indices:
                image.seek(index)
                frames.append(image.convert("RGB"))
        return frames

    return ClipReader(name, list(range(len(times))), times, len(times), decode=decode, size=size)


def _check_end_of_gif(file: Any) -> None:
    """A GIF that was cut between two frames looks like a shorter one, but lacks the last byte."""
    position = file.tell()
    file.seek(max(file.seek(0, os.SEEK_END) - 1024, 0))
    end = file.read().rstrip(b"\0")  # some programs pad
    file.seek(position)
    if not end.endswith(b";"):
        raise OSError("image file is truncated")


# ---- video files ----


def _looks_like_video(head: bytes) -> bool:
    """Only files that begin like a video go to FFmpeg, which would also take play lists and subtitles."""
    begins = (b"\x1aE\xdf\xa3", b"FLV", b"OggS", b"\0\0\1\xba", b"\0\0\1\xb3", b"DKIF", b"0&\xb2u\x8ef\xcf\x11")
    is_mp4 = head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")
    is_avi = head[:4] == b"RIFF" and head[8:12] == b"AVI "
    is_transport_stream = head[:1] == b"\x47" and head[188:189] == b"\x47"
    return head.startswith(begins) or is_mp4 or is_avi or is_transport_stream


@contextmanager
def _video(media: Any, name: str) -> Any:
    """Container and video stream."""
    try:
        import av
    except ImportError as error:
        raise ImportError(
            f"`{name}` is a video file, for which av is needed, but not installed. Install it with `pip install "
            "rewarddance_hf[video]` or `pip install av`, or pass a list of frames."
        ) from error
    try:
        with _opened(media) as file, av.open(file) as container:
            streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
            if not streams:
                kinds = sorted({stream.type for stream in container.streams})
                raise _unreadable(name, f"it has no video stream, only {kinds}")
            yield container, streams[0]
    except (av.error.FFmpegError, OSError, EOFError) as error:
        raise _unreadable(name, error) from error


def _open_video(media: Any, name: str) -> ClipReader:
    """Packets are counted, which takes no decoding."""
    pts: list[int] = []
    keys: list[int] = []
    end, count = 0.0, 0
    with _video(media, name) as (container, stream):
        announced, announced_end = stream.frames, (container.duration or 0) / 1e6 + (container.start_time or 0) / 1e6
        rate, base = stream.average_rate, stream.time_base
        size = (stream.codec_context.width, stream.codec_context.height)
        for packet in container.demux():
            if packet.size and packet.pts is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream is not stream or not packet.size or packet.is_discard:
                continue
            if packet.is_corrupt:
                raise _unreadable(name, f"packet {count} is damaged")
            count += 1
            if packet.pts is not None:
                pts.append(packet.pts)
                if packet.is_keyframe:
                    keys.append(packet.pts)
    if count == 0:
        raise _unreadable(name, "it has no frames")
    missing = announced - count
    # The duration of the last frame may not be known.
    late = announced_end - end > 1.5 / float(rate or 8) + 0.05
    if missing > 0 or late:
        raise _unreadable(
            name, f"{count} frames of {end:.2f} s are there, but {announced or announced_end} were announced"
        )
    if len(set(pts)) != count:
        pts = keys = []
        times = None if not rate else [float(index / rate) for index in range(count)]
    else:
        pts.sort()
        keys.sort()
        times = [float((moment - pts[0]) * base) for moment in pts]

    def decode(indices: "list[int]") -> "list[Image.Image]":
        frames: list[Image.Image] = []
        if pts:
            with _video(media, name) as (container, stream):
                frames = _decode_by_time(container, stream, [pts[i] for i in indices], keys)
        if len(frames) != len(indices):
            with _video(media, name) as (container, stream):
                frames = _decode_in_order(container, stream, indices)
        if len(frames) != len(indices):
            raise _unreadable(name, f"only {len(frames)} of {len(indices)} wanted frames can be decoded")
        return frames

    return ClipReader(name, list(range(count)), times, count, decode=decode, size=size)


def _decode_by_time(container: Any, stream: Any, wanted: "list[int]", keys: "list[int]") -> "list[Image.Image]":
    """Decode wanted frames and those that they are made of, and skip groups of frames that none is in."""
    frames: list[Image.Image] = []
    decoder, group = container.decode(stream), 0
    for moment in wanted:
        own = max(bisect.bisect_right(keys, moment) - 1, 0)
        if own > group + 1:
            container.seek(keys[own], stream=stream)
            decoder, group = container.decode(stream), own
        for frame in decoder:
            if frame.pts is not None and frame.pts >= moment:
                break
        else:
            return frames
        if frame.pts != moment:  # some containers cannot be told where to go
            return frames
        frames.append(_image(frame))
        group = own
    return frames


def _decode_in_order(container: Any, stream: Any, indices: "list[int]") -> "list[Image.Image]":
    wanted = set(indices)
    decoded = enumerate(container.decode(stream))
    return [_image(frame) for index, frame in decoded if index in wanted]


def _image(frame: Any) -> Image.Image:
    """Frame as a viewer shows it: cameras store the rotation beside the pixels."""
    image = frame.to_image()
    rotation = getattr(frame, "rotation", 0)
    return image.rotate(rotation, expand=True) if rotation else image
