"""Rows of parquet files, local or on the Hub, read in pieces: any part of a large dataset without the rest."""

import bisect
import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import fsspec
import pyarrow.parquet as pq


BATCH_ROWS = 64  # that are in memory at a time, with their encoded images


class ParquetRows(Sequence):
    """
    Rows of parquet files as a sequence of dictionaries. Only the footers are read at first; rows are read in order from the
    row group that holds them, and images stay encoded (`{"bytes": ..., "path": ...}`).

    Args:
        files (`str`, `os.PathLike` or a list of them):
            Files, folders or patterns (`"data/*.parquet"`), local or of any file system of fsspec, such as
            `"hf://datasets/ORG/NAME@REVISION/data/*.parquet"`. The rows of folders and patterns come in the order of names.
        columns (`dict[str, str]`, *optional*):
            Columns to read, with the name that each gets: `{"url": "image"}`. Defaults to all.
        also (`list[str]`, *optional*):
            Columns that are read under their own names too, where the files have them and `columns` gives no other.

    Raises:
        `FileNotFoundError`: If there is no such file.
        `ValueError`: If a column is missing, or the files have no rows.
    """

    def __init__(
        self,
        files: str | os.PathLike | Sequence[str | os.PathLike],
        columns: dict[str, str] | None = None,
        also: Sequence[str] = (),
    ) -> None:
        given = [files] if isinstance(files, (str, os.PathLike)) else list(files)
        self.files = [file for pattern in given for file in _matching(os.fspath(pattern))]
        digest = hashlib.sha256()
        self._groups: list[tuple[str, int]] = []  # file and index of each row group
        self._starts = [0]  # first row of each row group, and the end
        names: list[str] | None = None
        for file in self.files:
            with fsspec.open(file, "rb") as stream:
                digest.update(_footer(stream))
                metadata = pq.read_metadata(stream)
            own = metadata.schema.to_arrow_schema().names
            names = own if names is None else names
            missing = sorted(set(columns or names) - set(own))
            if missing:
                raise ValueError(f"{file!r} has no columns {missing}; it has {own}. Name columns that all files have.")
            for index in range(metadata.num_row_groups):
                self._groups.append((file, index))
                self._starts.append(self._starts[-1] + metadata.row_group(index).num_rows)
        if not len(self):
            raise ValueError(f"{[os.fspath(file) for file in given]} have no rows, but must have one at least.")
        kept = {name: name for name in names or () if name in also and name not in (columns or {}).values()}
        self._renamed = {**(columns or {}), **kept} if columns or also else {name: name for name in names or ()}
        self.column_names = list(self._renamed.values())
        self.digest = digest.hexdigest()[:16]
        self._batch: tuple[int, list[dict[str, Any]]] = (0, [])  # first row, and rows
        self._following: Iterator[tuple[int, list[dict[str, Any]]]] = iter(())

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        if not self._holds(index):
            if index == self._batch[0] + len(self._batch[1]):  # the next one
                self._batch = next(self._following, self._batch)
            if not self._holds(index):
                self._following = self._batches(index)
                self._batch = next(self._following)
        start, rows = self._batch
        return rows[index - start]

    def _holds(self, index: int) -> bool:
        start, rows = self._batch
        return start <= index < start + len(rows)

    def _batches(self, index: int) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """Batches from the one that holds a row to the last, with the first row of each."""
        first = bisect.bisect_right(self._starts, index) - 1
        for group in range(first, len(self._groups)):
            file, number = self._groups[group]
            start = self._starts[group]
            with fsspec.open(file, "rb") as stream:
                table = pq.ParquetFile(stream)
                for batch in table.iter_batches(BATCH_ROWS, row_groups=[number], columns=list(self._renamed)):
                    if start + len(batch) > index:
                        rows = batch.to_pylist()
                        yield start, [{new: row[old] for old, new in self._renamed.items()} for row in rows]
                    start += len(batch)


def _matching(pattern: str) -> list[str]:
    filesystem, path = fsspec.core.url_to_fs(pattern)
    if filesystem.isdir(path):
        path = f"{path.rstrip('/')}/**/*.parquet"
    found = sorted(filesystem.glob(path)) if "*" in path else [path] * filesystem.exists(path)
    if not found:
        raise FileNotFoundError(f"There is no parquet file at {pattern!r}. Check the path, or the pattern.")
    return [filesystem.unstrip_protocol(file) for file in found]


def _footer(stream: Any) -> bytes:
    """Schema, sizes and statistics of all row groups, as they are in the file."""
    end = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, end - 8))
    length = int.from_bytes(stream.read(8)[:4], "little")
    stream.seek(max(0, end - 8 - length))
    return b"".join(itertools.islice(iter(lambda: stream.read(1 << 20), b""), 1 << 10))
