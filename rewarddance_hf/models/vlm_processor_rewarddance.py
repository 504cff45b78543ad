"""Processors of vision-language models without their parts for video and audio, and without idle work."""

import copy
import inspect
from functools import lru_cache
from typing import Any

import numpy as np
from transformers import ProcessorMixin


class _DropVideoAndAudio(ProcessorMixin):
    """Stands behind a processor class in the order of inheritance and drops the parts that are not for images."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        parts = {
            **dict(zip(self._all_parts, args, strict=False)),
            **{k: kwargs.pop(k) for k in self._all_parts if k in kwargs},
        }
        for name in self._all_parts:
            if name not in ("image_processor", "tokenizer"):
                # Some classes go on to read settings of their video processor, which are those of images.
                setattr(self, name, parts["image_processor"] if "video" in name else None)
        super().__init__(image_processor=parts["image_processor"], tokenizer=parts["tokenizer"], **kwargs)


def image_only_processor(processor_class: type) -> type:
    """
    Subclass of a processor class of transformers that has no video and audio parts.

    Without torchvision no video processor can be built. A processor's parts are the arguments of its `__init__`, and
    every `__init__` ends in that of the next class in the order of inheritance, which is where unwanted ones are dropped.
    """
    all_parts = processor_class.get_attributes()
    dropped = [name for name in all_parts if name not in ("image_processor", "tokenizer")]
    if not dropped:
        return processor_class
    signature = inspect.signature(processor_class.__init__)

    def __init__(self: Any, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any) -> None:
        parts = {"image_processor": image_processor, "tokenizer": tokenizer, **dict.fromkeys(dropped)}
        processor_class.__init__(self, **parts, **kwargs)
        for name in dropped:
            setattr(self, name, None)

    __init__.__signature__ = signature.replace(
        parameters=[parameter for name, parameter in signature.parameters.items() if name not in dropped]
    )
    return type(
        processor_class.__name__,
        (processor_class, _DropVideoAndAudio),
        {"__init__": __init__, "_all_parts": all_parts},
    )


def without_idle_resizes(vlm_processor: Any) -> Any:
    """
    The same processor, with an image processor that leaves images as they are which have the wanted size. Pillow would make
    an image of the array, copy it and make an array of that.
    """
    image_processor = vlm_processor.image_processor
    quick_class = _without_idle_resizes(type(image_processor))
    if quick_class is None:
        return vlm_processor
    quick: Any = object.__new__(quick_class)
    quick.__dict__ = image_processor.__dict__
    vlm_processor = copy.copy(vlm_processor)
    vlm_processor.image_processor = quick
    return vlm_processor


@lru_cache(maxsize=32)
def _without_idle_resizes(image_processor_class: type) -> "type | None":
    """Subclass of an image processor that works with Pillow."""
    backend: Any = next((base for base in image_processor_class.__mro__ if base.__name__ == "PilBackend"), None)
    if backend is None:
        return None

    def resize(self: Any, image: Any, size: Any, *args: Any, **kwargs: Any) -> Any:
        others = ("shortest_edge", "longest_edge", "max_height", "max_width")
        wanted = (3, getattr(size, "height", None), getattr(size, "width", None))
        if image.shape == wanted and image.dtype == np.uint8 and not any(getattr(size, name, None) for name in others):
            return image.copy(order="K")
        return backend.resize(self, image, size, *args, **kwargs)

    # Between the model's class and its backend, so that `super().resize` of the former finds it
    between = type("IdleBackend", (backend,), {"resize": resize})
    return type(image_processor_class.__name__, (image_processor_class, between), {})
