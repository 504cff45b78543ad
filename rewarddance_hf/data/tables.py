"""Tables of own data: a file, a folder of images, a folder of `save_to_disk`, a dataset of the Hub, a public set by name."""

import csv
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets

from .media import IMAGES, VIDEOS
from .sources import SOURCES, load_preferences, terms_of


TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt")
# Files of these names describe a folder of images, as for `datasets`; else its only table does.
METADATA = "metadata"
NO_TABLES = ("dataset_infos.json", "dataset_dict.json", "state.json", "config.json")


class NoSplitError(ValueError):
    """Data has no split of a name."""


@dataclass(frozen=True)
class Table:
    """Rows as somebody wrote them, with where each of them stands."""

    rows: Any  # list of dicts, `Dataset` or `IterableDataset`
    name: str  # of the file or dataset, in messages
    folder: str | None = None  # that paths in the rows are relative to
    places: Sequence[int] = ()  # line of each row in its file, or its index
    unit: str = "row"
    problems: dict[int, str] = field(default_factory=dict)  # by index of a row that cannot be read
    license: str = ""
    homepage: str = ""

    def place(self, index: int) -> str:
        """Where a row stands, in messages."""
        return f"{self.name}, {self.unit} {self.places[index] if self.places else index}"

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        if isinstance(self.rows, list):
            return list(dict.fromkeys(name for row in self.rows for name in row))
        return list(self.rows.column_names or next(iter(self.rows), {}))

    def select(self, indices: Sequence[int]) -> "Table":
        """The same with some of the rows."""
        rows = [self.rows[i] for i in indices] if isinstance(self.rows, list) else self.rows.select(indices)
        places = [self.places[i] if self.places else i for i in indices]
        problems = {new: self.problems[old] for new, old in enumerate(indices) if old in self.problems}
        return replace(self, rows=rows, places=places, problems=problems)


def read_table(
    data: str | os.PathLike,
    split: str | None = None,
    config: str | None = None,
    data_files: Sequence[str] | None = None,
    revision: str | None = None,
    streaming: bool = False,
) -> Table:
    """
    Read a table.

    Args:
        data (`str` or `os.PathLike`):
            CSV, TSV, JSON, JSON lines, Parquet, or text with a prompt a line; folder with such a table (`metadata.*`, or the only one;
            several are splits by their names), or of images without one, or of `save_to_disk`; name in
            [`~rewarddance_hf.data.sources.SOURCES`]; or dataset of the Hub.
        split (`str`, *optional*):
            Split, or part of one as in `"train[:5%]"`. Needed if there are several.
        config, data_files, revision, streaming (*optional*):
            As in `datasets.load_dataset`, for datasets of the Hub. Public sets have no configurations.

    Returns:
        [`Table`]

    Raises:
        `NoSplitError`: If there are other splits.
        `ValueError`: If there is no such file, folder or dataset, or it cannot be read.
    """
    data = os.fspath(data)
    if os.path.isdir(data):
        return _read_folder(data, split, data_files)
    if os.path.isfile(data):
        return _part_of({"train": data}, data, split)
    if data.startswith(("/", "./", "../", "~")) or data.count("/") > 1 or data.lower().endswith(TABLES):
        raise ValueError(f"There is no file or folder {data!r} (seen from {os.getcwd()}). Check the path.")
    if source := _find_source(data):
        rows = load_preferences(source, split and split.partition("[")[0], streaming, revision)
        table = Table(rows, source, license=rows.info.license, homepage=rows.info.homepage)
        return table if streaming else _slice(table, split)
    return _load_dataset(data, split, config, data_files, revision, streaming)


def _find_source(name: str) -> str | None:
    """Name of a public set, which may be called by its repository, too: `hpdv3`, `pickapic_v2`, `MizzenAI/HPDv3`."""
    for source in SOURCES.values():
        repo_id = source.repo_id.lower()
        if name == source.name or (not source.is_family and name.lower() in (repo_id, repo_id.partition("/")[2])):
            return source.name
    return None


def _read_folder(folder: str, split: str | None, data_files: Sequence[str] | None) -> Table:
    if any(os.path.isfile(os.path.join(folder, file)) for file in ("state.json", "dataset_dict.json")):
        return _from_disk(folder, split)
    files = sorted(path for path in Path(folder).iterdir() if path.is_file())
    tables = [path for path in files if path.suffix.lower() in TABLES and path.name not in NO_TABLES]
    described = [path for path in tables if path.stem == METADATA] or tables
    parts = [path for path in sorted(Path(folder).glob(f"*/{METADATA}.*")) if path.suffix.lower() in TABLES]
    if len(described) == 1:
        return _part_of({"train": str(described[0])}, folder, split)
    if described:
        return _part_of({path.stem: str(path) for path in described}, folder, split)
    if parts:
        return _part_of({path.parent.name: str(path) for path in parts}, folder, split)
    media = [path.name for path in files if path.suffix.lower() in IMAGES + VIDEOS]
    if media:
        rows = [{"image": name} for name in media]
        return _slice(Table(rows, folder, folder), split)
    if any(path.suffix in (".parquet", ".arrow", *TABLES) for path in Path(folder).rglob("*")):
        return _load_dataset(folder, split, None, data_files, None, False)
    raise ValueError(
        f"The folder {folder!r} has neither a table ({', '.join(TABLES)}) nor images. Put {METADATA}.csv beside the images, "
        "or pass the path of a table."
    )


def _part_of(files: dict[str, str], data: str, split: str | None) -> Table:
    """Table of one of several files, which are splits."""
    if split is None and len(files) > 1:
        raise NoSplitError(f"{data!r} has the splits {sorted(files)}. Choose one of them with the split.")
    name = next(iter(files)) if split is None else split.partition("[")[0]
    if name not in files:
        raise NoSplitError(f"`split` is {split!r}, but {data!r} has {sorted(files)}. Choose one of them.")
    return _slice(_read_file(files[name]), split)


def _slice(table: Table, split: str | None) -> Table:
    """Rows of a split like `train[5%:]`."""
    if split is None or "[" not in split:
        return table
    name = split.partition("[")[0]
    try:
        (part,) = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(table.rows)})
    except (AssertionError, ValueError) as error:
        raise ValueError(f"`split` is {split!r}, but must be like train, train[:5%] or train[100:200].") from error
    return table.select(range(part.from_ or 0, len(table.rows) if part.to is None else part.to))


def _from_disk(folder: str, split: str | None) -> Table:
    rows: Any = datasets.load_from_disk(folder)
    if isinstance(rows, dict):
        name = split.partition("[")[0] if split else next(iter(rows), None)
        if name not in rows or (len(rows) > 1 and not split):
            raise NoSplitError(f"`split` is {split!r}, but {folder!r} has {sorted(rows)}. Choose one of them.")
        rows = rows[name]
    known = rows.info
    return _slice(Table(rows, folder, folder, license=known.license or "", homepage=known.homepage or ""), split)


def _load_dataset(
    name: str,
    split: str | None,
    config: str | None,
    data_files: Sequence[str] | None,
    revision: str | None,
    streaming: bool,
) -> Table:
    arguments = {"data_files": data_files, "revision": revision, "streaming": streaming}
    try:
        rows = datasets.load_dataset(name, config, split=split, **arguments)
    except datasets.exceptions.DatasetsError as error:
        raise ValueError(f"The dataset {name!r} cannot be loaded: {error}") from error
    except ValueError as error:
        if "split" in str(error).lower():
            raise NoSplitError(f"`split` is {split!r}, which {name!r} does not have: {error}") from error
        raise
    if isinstance(rows, dict):
        if len(rows) > 1:
            raise NoSplitError(f"`split` is None, but {name!r} has {sorted(rows)}. Choose one of them.")
        rows = next(iter(rows.values()))
    folder = os.path.dirname(data_files[0]) if data_files and os.path.exists(data_files[0]) else None
    if os.path.isdir(name):
        return Table(rows, name, name)
    if data_files:
        return Table(rows, ", ".join(map(os.path.basename, data_files)), folder)
    homepage = rows.info.homepage or f"https://huggingface.co/datasets/{name}"
    return Table(rows, name, license=rows.info.license or terms_of(name).license, homepage=homepage)


# ---- files ----


def _read_file(path: str) -> Table:
    name, folder = os.path.basename(path), os.path.dirname(os.path.abspath(path))
    suffix = Path(path).suffix.lower()
    if suffix == ".parquet":
        return Table(datasets.Dataset.from_parquet(path), name, folder)
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".txt": _read_text}
    rows: list[dict[str, Any]] = []
    places: list[int] = []
    problems: dict[int, str] = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            for place, row in readers.get(suffix, _read_json)(file):
                if isinstance(row, str):
                    problems[len(rows)] = row
                    row = {}
                rows.append(row)
                places.append(place)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path!r} cannot be read ({error}). Save it as {suffix} in UTF-8.") from error
    if not rows:
        raise ValueError(f"{path!r} has no rows. Pass a file with at least one.")
    is_list = suffix == ".json" and places == list(range(len(rows)))
    return Table(rows, name, folder, places, "row" if is_list else "line", problems)


def _read_csv(file: Any) -> Iterator[tuple[int, Any]]:
    """Line and row, or what is wrong with it, of each row. Empty cells are None, all others text."""
    header = file.readline()
    file.seek(0)
    reader = csv.reader(file, delimiter=max(",;\t", key=header.count), strict=True)
    columns = [name.strip() for name in next(reader, [])]
    while True:
        line = reader.line_num + 1
        cells = next(reader, None)
        if cells is None:
            return
        if len(cells) == len(columns):
            yield line, {name: cell or None for name, cell in zip(columns, cells, strict=True)}
        elif cells:
            yield line, f"it has {len(cells)} cells under {len(columns)} columns; put texts with commas in quotes"


def _read_json(file: Any) -> Iterator[tuple[int, Any]]:
    start = file.read(1000).lstrip()[:1]
    file.seek(0)
    if start == "[":
        try:
            yield from enumerate(_record(value) for value in json.load(file))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file.name!r} is no JSON ({error}). Write it again.") from error
        return
    for line, text in enumerate(file, start=1):
        if text.strip():
            try:
                yield line, _record(json.loads(text))
            except json.JSONDecodeError as error:
                yield line, f"it is no JSON ({error})"


def _record(value: Any) -> Any:
    return (
        value
        if isinstance(value, dict)
        else f"it is {str(value)[:40]!r}, but must be an object with a name for each value"
    )


def _read_text(file: Any) -> Iterator[tuple[int, Any]]:
    for line, text in enumerate(file, start=1):
        if text.strip():
            yield line, {"prompt": text.strip()}
