"""Processors of vision-language models without their parts for video and audio, which need torchvision."""

import inspect
from typing import Any

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
