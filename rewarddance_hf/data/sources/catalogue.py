"""All public preference datasets that can be loaded by name, and their terms."""

import os
from typing import Any

from . import editing, images, videos
from .repository import DatasetRepository, canonical_name
from .source import UNKNOWN_TERMS, Benchmark, DatasetTerms, Source


SOURCES: dict[str, Source] = {source.name: source for source in (*images.SOURCES, *editing.SOURCES, *videos.SOURCES)}
# Name of a benchmark -> dataset, and which part of it.
BENCHMARKS: dict[str, tuple[Source, Benchmark]] = {
    name: (source, benchmark) for source in SOURCES.values() for name, benchmark in source.benchmarks.items()
}


def load_preferences(
    name: str,
    split: str | None = None,
    streaming: bool = False,
    revision: str | None = None,
    token: str | None = None,
    repo_id: str | os.PathLike | None = None,
    **options: Any,
) -> Any:
    """
    Load a public preference dataset.

    Rows have the columns `prompt`, `chosen`, `rejected`, `task`, `condition`, `margin`, `tie`, `criteria` and `category`.
    Images stay encoded until a row is read. Votes become margins ([`~rewarddance_hf.data.sources.rows.vote_margin`]), ties
    stay ties. The license is in `info` of the rows. `chosen` is always the better one: whoever shows both to a judge draws
    their order ([`DataCollatorForRewardDance`] does).

    Args:
        name (`str`):
            Name in `SOURCES`, e.g. `"hpdv3"`. `SOURCES[name].description` says what its rows and options are.
        split (`str`, *optional*):
            Split. Defaults to the one of the source.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to read rows as they are needed, and single images out of zip archives through the network. Otherwise the
            rows are written to the cache of `datasets` once. Tar archives are downloaded whole before the first row.
        revision (`str`, *optional*):
            Branch, tag or commit.
        token (`str`, *optional*):
            Token for the Hub.
        repo_id (`str` or `os.PathLike`, *optional*):
            Mirror, or local folder, of the same layout.
        options (`Any`):
            Options of the source: `config`, `dimension`, `subset`, `min_confidence`, `both_bad`.

    Returns:
        `datasets.Dataset`, or `datasets.IterableDataset` if `streaming`: Preference rows. Videos are fetched when a row is
        read.

    Raises:
        `ValueError`: If there is no such source, split, option or repository, a file or column is missing, or a vote
        or ranking is not one of the source's.

    Example:

    ```python
    rows = load_preferences("hpdv3", "train", streaming=True, min_confidence=0.95)
    ```
    """
    if name not in SOURCES:
        raise ValueError(f"There is no source {name!r}, but {', '.join(SOURCES)}. Choose one of them.")
    source = SOURCES[name]
    split = split or source.split
    source.complete(split, options)
    repository = DatasetRepository(source.repo_id if repo_id is None else repo_id, revision, token)
    return load_source(source, repository, split, streaming, **options)


def load_source(
    source: Source, repository: DatasetRepository, split: str, streaming: bool = False, **options: Any
) -> Any:
    """Rows of a source from a repository that was found, with their origin and license in `info`; see [`load_preferences`]."""
    rows = source.read(repository, split, streaming, **source.complete(split, options))
    # The terms of a dataset hold for mirrors and local copies of it too.
    name = repository.repo_id
    if repository.is_local or (terms_of(name) is UNKNOWN_TERMS and not source.is_family):
        name = "" if source.is_family else source.repo_id
    rows.info.license = terms_of(name).license
    rows.info.homepage = f"https://huggingface.co/datasets/{name}" if name else ""
    return rows


def terms_of(repo_id: str) -> DatasetTerms:
    """Terms of a dataset by its repository ID, under the old or the new name of its owner, in any case."""
    wanted = canonical_name(repo_id)
    for source in SOURCES.values():
        known = canonical_name(source.repo_id)
        if wanted == known or (source.is_family and wanted.startswith(known)):
            return source.terms
    return UNKNOWN_TERMS
