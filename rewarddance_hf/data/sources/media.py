"""Images and clips of a dataset repository by the names that its annotations have: loose files, or members of archives."""

import contextlib
import gzip
import hashlib
import io
import os
import re
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from datasets.utils.file_utils import cached_path
from fsspec.implementations.zip import ZipFileSystem
from huggingface_hub import HfFileSystem, cached_assets_path

from .repository import DatasetRepository


# "images.tar.gz.aa", "images.tar.part001": a part of "images.tar.gz", "images.tar".
ARCHIVE = re.compile(r"(?P<whole>(?P<stem>.+)\.(?P<kind>tar\.gz|tgz|tar|zip))(?P<part>[.\-_]\w+)?", re.IGNORECASE)


class MediaFiles:
    """
    Images or clips of a repository by the paths that its annotations have, which may be relative to any of `folders`: loose
    files, or members of archives, whose names begin with `archives`.

    Tar archives, which may be split in parts, are extracted once into the assets folder of the Hub's cache. Members of a
    zip archive are read through the network one by one when rows are streamed, else it is extracted too.
    """

    def __init__(
        self, repository: DatasetRepository, streaming: bool, folders: Sequence[str] = ("",), archives: str = ""
    ) -> None:
        self.repository, self.streaming, self.folders = repository, streaming, folders
        self.archives: dict[str, list[str]] = {}  # name -> its parts
        for file in sorted(repository.files):
            if (match := ARCHIVE.fullmatch(file)) and file.startswith(archives):
                self.archives.setdefault(match["whole"], []).append(file)
        self._opened: dict[str, ZipFileSystem | Path] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}  # open files do not travel to workers of a data loader

    def __call__(self, path: str) -> str | dict[str, Any]:
        """Local path, or `{"bytes": ..., "path": ...}`. Raises a `ValueError` if there is no such file."""
        names = [str(PurePosixPath(folder, path)) for folder in self.folders]
        for name in names:
            if name in self.repository.files:
                return self.repository.path(name)
        stems = {archive: ARCHIVE.fullmatch(archive)["stem"] for archive in self.archives}  # type: ignore[index]
        # images/train_7.zip holds what annotations call images/train_7/..., and the other archives need not be opened.
        named = [archive for archive, stem in stems.items() if any(name.startswith(stem + "/") for name in names)]
        for archive in named or self.archives:
            for name in names:
                for base in (stems[archive], os.path.dirname(archive)):
                    member = os.path.relpath(name, base or ".")
                    if not member.startswith("..") and (found := self._member(archive, member)) is not None:
                        return found
        raise ValueError(
            f"{self.repository.repo_id!r} has no file for {path!r}: looked for {names} beside and in the archives "
            f"{sorted(self.archives)}. Its layout has moved, or an archive is not complete."
        )

    def _member(self, archive: str, member: str) -> str | dict[str, Any] | None:
        if archive not in self._opened:
            self._opened[archive] = _open(self.repository, archive, self.archives[archive], self.streaming)
        opened = self._opened[archive]
        if isinstance(opened, Path):
            return str(opened / member) if (opened / member).is_file() else None
        if not opened.isfile(member):
            return None
        return {"bytes": opened.cat_file(member), "path": os.path.basename(member)}


class VideoFiles(MediaFiles):
    """
    Videos of a repository by the names that its annotations have: a path or its end, wherever the file lies, a member of an
    archive, or an address on the web, which is downloaded into the cache of `datasets`.
    """

    def __init__(self, repository: DatasetRepository, streaming: bool) -> None:
        super().__init__(repository, streaming, ("", "videos", "Videos"))
        self._by_name: dict[str, list[str]] = defaultdict(list)
        for file in repository.files:
            self._by_name[PurePosixPath(file).name].append(file)

    def __call__(self, path: str) -> str | dict[str, Any]:
        """Local path, or bytes. Raises a `ValueError` if there is no such video, or several have this name."""
        is_address = path.startswith(("http://", "https://"))
        # Some tables give addresses of videos that lie in the repository, as <generator>/<file>.
        parts = PurePosixPath(path).parts[-2:] if is_address else PurePosixPath(path).parts
        found = [file for file in self._by_name[parts[-1]] if PurePosixPath(file).parts[-len(parts) :] == parts]
        if len(found) == 1:
            return self.repository.path(found[0])
        if is_address:
            return cached_path(path)
        if len(found) > 1 and path not in found:
            raise ValueError(
                f"{path!r} may be any of {sorted(found)} of {self.repository.repo_id!r}. Rename all but one."
            )
        return super().__call__(path)


def _open(repository: DatasetRepository, archive: str, parts: list[str], streaming: bool) -> ZipFileSystem | Path:
    """Archive to be read member by member, or the folder that it was extracted to."""
    try:
        if not (streaming and archive.lower().endswith(".zip") and len(parts) == 1):
            return _extract(repository, archive, [repository.path(part) for part in parts])
        if repository.is_local:
            return ZipFileSystem(repository.path(parts[0]))
        remote = HfFileSystem(token=repository.token)
        return ZipFileSystem(remote.open(f"datasets/{repository.repo_id}@{repository.revision}/{parts[0]}"))
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, OSError) as error:
        raise ValueError(
            f"Archive {archive!r} of {repository.repo_id!r} cannot be read ({error}). It may be truncated, or a part may be "
            "missing, or the disk full: nothing of it was kept. Download it again."
        ) from error


def _extract(repository: DatasetRepository, archive: str, paths: list[str]) -> Path:
    """Folder with the members of an archive, whole or not there at all."""
    namespace, version = repository.repo_id, str(repository.revision)
    if repository.is_local:
        state = [(os.path.abspath(path), os.path.getsize(path), os.path.getmtime(path)) for path in paths]
        namespace, version = "local", hashlib.sha256(repr(state).encode()).hexdigest()[:16]
    parent = cached_assets_path("rewarddance_hf", namespace=namespace, subfolder=version)
    target = parent / archive.replace("/", "--")
    if target.is_dir():
        return target
    # A whole folder appears at once, by its renaming: `resumable.write_atomically` is for single files.
    unfinished = tempfile.mkdtemp(dir=parent, prefix="unfinished-")
    try:
        with _JoinedFiles(paths) as joined:
            if archive.lower().endswith(".zip"):
                with zipfile.ZipFile(joined) as zip_file:
                    zip_file.extractall(unfinished)
            else:
                _extract_tar(joined, unfinished)
        if not target.is_dir():
            os.replace(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


def _extract_tar(joined: "_JoinedFiles", folder: str) -> None:
    """Extract a whole tar file: tarfile itself takes one that was cut between two members for a shorter one."""
    is_compressed = joined.read(2) == b"\x1f\x8b"
    if not is_compressed:
        joined.seek(-min(tarfile.BLOCKSIZE, joined.size), os.SEEK_END)
        if joined.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            raise EOFError("its end is missing")
    joined.seek(0)
    with gzip.GzipFile(fileobj=joined) if is_compressed else contextlib.nullcontext(joined) as stream:
        with tarfile.open(fileobj=stream, mode="r|") as tar_file:
            tar_file.extractall(folder, filter="data")  # nothing outside of the folder
        while stream.read(2**20):  # gzip notices at its end whether all was there
            pass


class _JoinedFiles(io.RawIOBase):
    """Parts of a split file, read as one."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._files = [open(path, "rb") for path in paths]
        sizes = [os.path.getsize(path) for path in paths]
        self._starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        self._position = 0
        self.size = self._starts[-1]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self.size)[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        for file, start, end in zip(self._files, self._starts, self._starts[1:], strict=False):
            if start <= self._position < end:
                file.seek(self._position - start)
                count = file.readinto(memoryview(buffer)[: end - self._position])
                self._position += count
                return count
        return 0

    def close(self) -> None:
        for file in self._files:
            file.close()
        super().close()
