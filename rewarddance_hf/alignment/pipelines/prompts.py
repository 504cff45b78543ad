"""Calls of a pipeline for a list of prompts."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch


# Arguments that have a language model rewrite the prompts: LTX 2 (two), Flux 2, Ideogram 4, Kandinsky 6, LongCat-Image, ERNIE-Image
REWRITING = (
    "system_prompt",
    "enable_prompt_enhancement",
    "caption_upsample_temperature",
    "prompt_upsampling",
    "expand_prompts",
    "enable_prompt_rewrite",
    "use_pe",
)


def call(pipeline: Any, generators: Sequence[torch.Generator], **arguments: Any) -> Any:
    """
    Call a pipeline with a generator for each sample. A single one and its prompts are handed over as such, since some pipelines
    take no lists (Wan VACE, DreamLite). Language models that write before the first step draw from the same seed.
    """
    if len(generators) == 1:
        singles = {name: value[0] for name, value in arguments.items() if _is_texts(name, value) and len(value) == 1}
        with _seeded(pipeline, generators[0]) if _writes(pipeline, arguments) else nullcontext():
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


def differs_in_batches(pipeline: Any, arguments: Mapping[str, Any], prompts: Sequence[str]) -> bool:
    """
    Whether a sample of a batch is not that of its seed and prompt alone: a language model goes on with all prompts by one seed,
    padding is cut from a single prompt only (Latte), or a prompt is padded to the longest without a mask (CogView 4; Kandinsky 3,
    whose denoiser takes the mean over all tokens).
    """
    cuts_padding = hasattr(pipeline, "mask_text_embeddings")
    pads = any(hasattr(pipeline, name) for name in ("_get_glm_embeds", "process_embeds", "_process_embeds"))
    has_no_mask = pads and arguments.get("prompt_embeds") is None
    return _writes(pipeline, arguments) or cuts_padding or (has_no_mask and len({*prompts}) > 1)


def _writes(pipeline: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether a language model goes on with the prompts, or writes others in their place, by random numbers."""
    if hasattr(pipeline, "vision_language_encoder"):  # GLM-Image
        return True
    has_no_writer = getattr(pipeline, "pe", pipeline) is None  # ERNIE-Image
    if has_no_writer or arguments.get("prompt_embeds") is not None:
        return False
    takes = inspect.signature(type(pipeline).__call__).parameters
    return any(arguments.get(name, takes[name].default) for name in REWRITING if name in takes)


@contextmanager
def _seeded(pipeline: Any, generator: torch.Generator) -> Iterator[None]:
    """Draw what does not come from a generator from its seed, and leave the state of all others alone."""
    device = pipeline._execution_device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(generator.initial_seed())
        yield


def _is_texts(name: str, value: Any) -> bool:
    return "prompt" in name and isinstance(value, list) and all(isinstance(text, str) for text in value)
