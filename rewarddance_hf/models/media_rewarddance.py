"""Images and clips in any form, loaded and checked."""

import io
import os
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from .video_rewarddance import Clip, ClipReader, open_clip


def load_image(image: Any, name: str = "image", keep_gradient: bool = False) -> Any:
    """
    Load an image and make sure that it can be read.

    Args:
        image (`PIL.Image.Image`, `str`, `os.PathLike`, `bytes`, `dict`, `numpy.ndarray` or `torch.Tensor`):
            Image, path, encoded bytes, `{"bytes": ..., "path": ...}` as in undecoded `datasets`, array of shape
            `(height, width, 3)` with `uint8` values, or tensor of shape `(3, height, width)` with `uint8` values or
            floats in `[0, 1]`.
        name (`str`, *optional*, defaults to `"image"`):
            Name of the image in error messages.
        keep_gradient (`bool`, *optional*, defaults to `False`):
            Whether to give back a tensor that requires a gradient as it is, after the same checks. Without it such a
            tensor is refused, as an image has no gradient. Does not matter under `torch.no_grad()`.

    Returns:
        `PIL.Image.Image`: RGB image, or the tensor with `keep_gradient`.

    Raises:
        `ValueError`: If the image is corrupt, empty or out of range.
        `TypeError`: If it is none of the above.
    """
    if keep_gradient and isinstance(image, torch.Tensor) and image.requires_grad and torch.is_grad_enabled():
        load_image(image.detach(), name)
        return image
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, (np.ndarray, torch.Tensor)):
        image = _image_from_array(image, name)
    try:
        if isinstance(image, (str, os.PathLike)):
            image = Image.open(image)
        elif isinstance(image, bytes):
            image = Image.open(io.BytesIO(image))
        if isinstance(image, Image.Image):
            image.load()
            mode = image.mode
            image = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"`{name}` cannot be read as an image ({error}). Drop or replace it; it may be truncated or no image at all."
        ) from error
    if not isinstance(image, Image.Image):
        raise TypeError(
            f"`{name}` is of type `{type(image).__name__}`, but must be a PIL image, path, bytes, array or tensor."
        )
    if mode[0] in "IF":
        raise ValueError(
            f"`{name}` has mode {mode!r}, but values beyond 8 bits would be cut off. Scale it to 8 bits a channel first."
        )
    if min(image.size) < 1:
        raise ValueError(
            f"`{name}` has size {image.size}, but must be at least 1 pixel wide and high. Drop or replace it."
        )
    return image


def load_frames(media: Any, name: str = "media", keep_gradient: bool = False) -> Clip:
    """
    Load an image as one frame, or all frames of a clip. [`RewardDanceProcessor.load_frames`] loads those that a judge sees.

    Args:
        media (image, clip, `list` of images, or `torch.Tensor` of shape `(frames, 3, height, width)`):
            Anything that [`load_image`] or [`~rewarddance_hf.models.video_rewarddance.open_clip`] takes.
        name (`str`, *optional*, defaults to `"media"`):
            Name in error messages.
        keep_gradient (`bool`, *optional*, defaults to `False`):
            Whether to leave tensors that require a gradient as they are, as in [`load_image`].

    Returns:
        [`~rewarddance_hf.models.video_rewarddance.Clip`]: List of RGB images, beside tensors with `keep_gradient`.

    Raises:
        `ValueError`: If a clip has no frames or frames of different size, or cannot be read.
        `ImportError`: If this is a video file and PyAV is not installed.
    """
    reader = open_clip(media, name)
    return Clip([load_image(media, name, keep_gradient)]) if reader is None else read_clip(reader, keep_gradient)


def read_clip(reader: ClipReader, keep_gradient: bool) -> Clip:
    clip = reader.read()
    names = [f"{reader.name}[{index}]" for index in clip.indices]
    clip[:] = [load_image(frame, name, keep_gradient) for frame, name in zip(clip, names, strict=True)]
    return clip


def _image_from_array(array: "np.ndarray | torch.Tensor", name: str) -> Image.Image:
    if isinstance(array, torch.Tensor):
        if array.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"`{name}` requires a gradient, but this path goes through PIL images and would cut it off. Pass "
                "`image.detach()` instead, or score it: `RewardDanceProcessor` and `RewardDanceScorer.score` keep it."
            )
        if array.ndim != 3 or array.shape[0] != 3:
            raise ValueError(
                f"`{name}` has shape {tuple(array.shape)}, but a tensor must be of shape `(3, height, width)`."
            )
        if array.is_floating_point():
            if array.numel() and not (array.isfinite().all() and array.min() >= 0 and array.max() <= 1):
                raise ValueError(
                    f"`{name}` has values from {array.min():.3g} to {array.max():.3g}, but floats must be finite and in "
                    "`[0, 1]`. Rescale it, e.g. `(image / 2 + 0.5).clamp(0, 1)` for the output of a VAE."
                )
            array = (array.float() * 255).round().to(torch.uint8)
        array = array.permute(1, 2, 0).cpu().numpy()
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
        raise ValueError(
            f"`{name}` has shape {array.shape} and type {array.dtype}, but an array must be of shape `(height, width, 3)` "
            "and type uint8."
        )
    return Image.fromarray(array)
