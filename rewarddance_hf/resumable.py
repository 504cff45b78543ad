"""
Rows on disk that survive a kill at any moment: each is written whole or not at all, exactly once, and belongs to the
run that made it.

[`RowFolder`] keeps one file for each row (images, tables), [`RowFile`] one line of JSON. Both refuse to go on with
results of another judge, generator or input, which they recognize by a fingerprint beside the results.
"""

import glob
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image

from .parallel import Processes


SAMPLED_ENTRIES = 8  # of each tensor, that tell weights from others


def write_atomically(file: str | os.PathLike, content: bytes | Callable[[BinaryIO], Any]) -> None:
    """
    Write or replace a file atomically: it is whole or missing, even after a kill or a power cut. `content` is
    what is in it, or a function that writes it to a stream.
    """
    path = Path(file)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.part")  # processes of other machines may write it too
    with open(part, "wb") as stream:
        if callable(content):
            content(stream)
        else:
            stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, path)


def describe_weights(module: torch.nn.Module) -> str:
    """
    Digest of weights: their names, shapes, types and some entries of each. Parameters on the meta device
    (of offloaded models) count by shape only.
    """
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if not parameter.is_meta:
            entries = parameter.detach().flatten()[:: max(1, parameter.numel() // SAMPLED_ENTRIES)]
            digest.update(repr(entries.double().tolist()).encode())
    return digest.hexdigest()[:16]


def digest_of(*values: Any) -> str:
    """Digest of values: images by their pixels, tensors and arrays by their numbers, all else by its text."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Image.Image):
            digest.update(f"image {value.mode} {value.size} ".encode() + value.tobytes())
        elif isinstance(value, Mapping):
            add([part for pair in sorted(value.items()) for part in pair])
        elif isinstance(value, (list, tuple)):
            digest.update(f"list {len(value)} ".encode())
            for part in value:
                add(part)
        elif isinstance(value, torch.Tensor):
            digest.update(f"tensor {value.dtype} {tuple(value.shape)} {value.tolist()!r} ".encode())
        elif isinstance(value, np.ndarray):  # the text of a large one leaves numbers out
            digest.update(f"array {value.dtype} {value.shape} ".encode() + value.tobytes())
        elif isinstance(value, bytes):
            digest.update(f"bytes {len(value)} ".encode() + value)
        else:
            digest.update(f"{type(value).__name__} {value!r} ".encode())

    add(values)
    return digest.hexdigest()[:16]


def content_of(media: Any) -> Any:
    """What stands for an image or a clip in a digest, wherever it is: of a file its content, and not its name."""
    if isinstance(media, Mapping):
        media = media.get("bytes") or media.get("path")
    if isinstance(media, (list, tuple)):
        return [content_of(part) for part in media]
    if isinstance(media, (str, os.PathLike)):
        return _readable(lambda: Path(media).read_bytes())
    if isinstance(media, Image.Image):
        return _readable(lambda: (media.load(), media)[1])
    return media


def _readable(read: Callable[[], Any]) -> Any:
    """What is read, or None: whoever uses it will say what is wrong with it."""
    try:
        return read()
    except (OSError, SyntaxError, ValueError):
        return None


def check_fingerprint(file: str | os.PathLike, fingerprint: Mapping[str, Any], name: str) -> None:
    """
    Make sure that results on disk were made by the same judge or generator with the same arguments, or write down by
    which.

    `fingerprint` is all that results depend on, in values that JSON can hold; `file` is written if it is missing. `name` is
    what the user knows the results by. Raises a `ValueError` with the keys that differ.
    """
    path = Path(file)
    if not path.exists():
        write_atomically(path, json.dumps(fingerprint, indent=2).encode())
    different = differing_keys(json.loads(path.read_text(encoding="utf-8")), fingerprint)
    if different:
        raise ValueError(
            f"{name} belongs to a run in which {different} were others, but results of both would be mixed. Repeat the call "
            "with the same ones, or choose another place."
        )


def differing_keys(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Keys of two fingerprints, as they are in JSON, that have other values."""
    known, wanted = (json.loads(json.dumps(fingerprint)) for fingerprint in (known, wanted))
    return sorted(key for key in {*known, *wanted} if known.get(key) != wanted.get(key))


class RowFolder:
    """
    Results of rows in `rows/`, one file each. Several processes may write to it at once, each its own rows.

    Arguments as in [`check_fingerprint`]. Raises a `ValueError` if the folder belongs to another run, or holds rows beyond
    the last one.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        fingerprint: Mapping[str, Any],
        num_rows: int,
        name: str = "the folder",
        suffix: str = ".bin",
    ) -> None:
        self.folder = Path(folder) / "rows"
        self.name = name
        self.suffix = suffix
        self.folder.mkdir(parents=True, exist_ok=True)
        check_fingerprint(self.folder.parent / "arguments.json", fingerprint, name)
        self._files: dict[int, Path] = {}
        self._list()
        beyond = sorted(index for index in self._files if index >= num_rows)
        if beyond:
            raise ValueError(
                f"{name} has results of the rows {beyond[:3]}, but there are {num_rows} rows only. Choose another place for "
                "other rows."
            )

    def is_done(self, index: int, key: Any) -> bool:
        """Whether a row is finished; a `ValueError` if another row, which the `key` does not describe, was finished in its place."""
        file = self._files.get(index)
        if file is not None and file != self._file(index, key):
            raise ValueError(
                f"{self.name} has the result of another row in the place of row {index}. Repeat the call with the same rows in "
                "the same order (new ones at the end), or choose another place."
            )
        return file is not None

    def write(self, index: int, key: Any, content: bytes) -> None:
        """Keep the result of a row."""
        file = self._file(index, key)
        write_atomically(file, content)
        self._files[index] = file

    def read(self, index: int) -> bytes:
        """Result of a finished row."""
        if index not in self._files:  # written by another process
            self._list()
        return self._files[index].read_bytes()

    def _list(self) -> None:
        self._files |= {int(file.name[:8]): file for file in self.folder.glob(f"*{self.suffix}")}

    def _file(self, index: int, key: Any) -> Path:
        return self.folder / f"{index:08d}-{digest_of(key)}{self.suffix}"


class RowFile:
    """
    Results of rows, one line of JSON each, with the index in `"row"`: `rows` are those on disk. One process appends to the
    file itself; several append to a part each, which [`~RowFile.merge`] joins. A last line that was cut off is removed.

    Arguments as in [`check_fingerprint`]; the fingerprint is in `FILE.fingerprint.json`. Raises a `ValueError` if the file
    belongs to another run or to none that is known, has rows beyond the last one, a row twice, or a line that is no result.
    """

    def __init__(
        self, file: str | os.PathLike, fingerprint: Mapping[str, Any], num_rows: int, name: str | None = None
    ) -> None:
        self.file = Path(file)
        self.name = name or f"{os.fspath(file)!r}"
        self.processes = Processes.current()
        beside = self.file.with_name(f"{self.file.name}.fingerprint.json")
        if not beside.exists() and any(path.stat().st_size for path in self._files()):
            raise ValueError(
                f"{self.name} has results, but `{beside.name}`, which tells what made them, is not beside it. Put it back, or "
                "choose another file."
            )
        check_fingerprint(beside, fingerprint, self.name)
        self.rows: dict[int, dict[str, Any]] = {}
        for path in self._files():
            for row, result in self._read(path).items():
                if self.rows.setdefault(row, result) != result:
                    raise ValueError(
                        f"{self.name} and its parts have two results of row {row}. Remove it, or one part."
                    )
        beyond = sorted(row for row in self.rows if not 0 <= row < num_rows)
        if beyond:
            raise ValueError(
                f"{self.name} has results of the rows {beyond[:3]}, but there are {num_rows} rows only. Choose another file for "
                "other rows."
            )
        self.processes.wait()  # all have read before one writes

    def append(self, results: Sequence[Mapping[str, Any]]) -> None:
        """Append results, each with `"row"` and values that JSON can hold; they are on disk when this returns."""
        with open(self._own(), "ab") as stream:
            stream.write("".join(json.dumps(dict(result)) + "\n" for result in results).encode())
            stream.flush()
            os.fsync(stream.fileno())
        self.rows.update({int(result["row"]): dict(result) for result in results})

    def merge(self) -> None:
        """Join the parts of all processes in the file, in the order of rows. Every process must come here."""
        self.processes.wait()
        parts = [path for path in self._files() if path != self.file]
        if parts and self.processes.is_main:
            rows = {row: result for path in self._files() for row, result in self._read(path).items()}
            lines = (json.dumps(result) + "\n" for _, result in sorted(rows.items()))
            write_atomically(self.file, "".join(lines).encode())
            for path in parts:
                path.unlink()
        self.processes.wait()

    def _own(self) -> Path:
        if self.processes.count == 1:
            return self.file
        return self.file.with_name(f"{self.file.name}.{self.processes.index:05d}-of-{self.processes.count:05d}")

    def _files(self) -> list[Path]:
        five = "[0-9]" * 5
        pattern = f"{glob.escape(self.file.name)}.{five}-of-{five}"
        return [self.file] * self.file.exists() + sorted(self.file.parent.glob(pattern))

    def _read(self, path: Path) -> dict[int, dict[str, Any]]:
        content = path.read_bytes()
        end = content.rfind(b"\n") + 1
        results: dict[int, dict[str, Any]] = {}
        for number, line in enumerate(content[:end].splitlines(), 1):
            try:
                result = json.loads(line)
                row = int(result["row"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"Line {number} of {self.name} is no result of a row ({error}), but all must be. Repair or remove it, or "
                    "choose another file."
                ) from error
            if row in results:
                raise ValueError(
                    f"Line {number} of {self.name} is a second result of row {row}, but each has one. Were two runs writing to "
                    "it? Remove it, or choose another file."
                )
            results[row] = result
        if end < len(content) and path == self._own():
            os.truncate(path, end)
        return results
