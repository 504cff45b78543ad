"""Animated images and video files: the number of their frames, the time of each, and the decoded frames that are
wanted."""

import bisect
import io
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from PIL import Image


# Other files of several images (TIFF, the MPO of cameras) are no clips.
ANIMATED_FORMATS = ("AVIF", "GIF", "PNG", "WEBP")
# What viewers take where a file gives none.
DEFAULT_DURATION = 100  # milliseconds

# What Pillow raises for damaged animations.
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, Image.DecompressionBombError)


class ClipError(ValueError):
    """A clip cannot be read."""


@dataclass(frozen=True, eq=False)
class Recording:
    """Animated image or video file whose frames are not decoded yet."""

    num_frames: int
    times: "list[float] | None"  # of each frame in seconds
    size: "tuple[int, int]"  # width and height of frames
    decode: "Callable[[list[int]], list[Image.Image]]"  # frames by their indices


@contextmanager
def opened(media: Any) -> Any:
    """File object of a path or bytes: libraries that get a name would also open network addresses."""
    if isinstance(media, bytes):
        yield io.BytesIO(media)
    else:
        with open(media, "rb") as file:
            yield file


def _unreadable(name: str, reason: Any) -> ClipError:
    return ClipError(
        f"`{name}` cannot be read as a clip ({reason}). Drop or replace it; it may be truncated or no clip."
    )


# ---- animated images ----


def is_animated(image: Image.Image, name: str) -> bool:
    """Whether an opened image is a clip."""
    if image.format not in ANIMATED_FORMATS:
        return False
    try:
        return getattr(image, "n_frames", 1) > 1
    except IMAGE_ERRORS as error:
        raise _unreadable(name, error) from error


@contextmanager
def _frames(media: Any, name: str) -> Any:
    """Animated image, opened if it is a file, else left as it was found."""
    try:
        if isinstance(media, Image.Image):
            before = media.tell()
            try:
                yield media
            finally:
                media.seek(before)
        else:
            with opened(media) as file, Image.open(file) as image:
                yield image
    except IMAGE_ERRORS as error:
        raise _unreadable(name, error) from error


def open_animation(media: Any, image: Image.Image, name: str) -> Recording:
    """
    Open an animated image; `image` is `media`, opened. Frames are made of those before, so all are decoded here to
    find damage and times, and none is kept.
    """
    times, time = [], 0.0
    with _frames(image, name):
        for index in range(image.n_frames):
            image.seek(index)
            image.load()
            times.append(time)
            time += (image.info.get("duration") or DEFAULT_DURATION) / 1000
        size = image.size

    def decode(indices: "list[int]") -> "list[Image.Image]":
        frames = []
        with _frames(media, name) as image:
            for index in indices:
                image.seek(index)
                frames.append(image.convert("RGBA" if image.has_transparency_data else "RGB"))
        return frames

    return Recording(len(times), times, size, decode)


# ---- video files ----


def looks_like_video(head: bytes) -> bool:
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
        with opened(media) as file, av.open(file) as container:
            streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
            if not streams:
                kinds = sorted({stream.type for stream in container.streams})
                raise _unreadable(name, f"it has no video stream, only {kinds}")
            yield container, streams[0]
    except (av.error.FFmpegError, OSError, EOFError) as error:
        raise _unreadable(name, error) from error


def open_video(media: Any, name: str) -> Recording:
    """Open a video file. Packets are counted, which takes no decoding."""
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
        sizes = {frame.size for frame in frames}
        if len(sizes) > 1:
            raise _unreadable(name, f"its frames have the sizes {sorted(sizes)}, but must be equal in size")
        return frames

    return Recording(count, times, size, decode)


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


__all__ = ["ClipError", "Recording", "is_animated", "looks_like_video", "open_animation", "open_video", "opened"]
