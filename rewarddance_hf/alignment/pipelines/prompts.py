"""Calls of a pipeline with a list of prompts."""

from typing import Any


def call(pipeline: Any, **arguments: Any) -> Any:
    """
    Call a pipeline with a list of prompts. A single one is handed over as a string, since some pipelines take no list (Wan VACE,
    DreamLite).
    """
    counts = {len(value) for name, value in arguments.items() if _is_texts(name, value)}
    if counts <= {1}:
        singles = {name: value[0] for name, value in arguments.items() if _is_texts(name, value)}
        return pipeline(**arguments | singles)
    # Some pipelines want the type of `prompt`.
    repeated = {
        name: [value] * max(counts)
        for name, value in arguments.items()
        if name.startswith("negative_prompt") and isinstance(value, str)
    }
    try:
        return pipeline(**arguments | repeated)
    except (TypeError, ValueError) as error:
        text = str(error)
        if "prompt" not in text or not ("`str`" in text or "list" in text):
            raise
        raise ValueError(
            f"`{type(pipeline).__name__}` was given {max(counts)} prompts and says: {text} If it takes one prompt at a time, set "
            "the batch size to 1."
        ) from error


def _is_texts(name: str, value: Any) -> bool:
    return "prompt" in name and isinstance(value, list) and len(value) > 0 and all(isinstance(text, str) for text in value)
