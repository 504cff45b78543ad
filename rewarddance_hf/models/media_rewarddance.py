"""Images and clips of any form become RGB frames, which know their place in the clip."""

import io
import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from .clips_rewarddance import Clip, ClipReader
from .video_rewarddance import (
    IMAGE_ERRORS,
    ClipError,
    Recording,
    is_animated,
    looks_like_video,
    open_animation,
    open_video,
    opened,
)


ORIENTATION = 0x0112  # tag of EXIF
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:")


# ---- images ----


def load_image(image: Any, name: str = "image", keep_gradient: bool = False, background: str = "white") -> Any:
    """
    Load an image and make sure that it can be read. An RGB image of Pillow in memory is returned as it is.

    Args:
        image (`PIL.Image.Image`, `str`, `os.PathLike`, `bytes`, `dict`, `numpy.ndarray` or `torch.Tensor`):
            Image, path, encoded bytes, `{"bytes": ..., "path": ...}` as in undecoded `datasets`, array of shape
            `(height, width, 3)` with `uint8` values or floats in `[0, 1]`, or tensor of shape `(3, height, width)` with `uint8` values or
            floats in `[0, 1]`. Arrays and tensors may have a fourth channel, the opacity.
        name (`str`, *optional*, defaults to `"image"`):
            Name of the image in error messages.
        keep_gradient (`bool`, *optional*, defaults to `False`):
            Whether to return a tensor that requires a gradient as a tensor, after the same checks. Without it such a
            tensor is refused, as an image has no gradient. Does not matter under `torch.no_grad()`.
        background (`str`, *optional*, defaults to `"white"`):
            Color behind what is transparent: a name or `"#rrggbb"`.

    Returns:
        `PIL.Image.Image`: RGB image, or the tensor of shape `(3, height, width)` with `keep_gradient`.

    Raises:
        `ValueError`: If the image is corrupt, empty or out of range, or is an address.
        `TypeError`: If it is none of the above.
    """
    file = image if isinstance(image, (str, os.PathLike)) else getattr(image, "filename", "")
    if isinstance(image, dict):
        file, image = image.get("path"), image.get("bytes") or image.get("path")
    if isinstance(image, torch.Tensor):
        image = _check_tensor(image, name)
        if image.shape[0] == 4:
            image = _on_background(image, background)
        if image.requires_grad and torch.is_grad_enabled():
            if keep_gradient:
                return image
            raise ValueError(
                f"`{name}` requires a gradient, but this path goes through PIL images and would cut it off. Pass "
                "`image.detach()` instead, or score it: `RewardDanceProcessor` and `RewardDanceScorer.score` keep it."
            )
        if image.is_floating_point():
            image = (image.detach().float() * 255).round().to(torch.uint8)
        image = image.permute(1, 2, 0).cpu().numpy()
    if isinstance(image, np.ndarray):
        if image.dtype.kind == "f" and image.ndim == 3 and image.size:  # as pipelines of diffusers give them
            _check_range(image.min(), image.max(), name)
            image = (image.astype(np.float32) * 255).round().astype(np.uint8)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] not in (3, 4):
            raise ValueError(
                f"`{name}` has shape {image.shape} and type {image.dtype}, but an array must be of shape `(height, width, 3)` "
                "or `(height, width, 4)` and type uint8, or floats in `[0, 1]`."
            )
        _check_size(image.shape[1::-1], name)
        image = Image.fromarray(image)
    if isinstance(image, str) and ADDRESS.match(image):
        raise ValueError(
            f"`{name}` is the address {image[:60]!r}, but nothing is downloaded here. Pass the path or the bytes of the image."
        )
    if not isinstance(image, (str, os.PathLike, bytes, Image.Image)):
        raise TypeError(
            f"`{name}` is of type `{type(image).__name__}`, but must be a PIL image, path, bytes, array or tensor. Pass one, "
            "or drop the row."
        )
    try:
        if isinstance(image, (str, os.PathLike)):
            image = Image.open(image)
        elif isinstance(image, bytes):
            image = Image.open(io.BytesIO(image))
        image.load()
        mode = image.mode
        if image.getexif().get(ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            shown = Image.new("RGB", image.size, background)
            shown.paste(image, mask=image)
            image = shown
        elif mode != "RGB" or type(image) is not Image.Image:  # images of files may keep these open
            image = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = f"{file}: {error}" if file and str(file) not in str(error) else error
        raise ValueError(
            f"`{name}` cannot be read as an image ({reason}). Drop or replace it; it may be truncated or no image at all."
        ) from error
    if mode[0] in "IF":
        raise ValueError(
            f"`{name}` has mode {mode!r}, but values beyond 8 bits would be cut off. Scale it to 8 bits a channel first."
        )
    _check_size(image.size, name)
    return image


def _check_size(size: "tuple[int, ...]", name: str) -> None:
    if min(size) < 1:
        raise ValueError(
            f"`{name}` has size {tuple(size)}, but must be at least 1 pixel wide and high. Drop or replace it."
        )


def _check_range(lowest: Any, highest: Any, name: str) -> None:
    """Make sure that floats are in `[0, 1]`; NaN, which both ends of its range then are, is not."""
    if not (lowest >= 0 and highest <= 1):
        raise ValueError(
            f"`{name}` has values from {lowest:.6g} to {highest:.6g}, but floats must be finite and in "
            "`[0, 1]`. Rescale it, e.g. `(image / 2 + 0.5).clamp(0, 1)` for the output of a VAE; `image.clamp(0, 1)` cuts "
            "off what is rounded."
        )


def _check_tensor(image: torch.Tensor, name: str) -> torch.Tensor:
    if image.ndim != 3 or image.shape[0] not in (3, 4):
        raise ValueError(
            f"`{name}` has shape {tuple(image.shape)}, but a tensor must be of shape `(3, height, width)`, or "
            "`(4, height, width)` with opacity."
        )
    _check_size((image.shape[2], image.shape[1]), name)
    if image.is_floating_point():
        values = image.detach()
        _check_range(values.min(), values.max(), name)
    elif image.dtype != torch.uint8:
        kind = str(image.dtype).removeprefix("torch.")
        raise ValueError(
            f"`{name}` has shape {tuple(image.shape)} and type {kind}, but a tensor must be of type uint8 or of floats in "
            "`[0, 1]`."
        )
    return image


def _on_background(image: torch.Tensor, background: str) -> torch.Tensor:
    """Image without its opacity, as Pillow composes it."""
    if not image.is_floating_point():
        image = image.float() / 255
    color = torch.tensor(ImageColor.getrgb(background)[:3], dtype=image.dtype, device=image.device) / 255
    return image[:3] * image[3:] + color[:, None, None] * (1 - image[3:])


# ---- clips ----


def open_media(media: Any, name: str, still: "Callable[[Any], Any]") -> Any:
    """
    Open a clip as [`open_clip`], or give `still(image)` of a single image or of what cannot be read. A file
    is opened once for both.
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
        return _reader(open_animation(media, media, name), name) if is_animated(media, name) else still(media)
    if not isinstance(media, (str, os.PathLike, bytes)):
        return still(media)
    with ExitStack() as stack:
        try:
            file = stack.enter_context(opened(media))
            image = stack.enter_context(Image.open(file))
        except UnidentifiedImageError:
            file.seek(0)
            return _reader(open_video(media, name), name) if looks_like_video(file.read(377)) else still(media)
        except IMAGE_ERRORS:
            return still(media)  # which says why it cannot be read
        if not isinstance(media, bytes):
            image.filename = os.fspath(media)  # for messages
        return _reader(open_animation(media, image, name), name) if is_animated(image, name) else still(image)


def _reader(recording: Recording, name: str) -> ClipReader:
    count = recording.num_frames
    return ClipReader(name, list(range(count)), recording.times, count, decode=recording.decode, size=recording.size)


def open_clip(media: Any, name: str = "media") -> "ClipReader | None":
    """
    Clip whose frames are not decoded, or None if this is an image or cannot be read. Clips are lists of images,
    tensors `(frames, 3, height, width)` and arrays `(frames, height, width, 3)`; animated images (GIF, WebP, APNG, AVIF) and
    video files as path, bytes or `{"bytes": ..., "path": ...}`. Video files need PyAV.
    """
    return open_media(media, name, lambda image: None)


def load_frames(media: Any, name: str = "media", keep_gradient: bool = False, background: str = "white") -> Clip:
    """
    Load an image as one frame, or all frames of a clip. [`RewardDanceProcessor.load_frames`] loads those that a judge sees.

    Args:
        media (image, clip, `list` of images, or `torch.Tensor` of shape `(frames, 3, height, width)`):
            Anything that [`load_image`] or [`open_clip`] takes.
        name (`str`, *optional*, defaults to `"media"`):
            Name in error messages.
        keep_gradient (`bool`, *optional*, defaults to `False`):
            Whether to leave tensors that require a gradient as they are, as in [`load_image`].
        background (`str`, *optional*, defaults to `"white"`):
            Color behind what is transparent, as in [`load_image`].

    Returns:
        [`~rewarddance_hf.models.clips_rewarddance.Clip`]: List of RGB images, beside tensors with `keep_gradient`.

    Raises:
        `ValueError`: If a clip has no frames or frames of different size, or cannot be read.
        `ImportError`: If this is a video file and PyAV is not installed.
    """
    found = open_media(media, name, lambda image: Clip([load_image(image, name, keep_gradient, background)]))
    return read_clip(found, keep_gradient, background) if isinstance(found, ClipReader) else found


def read_clip(reader: ClipReader, keep_gradient: bool = False, background: str = "white") -> Clip:
    """Decode and load the frames of an opened clip, with arguments of [`load_image`]."""
    clip = reader.read()
    names = [f"{reader.name}[{index}]" for index in clip.indices]
    clip[:] = [load_image(frame, name, keep_gradient, background) for frame, name in zip(clip, names, strict=True)]
    return clip


def _check_sizes(frames: "list[Any]", name: str) -> "tuple[int, int] | None":
    """Width and height that all frames have, as far as they can be told without decoding."""
    known = [(i, size) for i, size in enumerate(map(_frame_size, frames)) if size is not None]
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
            with opened(frame) as file, Image.open(file) as image:
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
    is_turned = image.getexif().get(ORIENTATION, 1) >= 5
    return image.size[::-1] if is_turned else image.size


__all__ = ["load_frames", "load_image", "open_clip", "open_media", "read_clip"]
