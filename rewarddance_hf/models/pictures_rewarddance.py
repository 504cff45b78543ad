"""Pictures and clips in any form, loaded and checked."""

import io
import os
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from .video_rewarddance import Clip, ClipReader, open_clip


def load_picture(picture: Any, name: str = "picture", keep_gradient: bool = False) -> Any:
    """
    Load a picture and make sure that it can be read.

    Args:
        picture (`PIL.Image.Image`, `str`, `os.PathLike`, `bytes`, `dict`, `numpy.ndarray` or `torch.Tensor`):
            Image, path, encoded bytes, `{"bytes": ..., "path": ...}` as in undecoded `datasets`, array of shape
            `(height, width, 3)` with `uint8` values, or tensor of shape `(3, height, width)` with `uint8` values or
            floats in `[0, 1]`.
        name (`str`, *optional*, defaults to `"picture"`):
            Name of the picture in error messages.
        keep_gradient (`bool`, *optional*, defaults to `False`):
            Whether to give back a tensor that requires a gradient as it is, after the same checks. Without it such a
            tensor is refused, as an image has no gradient. Does not matter under `torch.no_grad()`.

    Returns:
        `PIL.Image.Image`: RGB image, or the tensor with `keep_gradient`.

    Raises:
        `ValueError`: If the picture is corrupt, empty or out of range.
        `TypeError`: If it is none of the above.
    """
    if keep_gradient and isinstance(picture, torch.Tensor) and picture.requires_grad and torch.is_grad_enabled():
        load_picture(picture.detach(), name)
        return picture
    if isinstance(picture, dict):
        picture = picture.get("bytes") or picture.get("path")
    if isinstance(picture, (np.ndarray, torch.Tensor)):
        picture = _picture_from_array(picture, name)
    try:
        if isinstance(picture, (str, os.PathLike)):
            picture = Image.open(picture)
        elif isinstance(picture, bytes):
            picture = Image.open(io.BytesIO(picture))
        if isinstance(picture, Image.Image):
            picture.load()
            mode = picture.mode
            picture = ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"`{name}` cannot be read as a picture ({error}). Drop or replace it; it may be truncated or no picture at all."
        ) from error
    if not isinstance(picture, Image.Image):
        raise TypeError(
            f"`{name}` is of type `{type(picture).__name__}`, but must be a PIL image, path, bytes, array or tensor."
        )
    if mode[0] in "IF":
        raise ValueError(
            f"`{name}` has mode {mode!r}, but values beyond 8 bits would be cut off. Scale it to 8 bits a channel first."
        )
    if min(picture.size) < 1:
        raise ValueError(
            f"`{name}` has size {picture.size}, but must be at least 1 pixel wide and high. Drop or replace it."
        )
    return picture


def load_frames(media: Any, name: str = "media", keep_gradient: bool = False) -> Clip:
    """
    Load a picture as one frame, or all frames of a clip. [`RewardDanceProcessor.load_frames`] loads those that a judge sees.

    Args:
        media (picture, clip, `list` of pictures, or `torch.Tensor` of shape `(frames, 3, height, width)`):
            Anything that [`load_picture`] or [`~rewarddance_hf.models.video_rewarddance.open_clip`] takes.
        name (`str`, *optional*, defaults to `"media"`):
            Name in error messages.
        keep_gradient (`bool`, *optional*, defaults to `False`):
            Whether to leave tensors that require a gradient as they are, as in [`load_picture`].

    Returns:
        [`~rewarddance_hf.models.video_rewarddance.Clip`]: List of RGB images, beside tensors with `keep_gradient`.

    Raises:
        `ValueError`: If a clip has no frames or frames of different size, or cannot be read.
        `ImportError`: If this is a video file and PyAV is not installed.
    """
    reader = open_clip(media, name)
    return Clip([load_picture(media, name, keep_gradient)]) if reader is None else read_clip(reader, keep_gradient)


def read_clip(reader: ClipReader, keep_gradient: bool) -> Clip:
    clip = reader.read()
    names = [f"{reader.name}[{index}]" for index in clip.indices]
    clip[:] = [load_picture(frame, name, keep_gradient) for frame, name in zip(clip, names, strict=True)]
    return clip


def _picture_from_array(array: "np.ndarray | torch.Tensor", name: str) -> Image.Image:
    if isinstance(array, torch.Tensor):
        if array.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"`{name}` requires a gradient, but this path goes through PIL images and would cut it off. Pass "
                "`picture.detach()` instead, or score it: `RewardDanceProcessor` and `RewardDanceScorer.score` keep it."
            )
        if array.ndim != 3 or array.shape[0] != 3:
            raise ValueError(
                f"`{name}` has shape {tuple(array.shape)}, but a tensor must be of shape `(3, height, width)`."
            )
        if array.is_floating_point():
            if array.numel() and not (array.isfinite().all() and array.min() >= 0 and array.max() <= 1):
                raise ValueError(
                    f"`{name}` has values from {array.min():.3g} to {array.max():.3g}, but floats must be finite and in "
                    "`[0, 1]`. Rescale it, e.g. `(picture / 2 + 0.5).clamp(0, 1)` for the output of a VAE."
                )
            array = (array.float() * 255).round().to(torch.uint8)
        array = array.permute(1, 2, 0).cpu().numpy()
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
        raise ValueError(
            f"`{name}` has shape {array.shape} and type {array.dtype}, but an array must be of shape `(height, width, 3)` "
            "and type uint8."
        )
    return Image.fromarray(array)
