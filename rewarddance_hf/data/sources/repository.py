"""Files of a dataset repository: on the Hub, under its old or new owner, or in a local folder of the same layout."""

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
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
from huggingface_hub import HfApi, HfFileSystem, cached_assets_path, hf_hub_download
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError

from ..rows import keep_images_encoded
from .rows import check_schema
from .terms import RENAMED_OWNERS, terms_of


# "images.tar.gz.aa", "images.tar.part001": a part of "images.tar.gz", "images.tar".
ARCHIVE = re.compile(r"(?P<whole>.+\.(?:tar\.gz|tgz|tar|zip))(?P<part>[.\-_]\w+)?", re.IGNORECASE)


class DatasetRepository:
    """
    Dataset repository at one commit.

    Args:
        repo_id (`str` or `os.PathLike`):
            Repository ID on the Hub, or local folder.
        revision (`str`, *optional*):
            Branch, tag or commit.
        token (`str`, *optional*):
            Token for the Hub. Defaults to the one that is stored.

    Raises:
        `ValueError`: If no such repository is found under any name of its owner.
    """

    def __init__(self, repo_id: str | os.PathLike, revision: str | None = None, token: str | None = None) -> None:
        self.repo_id = os.fspath(repo_id)
        self.revision = revision
        self.token = token
        self.is_local = os.path.isdir(self.repo_id)
        if self.is_local:
            return
        candidates = _names(self.repo_id)
        for candidate in candidates:
            try:
                info = HfApi(token=token).dataset_info(candidate, revision=revision)
            except OfflineModeIsEnabled:
                return  # what is in the cache has to do
            except (GatedRepoError, RevisionNotFoundError):
                raise
            except RepositoryNotFoundError:
                continue
            self.repo_id = candidate
            self.revision = info.sha  # all files of one commit, whatever is pushed meanwhile
            self.files = frozenset(file.rfilename for file in info.siblings or ())
            return
        raise ValueError(
            f"There is no dataset under any of {candidates} on the Hub, or your token may not read it. It may have moved or "
            "been taken down: pass `repo_id=` of a mirror or a local folder of the same layout, or `token=`."
        )

    @cached_property
    def files(self) -> frozenset[str]:
        """Paths of all files, with forward slashes."""
        if self.is_local:
            root = Path(self.repo_id)
            return frozenset(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
        raise ValueError(
            f"The files of {self.repo_id!r} cannot be listed offline. Unset `HF_HUB_OFFLINE`, or pass a local folder as "
            "`repo_id=`."
        )

    def path(self, name: str) -> str:
        """
        Local path of a file, downloaded if need be.

        Args:
            name (`str`):
                Path in the repository.

        Returns:
            `str`: Path.

        Raises:
            `ValueError`: If there is no such file.
        """
        if name not in self.files:
            raise ValueError(
                f"{self.repo_id!r} has no file {name!r}; it has {_some(self.files)}. Its layout has moved: pass `revision=` of "
                "an older version."
            )
        if self.is_local:
            return os.path.join(self.repo_id, name)
        return hf_hub_download(self.repo_id, name, repo_type="dataset", revision=self.revision, token=self.token)

    def open(self, name: str) -> Any:
        """Open a file for reading at any position, without downloading it whole."""
        if self.is_local:
            return open(os.path.join(self.repo_id, name), "rb")
        return HfFileSystem(token=self.token).open(f"datasets/{self.repo_id}@{self.revision}/{name}", "rb")

    def table(
        self,
        config: str | None,
        split: str,
        columns: Sequence[str],
        streaming: bool,
        optional: Sequence[str] = (),
        one_of: Sequence[Sequence[str]] = ((),),
    ) -> Any:
        """
        Load a split of a table, and only its files.

        Args:
            config (`str`, *optional*):
                Configuration of the dataset.
            split (`str`):
                Split.
            columns (`Sequence[str]`):
                Columns that must be there.
            streaming (`bool`):
                Whether to read rows as they are needed.
            optional (`Sequence[str]`, *optional*):
                Columns that are read if they are there.
            one_of (`Sequence[Sequence[str]]`, *optional*):
                Groups of columns of which one must be there; the first that is there is read.

        Returns:
            `datasets.Dataset` or `datasets.IterableDataset`: Those columns, with images not decoded.

        Raises:
            `ValueError`: If the split or a column is missing, or a file is damaged.
        """
        try:
            return self._table(config, split, columns, streaming, optional, one_of)
        except datasets.exceptions.DatasetsError as error:
            raise ValueError(f"The table of {self.repo_id!r}, split {split!r}, cannot be loaded: {error}") from error

    def _table(
        self,
        config: str | None,
        split: str,
        columns: Sequence[str],
        streaming: bool,
        optional: Sequence[str],
        one_of: Sequence[Sequence[str]],
    ) -> Any:
        builder = datasets.load_dataset_builder(self.repo_id, config, revision=self.revision, token=self.token)
        data_files = builder.config.data_files or {}
        if split not in data_files:
            raise ValueError(
                f"`split` is {split!r}, but {self.repo_id!r} has {sorted(map(str, data_files))}. Choose one of them; for a part "
                "of one use `.take(n)` on its rows."
            )
        # `load_dataset(repo_id, split=...)` would prepare all splits: 335 GB of Pick-a-Pic for 7 GB of its test split.
        table = datasets.load_dataset(
            builder.name,
            data_files={split: list(data_files[split])},
            split=split,
            features=builder.info.features,
            streaming=streaming,
            token=self.token,
        )
        found = table.column_names or list(next(iter(table), {}))
        group = next((group for group in one_of if set(group) <= set(found)), one_of[0])
        check_schema(found, [*columns, *group], f"Split {split!r} of {self.repo_id!r}")
        return keep_images_encoded(
            table.select_columns([*columns, *group, *(name for name in optional if name in found)])
        )

    def describe(self, dataset: Any, original: str | None) -> Any:
        """
        Write where rows are from and under which license into their `info`.

        Args:
            dataset (`datasets.Dataset` or `datasets.IterableDataset`):
                Rows.
            original (`str`, *optional*):
                Repository ID of the dataset, whose terms hold for mirrors and local copies too. None for adapters of several
                datasets.

        Returns:
            The same dataset.
        """
        is_known = not self.is_local and terms_of(self.repo_id).license != "unknown"
        name = self.repo_id if is_known or (original is None and not self.is_local) else original
        dataset.info.license = terms_of(name or "").license
        dataset.info.homepage = f"https://huggingface.co/datasets/{name}" if name else ""
        return dataset


class MediaFiles:
    """
    Images or clips of a repository by the paths that its annotations have: loose files, or members of archives.

    Tar archives, which may be split in parts, are extracted once into the assets folder of the Hub's cache. Members of a
    zip archive are read through the network one by one when rows are streamed, else it is extracted too.

    Args:
        repository ([`DatasetRepository`]):
            Repository.
        streaming (`bool`):
            Whether rows are streamed.
        folders (`Sequence[str]`, *optional*, defaults to `("",)`):
            Folders that the paths may be relative to.
        archives (`str`, *optional*, defaults to `""`):
            Beginning of the names of the archives to look into.
    """

    def __init__(
        self, repository: DatasetRepository, streaming: bool, folders: Sequence[str] = ("",), archives: str = ""
    ) -> None:
        self.repository = repository
        self.streaming = streaming
        self.folders = tuple(folders)
        self.archives: dict[str, list[str]] = {}
        for file in sorted(repository.files):
            if (match := ARCHIVE.fullmatch(file)) and file.startswith(archives):
                self.archives.setdefault(match["whole"], []).append(file)
        self._opened: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}  # open files do not travel to workers of a data loader

    def __call__(self, path: str) -> str | dict[str, Any]:
        """
        Find an image or clip.

        Args:
            path (`str`):
                Path in the annotations.

        Returns:
            `str` or `dict`: Local path, or `{"bytes": ..., "path": ...}`.

        Raises:
            `ValueError`: If there is no such file.
        """
        names = [str(PurePosixPath(folder, path)) for folder in self.folders]
        for name in names:
            if name in self.repository.files:
                return self.repository.path(name)
        # images/train_7.zip holds what annotations call images/train_7/..., and the other archives need not be opened.
        named = [a for a in self.archives if any(name.startswith(_stem(a) + "/") for name in names)]
        for archive in named or self.archives:
            opened = self._open(archive, self.archives[archive])
            for name in names:
                for base in (_stem(archive), os.path.dirname(archive)):
                    member = os.path.relpath(name, base or ".")
                    if not member.startswith("..") and (found := _member(opened, member)) is not None:
                        return found
        raise ValueError(
            f"{self.repository.repo_id!r} has no file for {path!r}: looked for {names} beside and in the archives "
            f"{sorted(self.archives)}. Its layout has moved, or an archive is not complete."
        )

    def _open(self, archive: str, parts: list[str]) -> Any:
        if archive not in self._opened:
            if self.streaming and archive.lower().endswith(".zip") and len(parts) == 1:
                file = self.repository.open(parts[0])
                try:
                    self._opened[archive] = zipfile.ZipFile(file)
                except zipfile.BadZipFile as error:
                    raise _broken(self.repository, archive, error) from error
            else:
                self._opened[archive] = _extract(self.repository, archive, parts)
        return self._opened[archive]


def _member(opened: Any, member: str) -> str | dict[str, Any] | None:
    """Member of an archive that is open, or of the folder that it was extracted to."""
    if isinstance(opened, zipfile.ZipFile):
        try:
            return {"bytes": opened.read(member), "path": os.path.basename(member)}
        except KeyError:
            return None
    path = os.path.join(opened, member)
    return path if os.path.isfile(path) else None


def _extract(repository: DatasetRepository, archive: str, parts: list[str]) -> str:
    """Folder with the members of an archive, whole or not there at all."""
    paths = [repository.path(part) for part in parts]
    if repository.is_local:
        state = [(os.path.abspath(path), os.path.getsize(path), os.path.getmtime(path)) for path in paths]
        version = hashlib.sha256(repr(state).encode()).hexdigest()[:16]
        parent = cached_assets_path("rewarddance_hf", namespace="local", subfolder=version)
    else:
        parent = cached_assets_path("rewarddance_hf", namespace=repository.repo_id, subfolder=str(repository.revision))
    target = parent / archive.replace("/", "--")
    if target.is_dir():
        return str(target)
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
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, OSError) as error:
        raise _broken(repository, archive, error) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return str(target)


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


def _broken(repository: DatasetRepository, archive: str, error: Exception) -> ValueError:
    return ValueError(
        f"Archive {archive!r} of {repository.repo_id!r} cannot be read ({error}). It may be truncated, or a part may be "
        "missing, or the disk full: nothing of it was kept. Download it again."
    )


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


def _names(repo_id: str) -> list[str]:
    """A repository ID under all names of its owner."""
    owner, _, name = repo_id.partition("/")
    pairs = [*RENAMED_OWNERS.items(), *((new, old) for old, new in RENAMED_OWNERS.items())]
    return [repo_id, *(f"{other}/{name}" for known, other in pairs if known == owner)]


def _stem(archive: str) -> str:
    return re.sub(r"\.(tar\.gz|tgz|tar|zip)$", "", archive, flags=re.IGNORECASE)


def _some(names: frozenset[str]) -> list[str]:
    return [*sorted(names)[:10], *(["..."] if len(names) > 10 else [])]
