"""Whether a model can be had at all, before its files are asked for one by one, each with retries of half a minute."""

import difflib
import os
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError


SECONDS = 10.0  # for one answer of the Hub


def check_available(name: str | os.PathLike, filename: str = "config.json", **arguments: Any) -> None:
    """
    Make sure that a model is a folder, in the cache, or a repository that the Hub knows.

    Args:
        name (`str` or `os.PathLike`):
            Repository ID or folder.
        filename (`str`, *optional*, defaults to `"config.json"`):
            File that tells whether the model is in the cache.
        arguments:
            Arguments of loading, of which `revision`, `token`, `cache_dir` and `local_files_only` are used.

    Raises:
        `OSError`: If there is no such folder, nor a repository that can be reached by this name.
    """
    text = os.fspath(name)
    if os.path.isdir(text):
        return
    is_path = os.path.isabs(text) or text.startswith((".", "~")) or text.count("/") > 1 or os.sep == "\\" in text
    if not is_path:
        cached = {key: arguments[key] for key in ("cache_dir", "revision") if arguments.get(key) is not None}
        if isinstance(try_to_load_from_cache(text, filename, **cached), str):
            return
        reason = _reason_of_hub(text, arguments)
        if reason is None:
            return
    else:
        reason = "and is no repository ID either"
    raise OSError(f"{text!r} is no folder here, {reason}. {_advice(text)}")


def _reason_of_hub(name: str, arguments: Any) -> str | None:
    """Why the Hub does not give a model; None if it is there, or if loading it will tell more."""
    if constants.HF_HUB_OFFLINE or arguments.get("local_files_only"):
        return "not in the cache, and the Hub is not asked (`HF_HUB_OFFLINE` or `local_files_only`)"
    try:
        HfApi().model_info(name, timeout=SECONDS, token=arguments.get("token"))
    except RepositoryNotFoundError:
        return (
            f"and {constants.ENDPOINT} has no such repository, or it is private and the token is not that of a reader"
        )
    except HfHubHTTPError:
        return None
    except Exception as error:  # of whatever library connects
        return f"not in the cache, and {constants.ENDPOINT} cannot be reached ({type(error).__name__}: {error})"
    return None


def _advice(name: str) -> str:
    parent = Path(name).parent
    folders = [path.name for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
    found = difflib.get_close_matches(Path(name).name, folders, n=1)
    return f"Did you mean {str(parent / found[0])!r}?" if found else "Check the name."
