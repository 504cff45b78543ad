"""Calls of a pipeline for a list of prompts."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch


def call(pipeline: Any, generators: Sequence[torch.Generator], **arguments: Any) -> Any:
    """
    Call a pipeline with a generator for each sample. A single one and its prompts are handed over as such, since some pipelines
    take no lists (Wan VACE, DreamLite).
    """
    if len(generators) == 1:
        singles = {name: value[0] for name, value in arguments.items() if _is_texts(name, value) and len(value) == 1}
        return pipeline(**arguments | singles, generator=generators[0])
    for name, value in arguments.items():
        if name.startswith("negative_prompt") and isinstance(value, str):
            arguments[name] = [value] * len(generators)  # some pipelines want the type of `prompt`
    try:
        return pipeline(**arguments, generator=list(generators))
    except (TypeError, ValueError) as error:
        text = str(error)
        if "prompt" not in text or not ("`str`" in text or "list" in text):
            raise
        raise ValueError(
            f"`{type(pipeline).__name__}` was given {len(generators)} prompts and says: {text} If it takes one prompt at a time, "
            "set the batch size to 1."
        ) from error


def differs_in_batches(pipeline: Any, arguments: Mapping[str, Any]) -> bool:
    """
    Whether a sample of a batch is not that of its seed alone: a language model goes on with all prompts by the first seed
    (GLM-Image, LTX 2 with `system_prompt`), or padding is cut from a single prompt only (Latte).
    """
    has_prior, cuts_padding = (hasattr(pipeline, name) for name in ("vision_language_encoder", "mask_text_embeddings"))
    return has_prior or cuts_padding or arguments.get("system_prompt") is not None


def _is_texts(name: str, value: Any) -> bool:
    return "prompt" in name and isinstance(value, list) and all(isinstance(text, str) for text in value)
