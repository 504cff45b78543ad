"""Images and clips on the wire: sent without loss, and read within bounds."""

import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ..models.clips_rewarddance import Clip, ClipReader
from ..models.media_rewarddance import ADDRESS, load_image, open_clip
from ..models.video_rewarddance import IMAGE_ERRORS, is_animated
from .limits import ServerLimits
from .protocol import decode_base64


Description = dict[str, Any]


class MediaWriter:
    """
    Media of one request as descriptions, and the tensors that these name: files as they are, images in memory as their pixels,
    tensors without a gradient as the 8 bits that a judge sees, those with one as they are. Equal media are sent once.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.leaves: list[tuple[int, str, torch.Tensor]] = []  # row, name and tensor of what is to get a gradient
        self._written: dict[int, tuple[Any, Description | None]] = {}  # with the objects, whose `id` names them

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def mark(self) -> tuple[int, int]:
        """What [`~MediaWriter.forget`] goes back to."""
        return len(self.tensors), len(self.leaves)

    def forget(self, mark: tuple[int, int]) -> None:
        """Drop what was written since."""
        tensors, leaves = mark
        self.tensors = dict(list(self.tensors.items())[:tensors])
        self.leaves = self.leaves[:leaves]

    def write(self, media: Any, name: str, row: int = 0) -> Description | None:
        """Description of an image or clip, which `name` names in errors; None of None."""
        if media is None:
            return None
        if isinstance(media, Mapping):
            media = media.get("bytes") or media.get("path")
        if _requires_grad(media):
            description = self._add("tensor", media)
            self.leaves.append((row, description["tensor"], media))
            return description
        if id(media) not in self._written:
            self._written[id(media)] = (media, self._describe(media, name, row))
        return self._written[id(media)][1]

    def _describe(self, media: Any, name: str, row: int) -> Description | None:
        if getattr(media, "is_image", False):
            return self.write(media[0], name, row)
        if isinstance(media, ClipReader):
            media = media.read()
        elif isinstance(media, Image.Image) and is_animated(media, name):
            media = open_clip(media, name).read()  # type: ignore[union-attr]
        elif isinstance(media, (torch.Tensor, np.ndarray)) and media.ndim == 4:
            media = list(media)
        if isinstance(media, (list, tuple)):
            clip = media if isinstance(media, Clip) else Clip(media)
            frames = [self.write(frame, f"{name}[{index}]", row) for index, frame in enumerate(clip)]
            marks = {"indices": clip.indices, "times": clip.times, "num_source_frames": clip.num_source_frames}
            return {"frames": frames, **marks}
        if isinstance(media, (str, os.PathLike)) and not (isinstance(media, str) and ADDRESS.match(media)):
            try:
                with open(media, "rb") as file:
                    media = file.read()
            except OSError:
                load_image(media, name)  # which says what is wrong
                raise
        if isinstance(media, bytes):
            return self._add("file", torch.frombuffer(bytearray(media or b"\0"), dtype=torch.uint8))
        if isinstance(media, torch.Tensor) and media.ndim == 3 and media.shape[0] == 4:
            return self._add("tensor", media)
        return self._add("image", torch.from_numpy(_pixels(media, name)))

    def _add(self, kind: str, tensor: torch.Tensor) -> Description:
        name = str(len(self.tensors))  # rows may have one number: that of their dataset
        self.tensors[name] = tensor
        return {kind: name}


def _requires_grad(media: Any) -> bool:
    return isinstance(media, torch.Tensor) and media.requires_grad and torch.is_grad_enabled()


def _pixels(image: Any, name: str) -> np.ndarray:
    """Pixels `(height, width, channels)` of an image; opacity, which a judge shows before a background of its own, is kept."""
    if isinstance(image, np.ndarray) and image.ndim == 3 and image.shape[-1] == 4 and image.dtype == np.uint8:
        return np.ascontiguousarray(image)
    if isinstance(image, Image.Image) and image.has_transparency_data:
        try:
            return np.array(ImageOps.exif_transpose(image).convert("RGBA"))
        except IMAGE_ERRORS:
            pass  # said below
    return np.array(load_image(image, name))


class MediaReader:
    """
    Media of one request from their descriptions. Only bytes of the request are read: text is never used as a path.

    Args:
        tensors (`dict[str, torch.Tensor]`):
            Tensors of the request.
        limits ([`ServerLimits`]):
            Bounds.
        leaves (`list[str]`, *optional*):
            Names of tensors that are to get a gradient.
        device (`torch.device`, *optional*, defaults to `"cpu"`):
            Device of these.
    """

    def __init__(
        self, tensors: dict[str, torch.Tensor], limits: ServerLimits, leaves: Sequence[str] = (), device: Any = "cpu"
    ) -> None:
        self.tensors = dict(tensors)
        self.limits = limits
        self.num_bytes = 0  # that decoded images will take
        self._read: dict[tuple[str, str], Any] = {}
        for name in leaves:
            if name not in tensors or not tensors[name].is_floating_point():
                raise ValueError(f"`requires_grad` has {name!r}, but no tensor of floats has this name.")
            self.tensors[name] = tensors[name].to(device).requires_grad_()

    def read(self, description: Any, name: str) -> Any:
        """Image or clip of a description, with bounds checked before anything is decoded."""
        if isinstance(description, str):
            return self._open(decode_base64(description, name), name)
        if isinstance(description, list):  # a clip in JSON
            description = {"frames": description}
        if not isinstance(description, Mapping) or not description:
            raise TypeError(
                f"`{name}` is of type `{type(description).__name__}`, but must be an image in base64, or a list of those."
            )
        if "frames" in description:
            return self._clip(description, name)
        kind, tensor = next(iter(description.items()))
        key = (kind, str(tensor))
        if key not in self._read:
            if tensor not in self.tensors:
                raise ValueError(f"`{name}` is the tensor {tensor!r}, but the body has none of this name.")
            self._read[key] = self._take(kind, self.tensors[tensor], name)
        return self._read[key]

    def _clip(self, description: Mapping[str, Any], name: str) -> Clip:
        frames = description["frames"]
        if not isinstance(frames, list):
            raise TypeError(f"`{name}` has frames of type `{type(frames).__name__}`, but must have a list of them.")
        self.limits.check_frames(len(frames), name)
        marks = {key: description.get(key) for key in ("fps", "indices", "times", "num_source_frames")}
        for key, value in marks.items():
            numbers = value if isinstance(value, list) else [] if value is None else [value]
            if any(isinstance(number, bool) or not isinstance(number, (int, float)) for number in numbers):
                raise TypeError(f"`{name}` has {key} that are no numbers.")
        return Clip([self.read(frame, f"{name}[{index}]") for index, frame in enumerate(frames)], **marks)

    def _take(self, kind: str, tensor: torch.Tensor, name: str) -> Any:
        if kind == "file" and tensor.dtype == torch.uint8 and tensor.ndim == 1:
            return self._open(tensor.numpy().tobytes(), name)
        if kind == "image" and tensor.dtype == torch.uint8 and tensor.ndim == 3:
            self.num_bytes += self.limits.check_size(tensor.shape[1], tensor.shape[0], name)
            return tensor.numpy()
        if kind == "tensor" and tensor.ndim in (3, 4):
            if tensor.ndim == 4:
                self.limits.check_frames(len(tensor), name)
            size = self.limits.check_size(tensor.shape[-1], tensor.shape[-2], name)
            self.num_bytes += 4 * size * (len(tensor) if tensor.ndim == 4 else 1)
            return tensor
        raise ValueError(
            f"`{name}` is {kind!r} of shape {tuple(tensor.shape)} and type {tensor.dtype}, which is no image of this protocol."
        )

    def _open(self, content: bytes, name: str) -> Any:
        """Check the header of an encoded image, animation or video. What cannot be read is left to the judge to refuse."""
        count = 1
        try:
            with Image.open(io.BytesIO(content)) as image:
                width, height = image.size
                if is_animated(image, name):
                    count = getattr(image, "n_frames", 1)
        except Image.DecompressionBombError as error:
            raise ValueError(
                f"`{name}` is larger than the {self.limits.max_pixels} pixels that this server takes ({error})."
            ) from error
        except UnidentifiedImageError:
            reader = open_clip(content, name)  # a video, or nothing
            if reader is None or reader.size is None:
                return content
            (width, height), count = reader.size, len(reader)
        except IMAGE_ERRORS:
            return content
        self.limits.check_frames(count, name)
        self.num_bytes += count * self.limits.check_size(width, height, name)
        return content
