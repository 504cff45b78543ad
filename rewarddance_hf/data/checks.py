"""Media of own data: files found, addresses downloaded, every image decoded once."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import datasets
from datasets import DownloadConfig
from datasets.utils.file_utils import cached_path
from tqdm.auto import tqdm

from ..models.tasks_rewarddance import check_condition
from ..parallel import run_split
from .columns import MEDIA
from .media import read_media


THREADS = min(8, os.cpu_count() or 1)
ADDRESSES = ("http://", "https://")


def fetch_media(rows: Any, folder: str | None, place: Callable[[int], str]) -> tuple[Any, dict[int, str]]:
    """
    Rows whose paths are absolute and whose addresses are files of the cache, and what is wrong with those whose address
    could not be downloaded. Only columns of text are read.
    """
    if isinstance(rows, list):
        columns = [name for name in MEDIA if any(name in row for row in rows)]
        paths: Any = rows
    else:
        columns = [name for name in MEDIA if _is_text(rows.features.get(name))]
        if not columns:
            return rows, {}
        paths = rows.select_columns(columns)
    values = (
        (index, name, path) for index, row in enumerate(paths) for name in columns for path in _paths(row.get(name))
    )
    asked: dict[str, tuple[int, str]] = {}
    for index, name, path in values:
        if path.startswith(ADDRESSES):
            asked.setdefault(path, (index, name))
    files = dict(zip(asked, _in_threads(_download, list(asked), "Downloading", len(asked) > 20), strict=True))
    problems: dict[int, str] = {}

    def resolve(value: Any, index: int, name: str) -> Any:
        if isinstance(value, (list, tuple)):
            return [resolve(part, index, name) for part in value]
        if not isinstance(value, str):
            return value
        if value.startswith(ADDRESSES):
            file, error = files[value]
            if error:
                problems[index] = f"{place(index)}: `{name}` {value!r} cannot be downloaded ({error})"
            return file
        return value if folder is None else os.path.join(folder, os.path.expanduser(value))

    if isinstance(rows, list):
        return [
            {name: resolve(value, index, name) if name in columns else value for name, value in row.items()}
            for index, row in enumerate(rows)
        ], problems

    def convert(batch: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        return {
            name: [resolve(value, index, name) for value, index in zip(batch[name], indices, strict=True)]
            for name in columns
        }

    return rows.map(convert, with_indices=True, batched=True, load_from_cache_file=False), problems


def check_media(rows: Any, columns: Sequence[str], show_progress: bool = False) -> dict[int, str]:
    """
    What is wrong with rows whose images cannot be read, whose source image is missing, or whose two samples are the same. Under several processes each
    looks at its share. Of clips the first and the last frame are decoded.
    """
    known: dict[str, str] = {}  # digests of files, which may occur in several rows

    def look(index: int) -> str | None:
        row, digests = rows[index], {}
        try:
            check_condition(row.get("task"), row.get("condition"))
        except ValueError as error:
            return str(error)
        for name in columns:
            media = row.get(name)
            if media is None:
                continue
            digest = known.get(media) if isinstance(media, str) else None
            if digest is None:
                try:
                    digest = read_media(media, name)
                except (ValueError, TypeError, ImportError, OSError) as error:
                    return str(error)
                if isinstance(media, str):
                    known[media] = digest
            digests[name] = digest
        if "chosen" in digests and digests["chosen"] == digests.get("rejected") and not row.get("tie"):
            return "`chosen` and `rejected` are the same image"
        return None

    def work(indices: Sequence[int]) -> list[str | None]:
        return _in_threads(look, list(indices), "Checking rows", show_progress)

    return {index: found for index, found in enumerate(run_split(work, len(rows))) if found is not None}


def _in_threads(work: Callable[[Any], Any], values: list[Any], title: str, show_progress: bool) -> list[Any]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(tqdm(pool.map(work, values), total=len(values), desc=title, disable=not show_progress))


def _download(address: str) -> tuple[str | None, str]:
    try:
        return cached_path(address, DownloadConfig(max_retries=2, disable_tqdm=True)), ""
    except Exception as error:  # of the network, the server, or the cache: the row says which address it was
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _paths(value: Any) -> Iterator[str]:
    for part in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(part, str):
            yield part


def _is_text(feature: Any) -> bool:
    inner = getattr(feature, "feature", feature)
    return isinstance(inner, datasets.Value) and inner.dtype in ("string", "large_string")
