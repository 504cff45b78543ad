"""
How a processor calls its image processor, found out once for each size of image: the next images of this size go to the image
processor at once, with the same arguments, and need no text.
"""

from collections.abc import Callable, Iterator
from copy import copy
from typing import Any
from weakref import WeakKeyDictionary

import torch
from PIL import Image

from ...models import RewardDanceProcessor


# Inputs that belong to the text, in the output of a processor.
TEXT_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
MOST_SIZES = 1000  # that are remembered of one processor


class ImageCall:
    """
    In the place of a processor, for images of one size: gives what the processor gives of them, without its text.

    `expansion` is the text that the processor put into the place of its placeholders, which follows from the size.
    """

    def __init__(
        self, image_processor: Any, nesting: Any, args: tuple[Any, ...], kwargs: dict[str, Any], expansion: str
    ) -> None:
        self.image_processor = image_processor
        self.nesting, self.args, self.kwargs, self.expansion = nesting, args, kwargs, expansion
        self.names: tuple[str, ...] | None = None

    def __call__(self, images: Any) -> dict[str, Any]:
        leaves = iter(_leaves(images))
        batch = self.image_processor(_fill(self.nesting, leaves), *self.args, **self.kwargs)
        return {name: batch[name] for name in (batch.keys() if self.names is None else self.names)}


class ImageCalls:
    """The calls of one processor as it is now, by the size of the image and whether it is the only one of its question."""

    def __init__(self, processor: RewardDanceProcessor) -> None:
        settings = (repr(processor.image_processor), processor.vlm_images_kwargs, processor.vlm_processor_kwargs)
        of_processor = _CALLS.setdefault(processor, {})
        self._found: dict[Any, ImageCall | None] = of_processor.setdefault(repr(settings), {})

    def find(self, key: Any, learn: Callable[[], ImageCall | None]) -> ImageCall | None:
        """The call for a size, which is learned when it comes for the second time: all sizes may differ."""
        if key not in self._found:
            if len(self._found) >= MOST_SIZES:
                self._found.clear()
            self._found[key] = None
            return None
        if self._found[key] is None:
            self._found[key] = learn() or _NO_CALL
        call = self._found[key]
        return None if call is _NO_CALL else call


_CALLS: "WeakKeyDictionary[RewardDanceProcessor, dict[str, dict[Any, ImageCall | None]]]" = WeakKeyDictionary()
_NO_CALL = ImageCall(None, None, (), {}, "")


def run_plainly(vlm_processor: Any, images: Any, **arguments: Any) -> Any:
    """Call a processor."""
    return vlm_processor(images=images, **arguments)


def run_processor(
    vlm_processor: Any, images: Any, arguments: dict[str, Any], run: Callable[..., Any] = run_plainly
) -> tuple[dict[str, Any], str, list[Any]]:
    """Run a processor and listen: what it gives beside its text, that text, and the calls of its image processor."""
    texts: list[str] = []
    calls: list[Any] = []
    vlm_processor = copy(vlm_processor)
    vlm_processor.tokenizer = _listening(vlm_processor.tokenizer, lambda text, *_, **__: texts.extend(text))
    vlm_processor.image_processor = _listening(
        vlm_processor.image_processor, lambda *args, **kwargs: calls.append((args, kwargs))
    )
    batch = run(vlm_processor, images, **arguments)
    return {name: value for name, value in batch.items() if name not in TEXT_INPUTS}, texts[-1], calls


def learn_call(vlm_processor: Any, images: Any, arguments: dict[str, Any]) -> ImageCall | None:
    """
    Find out how images of these sizes are given to the image processor; None unless calling it in the same way gives the same
    inputs.
    """
    inputs, expansion, calls = run_processor(vlm_processor, images, arguments)
    if len(calls) != 1:
        return None
    args, kwargs = calls[0]
    if not args:
        args, kwargs = (kwargs.get("images"),), {name: value for name, value in kwargs.items() if name != "images"}
    given, passed = _leaves(images), _leaves(args[0])
    if len(given) != len(passed) or any(one is not other for one, other in zip(given, passed, strict=True)):
        return None
    call = ImageCall(vlm_processor.image_processor, args[0], args[1:], kwargs, expansion)
    again = call(images)
    call.names = tuple(inputs)
    if any(name not in again or not _equal(value, again[name]) for name, value in inputs.items()):
        return None
    call.nesting = _fill(args[0], iter([None] * len(given)))  # keeps no image
    return call


def noise(size: tuple[int, int]) -> Image.Image:
    """An image of a size."""
    return Image.effect_noise(size, 64).convert("RGB")


def _equal(value: Any, other: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return isinstance(other, torch.Tensor) and value.dtype == other.dtype and torch.equal(value, other)
    return type(value) is type(other) and value == other


def _leaves(nested: Any) -> list[Any]:
    return [leaf for part in nested for leaf in _leaves(part)] if isinstance(nested, (list, tuple)) else [nested]


def _fill(nested: Any, leaves: Iterator[Any]) -> Any:
    """Leaves in the nesting of others."""
    return [_fill(part, leaves) for part in nested] if isinstance(nested, (list, tuple)) else next(leaves)


def _listening(part: Any, listen: Callable[..., Any]) -> Any:
    """Copy of a tokenizer or image processor that tells what it is called with."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        listen(*args, **kwargs)
        return type(part).__call__(self, *args, **kwargs)

    listener = copy(part)
    listener.__class__ = type(type(part).__name__, (type(part),), {"__call__": __call__})
    return listener
