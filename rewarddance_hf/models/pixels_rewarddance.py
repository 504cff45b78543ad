"""
Differentiable pixels: the gradient of a judge reaches the images that it judges, without torchvision.

The forward pass is that of the image processor of transformers on the image rounded to 8 bits, bit by bit: the reward
that is tuned is the reward that is reported. The backward pass is that of the same processing without rounding
(straight-through). To find it, the image processor is run a second time, on pixel numbers in place of colors, while
its linear operations (resize, rescale, normalize) are written down on a tape; where the numbers end up shows how it
cuts, pads and orders pixels. So there is no second implementation of any model's preprocessing here, and the tape is
played forward and compared with the image processor's own result at each call.
"""

import copy
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature


# Numbers of pixels are bit patterns of float32, from -256 down to the last before minus infinity: image processors may
# convert between types of floats. Other values are constants, such as the color of a border.
FIRST_NUMBER = 0xC3800000
NUM_NUMBERS = 0xFF800000 - FIRST_NUMBER

# Largest difference to the image processor's own result, in levels of 8 bits: of operations that are the same, and on
# average of operations of torchvision, which round otherwise for floats.
MAX_DIFFERENCE = 0.01
MAX_MEAN_DIFFERENCE = 8.0


def preprocess_with_gradient(
    vlm_processor: Any, images: "list[list[Any]]", exact: bool = True, **kwargs: Any
) -> BatchFeature:
    """
    Run a processor of transformers on images of which some require a gradient.

    `images` are PIL images or tensors `(3, height, width)` in `[0, 1]`, for each row of the batch. The `pixel_values`
    of the batch have a gradient; they are on the device of the first tensor that requires one, as float64 if a tensor
    is. Without `exact` they are those of the smooth function whose gradient is passed back, without rounding: for
    finite differences. An image processor whose gradient cannot be found raises `NotImplementedError`.
    """
    image_processor = vlm_processor.image_processor
    flat = [image for row in images for image in row]
    leaders = [image for image in flat if isinstance(image, torch.Tensor) and image.requires_grad]
    if not leaders:
        raise ValueError(
            "`images` has no tensor that requires a gradient. Call the processor itself, or `requires_grad_()` first."
        )
    device = leaders[0].device
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in leaders) else torch.float32
    colors = [_to_colors(image, device, dtype, exact) for image in flat]  # (3, height, width), 0 to 255
    stills = [[_to_image(image) for image in row] for row in images]

    if _backend(image_processor) is None:
        raise _unsupported(image_processor, "is not built on a backend of transformers")
    is_pil = _backend(image_processor).__name__ == "PilBackend"
    tape = _Tape(exact)
    recorder = tape.recorder(image_processor) if is_pil else copy.copy(image_processor)
    batch, prepared, arguments, settings = _run_and_record(vlm_processor, recorder, images=stills, **kwargs)
    if [tuple(image.shape) for image in _flatten(prepared)] != [tuple(color.shape) for color in colors]:
        raise _unsupported(image_processor, "changes images before its `_preprocess`")
    settings = {**settings, "return_tensors": "pt"}

    if is_pil:
        numbers = iter([tape.append(tuple(color.shape)) for color in colors])
        try:
            output = tape.tracer(image_processor)._preprocess(_like(prepared, numbers), *arguments, **settings)
            pixel_values = tape.play(colors, output["pixel_values"].numpy())
        except (LookupError, StopIteration, TypeError, ValueError) as error:
            raise _unsupported(image_processor, "calculates with pixels in ways of its own") from error
    else:
        processor = _rounding(image_processor) if exact else image_processor
        output = processor._preprocess(_like(prepared, iter(colors)), *arguments, **settings)
        pixel_values = output["pixel_values"]

    stock = batch["pixel_values"].to(pixel_values)
    if pixel_values.shape != stock.shape or not pixel_values.requires_grad:
        raise _unsupported(image_processor, "gives pixels of another shape or without gradient")
    difference = (pixel_values.detach() - stock).abs() / _level(settings)
    off = difference.max() / MAX_DIFFERENCE if is_pil and exact else difference.mean() / MAX_MEAN_DIFFERENCE
    if not off <= 1:
        raise _unsupported(image_processor, f"gives pixels that differ by {difference.max():.2g} of 255 levels")
    batch["pixel_values"] = _StraightThrough.apply(pixel_values, stock) if exact else pixel_values
    return batch


def watch_resizing(vlm_processor: Any, watch: "Callable[[Any], None]") -> Any:
    """
    Copy of a processor of transformers that calls `watch` with each image right after resizing, an array or tensor of shape
    `(..., height, width)`. It is never called where the image processor is not built on a backend of transformers.
    """
    backend = _backend(vlm_processor.image_processor)

    def resize(other: Any, image: Any, *args: Any, **kwargs: Any) -> Any:
        result = backend.resize(other, image, *args, **kwargs)
        watch(result)
        return result

    vlm_processor = copy.copy(vlm_processor)
    if backend is not None:
        vlm_processor.image_processor = _with_methods(vlm_processor.image_processor, resize=resize)
    return vlm_processor


def _backend(image_processor: Any) -> Any:
    """Class of transformers that an image processor does its work with."""
    names = ("PilBackend", "TorchvisionBackend")
    return next((base for base in type(image_processor).__mro__ if base.__name__ in names), None)


def _unsupported(image_processor: Any, reason: str) -> NotImplementedError:
    return NotImplementedError(
        f"`images` require a gradient, but the image processor `{type(image_processor).__name__}` {reason}, which would cut "
        "it off or falsify it. Gradients pass through image processors of transformers that are built on `PilBackend` "
        "(e.g. of InternVL, Qwen-VL, LLaVA-OneVision, Gemma 3, GLM-4V, Idefics3, SmolVLM) or on `TorchvisionBackend`. "
        'Install torchvision and load the processor with `backend="torchvision"`, or score `images.detach()`.'
    )


def _to_image(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    levels = (image.detach().float() * 255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


def _to_colors(image: Any, device: torch.device, dtype: torch.dtype, exact: bool) -> torch.Tensor:
    """Levels 0 to 255 of an image, rounded or not."""
    if isinstance(image, Image.Image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).to(device, dtype)
    colors = image.to(device, dtype) * 255
    return _StraightThrough.apply(colors, (image.detach().float() * 255).round().to(colors)) if exact else colors


class _StraightThrough(torch.autograd.Function):
    """Wanted values with the gradient of others."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return wanted

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> "tuple[torch.Tensor, None]":  # type: ignore[override]
        return gradient, None


def _run_and_record(vlm_processor: Any, recorder: Any, **kwargs: Any) -> "tuple[BatchFeature, Any, Any, Any]":
    """Batch of a processor, and what its image processor got: prepared images, arguments and all settings in force."""
    calls: list[tuple[Any, Any, Any]] = []
    preprocess = recorder._preprocess

    def record(images: Any, *args: Any, **settings: Any) -> BatchFeature:
        calls.append((images, args, settings))
        return preprocess(images, *args, **settings)

    recorder._preprocess = record
    vlm_processor = copy.copy(vlm_processor)
    vlm_processor.image_processor = recorder
    batch = vlm_processor(**kwargs)
    if len(calls) != 1 or "pixel_values" not in batch:
        raise _unsupported(recorder, f"calls its `_preprocess` {len(calls)} times or gives no `pixel_values`")
    return (batch, *calls[0])


def _flatten(nested: Any) -> "list[Any]":
    if not isinstance(nested, (list, tuple)):
        return [nested]
    return [item for part in nested for item in _flatten(part)]


def _like(nested: Any, items: Any) -> Any:
    """Items in the nesting of others."""
    if not isinstance(nested, (list, tuple)):
        return next(items)
    return [_like(part, items) for part in nested]


def _level(settings: "dict[str, Any]") -> float:
    """What one of 255 levels becomes in `pixel_values`."""
    level = settings["rescale_factor"] if settings.get("do_rescale") else 1.0
    if settings.get("do_normalize"):
        level /= float(np.min(settings["image_std"]))
    return level


class _Tape:
    """
    Linear operations on images, written down by numbers of pixels and played with colors.

    Every operation gives an image, a piece of the tape, whose pixels are numbered on from those of the piece before.
    """

    def __init__(self, exact: bool) -> None:
        self.exact = exact
        self.length = 0
        self.starts: list[int] = []
        self.steps: list[tuple[Callable[[torch.Tensor], torch.Tensor], np.ndarray] | None] = []
        self.resized: list[tuple[np.ndarray, np.ndarray, Image.Resampling]] = []

    def recorder(self, image_processor: Any) -> Any:
        """Copy of an image processor that keeps every image before and after resizing, as Pillow rounds it."""
        backend = _backend(image_processor)

        def resize(other: Any, image: np.ndarray, size: Any, resample: Any = None, **kwargs: Any) -> np.ndarray:
            if kwargs.get("reducing_gap") is not None:
                raise _unsupported(image_processor, f"resizes with `reducing_gap={kwargs['reducing_gap']}`")
            result = backend.resize(other, image, size, resample=resample, **kwargs)
            self.resized.append((image, result, _resampling(image_processor, resample)))
            return result

        return _with_methods(image_processor, resize=resize)

    def tracer(self, image_processor: Any) -> Any:
        """Copy of an image processor that writes its operations down, to be run on pixel numbers."""
        resized = iter(self.resized)

        def resize(other: Any, image: np.ndarray, size: Any, resample: Any = None, **kwargs: Any) -> np.ndarray:
            before, after, resampling = next(resized)
            height, width = after.shape[-2:]

            def operation(colors: torch.Tensor) -> torch.Tensor:
                values = resize_linear(colors, height, width, resampling)
                if not self.exact:
                    return values
                if not torch.equal(colors.detach(), torch.from_numpy(before).to(colors)):
                    raise ValueError("what is resized was not made of pixels by cutting, padding and ordering alone")
                return _StraightThrough.apply(values, torch.from_numpy(after).to(values))

            return self.append(after.shape, (operation, image))

        def rescale(other: Any, image: np.ndarray, scale: float, **kwargs: Any) -> np.ndarray:
            return self.append(image.shape, (lambda colors: colors * scale, image))

        def normalize(other: Any, image: np.ndarray, mean: Any, std: Any, **kwargs: Any) -> np.ndarray:
            def operation(colors: torch.Tensor) -> torch.Tensor:
                center, spread = (colors.new_tensor(values).view(-1, 1, 1) for values in (mean, std))
                return (colors - center) / spread

            return self.append(image.shape, (operation, image))

        return _with_methods(image_processor, resize=resize, rescale=rescale, normalize=normalize)

    def append(
        self, shape: "tuple[int, ...]", step: "tuple[Callable[[torch.Tensor], torch.Tensor], np.ndarray] | None" = None
    ) -> np.ndarray:
        """Pixel numbers of a new piece: an image, or the result of an operation on pixels with the given numbers."""
        start, end = self.length, self.length + math.prod(shape)
        if end > NUM_NUMBERS:
            raise NotImplementedError(
                f"`images` become more than {NUM_NUMBERS} values in one batch, which is all that can have a gradient at once. "
                "Lower `batch_size` or the size of images."
            )
        self.starts.append(start)
        self.length = end
        self.steps.append(step)
        return np.arange(FIRST_NUMBER + start, FIRST_NUMBER + end, dtype=np.uint32).view(np.float32).reshape(shape)

    def play(self, images: "list[torch.Tensor]", numbers: np.ndarray) -> torch.Tensor:
        """Colors of pixels with the given numbers, when the pieces that are no results are the given images."""
        pieces = [image.reshape(-1) for image in images]
        for step in self.steps[len(images) :]:
            operation, inputs = step  # type: ignore[misc]
            pieces.append(operation(self._take(pieces, inputs)).reshape(-1))
        return self._take(pieces, numbers)

    def _take(self, pieces: "list[torch.Tensor]", numbers: np.ndarray) -> torch.Tensor:
        """Colors of pixels with the given numbers."""
        if numbers.ndim > 3:
            return torch.stack([self._take(pieces, part) for part in numbers])
        rows = np.ascontiguousarray(numbers, dtype=np.float32).reshape(len(numbers), -1)
        index = rows.view(np.uint32) - np.uint32(FIRST_NUMBER)
        start = int(index[0, 0])
        if start in self.starts:  # most often all of one piece, in order
            piece = pieces[self.starts.index(start)]
            if index.size == len(piece) and (np.diff(index.ravel()) == 1).all():
                return piece.view(numbers.shape)

        is_pixel = rows.view(np.uint32) >= FIRST_NUMBER
        if index.max(where=is_pixel, initial=0) >= self.length:
            raise IndexError("a number is that of no pixel")
        # Rows are channels or patches. Consecutive rows on the same pieces are taken at once.
        lowest = index.min(axis=1, where=is_pixel, initial=self.length - 1)
        highest = index.max(axis=1, where=is_pixel, initial=0)
        last = np.searchsorted(self.starts, highest, "right") - 1
        first = np.minimum(np.searchsorted(self.starts, lowest, "right") - 1, last)
        cuts = np.flatnonzero((np.diff(first) != 0) | (np.diff(last) != 0)) + 1
        values = []
        for top, bottom in zip([0, *cuts], [*cuts, len(rows)], strict=True):
            parts = pieces[first[top] : last[top] + 1]
            piece = parts[0] if len(parts) == 1 else torch.cat(parts)
            inside = is_pixel[top:bottom]
            positions = np.where(inside, index[top:bottom] - np.uint32(self.starts[first[top]]), 0).astype(np.int64)
            colors = piece.index_select(0, torch.from_numpy(positions.ravel()).to(piece.device)).view(positions.shape)
            if not inside.all():
                constants = torch.from_numpy(rows[top:bottom]).to(colors)
                colors = torch.where(torch.from_numpy(inside).to(colors.device), colors, constants)
            values.append(colors)
        return torch.cat(values).view(numbers.shape)


def _with_methods(image_processor: Any, **methods: Any) -> Any:
    """
    Copy of an image processor with other methods of its backend, on which those of its own class go on building.

    They stand between both classes in the order of inheritance, so that `super().resize` of a model's class finds them.
    """
    backend = type("Backend", (_backend(image_processor),), methods)
    other = copy.copy(image_processor)
    other.__class__ = type(type(image_processor).__name__, (type(image_processor), backend), {})
    return other


def _rounding(image_processor: Any) -> Any:
    """Copy of a torchvision-backed image processor that resizes floats to the levels that 8 bits have."""
    backend = _backend(image_processor)

    def resize(other: Any, image: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        values = backend.resize(other, image, *args, **kwargs)
        return _StraightThrough.apply(values, values.detach().round().clamp(0, 255))

    return _with_methods(image_processor, resize=resize)


def _resampling(image_processor: Any, resample: Any) -> Image.Resampling:
    if resample is None:
        resample = Image.Resampling.BILINEAR  # the default of `PilBackend.resize`
    name = Image.Resampling(resample).name if isinstance(resample, int) else resample.name  # or one of torchvision
    if name not in FILTERS:
        raise _unsupported(image_processor, f"resizes by {name}, but only {sorted(FILTERS)} have a gradient here")
    return Image.Resampling[name]


def _bilinear(x: float) -> float:
    return max(0.0, 1.0 - abs(x))


def _bicubic(x: float) -> float:
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * -0.5 if x < 2 else 0.0


def _lanczos(x: float) -> float:
    if abs(x) >= 3:
        return 0.0
    return float(np.sinc(x) * np.sinc(x / 3))


# Filters of Pillow and half their widths.
FILTERS: "dict[str, tuple[Callable[[float], float], float]]" = {
    "BILINEAR": (_bilinear, 1.0),
    "BICUBIC": (_bicubic, 2.0),
    "LANCZOS": (_lanczos, 3.0),
}


@lru_cache(maxsize=128)
def resize_matrix(num_in: int, num_out: int, resampling: Image.Resampling) -> torch.Tensor:
    """Matrix `(num_out, num_in)` in float64 by which Pillow resizes along one axis. Rows sum to 1."""
    function, support = FILTERS[resampling.name]
    scale = num_in / num_out
    stretch = max(scale, 1.0)  # a smaller image averages over more pixels
    support *= stretch
    matrix = torch.zeros(num_out, num_in, dtype=torch.float64)
    for i in range(num_out):
        center = (i + 0.5) * scale
        start, end = max(int(center - support + 0.5), 0), min(int(center + support + 0.5), num_in)
        weights = torch.tensor(
            [function((x - center + 0.5) / stretch) for x in range(start, end)], dtype=torch.float64
        )
        matrix[i, start:end] = weights / weights.sum()
    return matrix


def resize_linear(colors: torch.Tensor, height: int, width: int, resampling: Image.Resampling) -> torch.Tensor:
    """Resize levels `(channels, height, width)` as Pillow does, without rounding and without cutting off overshoot."""
    if colors.shape[-1] != width:
        matrix = resize_matrix(colors.shape[-1], width, resampling).to(colors.dtype)
        colors = colors @ matrix.to(colors.device).T
    if colors.shape[-2] != height:
        matrix = resize_matrix(colors.shape[-2], height, resampling).to(colors.dtype)
        colors = matrix.to(colors.device) @ colors
    return colors


__all__ = ["preprocess_with_gradient", "resize_linear", "resize_matrix", "watch_resizing"]
