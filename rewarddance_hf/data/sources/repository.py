"""Files and tables of a dataset repository: on the Hub, under its old or new owner, or in a local folder of the same layout."""

import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

from ..rows import keep_images_encoded
from .rows import check_schema


# Organizations that were renamed: old name -> new name. Repositories are looked up under both.
RENAMED_OWNERS = {"THUDM": "zai-org", "KwaiVGI": "KlingTeam", "TIGER-Lab": "TIGER-AI-Lab"}


def canonical_name(repo_id: str) -> str:
    """Name by which two IDs of one repository are equal: in lower case, under the new name of its owner."""
    owner, slash, name = repo_id.lower().partition("/")
    return {old.lower(): new.lower() for old, new in RENAMED_OWNERS.items()}.get(owner, owner) + slash + name


class DatasetRepository:
    """
    Dataset repository at one commit: on the Hub, where a `ValueError` says that it is under no name of its owner, or in a
    local folder.
    """

    def __init__(self, repo_id: str | os.PathLike, revision: str | None = None, token: str | None = None) -> None:
        self.repo_id = os.fspath(repo_id)
        self.revision = revision
        self.token = token
        self.is_local = os.path.isdir(self.repo_id)
        if self.is_local:
            return
        owner, _, name = self.repo_id.partition("/")
        renamed = [*RENAMED_OWNERS.items(), *((new, old) for old, new in RENAMED_OWNERS.items())]
        candidates = [self.repo_id, *(f"{other}/{name}" for known, other in renamed if known == owner)]
        for candidate in candidates:
            try:
                info = HfApi(token=token).dataset_info(candidate, revision=revision)
            except OfflineModeIsEnabled:
                return  # what is in the cache has to do
            except GatedRepoError:
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
        """Local path of a file, downloaded if need be. Raises a `ValueError` if there is no such file."""
        if name not in self.files:
            some = [*sorted(self.files)[:10], *(["..."] if len(self.files) > 10 else [])]
            raise ValueError(
                f"{self.repo_id!r} has no file {name!r}; it has {some}. Its layout has moved: pass `revision=` of an older "
                "version."
            )
        if self.is_local:
            return os.path.join(self.repo_id, name)
        return hf_hub_download(self.repo_id, name, repo_type="dataset", revision=self.revision, token=self.token)

    def records(self, name: str, columns: Sequence[str]) -> list[dict[str, Any]]:
        """Records of a JSON file with one list, or with one record a line, each of which must have these columns."""
        text = Path(self.path(name)).read_text(encoding="utf-8")
        lines = [text] if text.lstrip().startswith("[") else [line for line in text.split("\n") if line.strip()]
        try:
            parsed = [json.loads(line) for line in lines]
        except json.JSONDecodeError as error:
            raise ValueError(f"{name} of {self.repo_id!r} is no JSON ({error}). Download it again.") from error
        records = parsed[0] if parsed and isinstance(parsed[0], list) else parsed
        for record in records:
            if not set(columns) <= set(record):
                check_schema(record, columns, f"{name} of {self.repo_id!r}")
        return records

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
        Load a split of a table, and only its files, with images not decoded.

        Of the result are the `columns`, which must be there, the first of the groups `one_of` that is there, and those of
        `optional` that are. Raises a `ValueError` if the split or a column is missing, or a file is damaged.
        """
        try:
            table = self._load_split(config, split, streaming)
        except datasets.exceptions.DatasetsError as error:
            raise ValueError(f"The table of {self.repo_id!r}, split {split!r}, cannot be loaded: {error}") from error
        found = table.column_names or list(next(iter(table), {}))
        group = next((group for group in one_of if set(group) <= set(found)), one_of[0])
        check_schema(found, [*columns, *group], f"Split {split!r} of {self.repo_id!r}")
        return keep_images_encoded(
            table.select_columns([*columns, *group, *(name for name in optional if name in found)])
        )

    def _load_split(self, config: str | None, split: str, streaming: bool) -> Any:
        builder = datasets.load_dataset_builder(self.repo_id, config, revision=self.revision, token=self.token)
        data_files = builder.config.data_files or {}
        if split not in data_files:
            raise ValueError(
                f"`split` is {split!r}, but {self.repo_id!r} has {sorted(map(str, data_files))}. Choose one of them; for a part "
                "of one use `.take(n)` on its rows."
            )
        # `load_dataset(repo_id, split=...)` would prepare all splits: 335 GB of Pick-a-Pic for 7 GB of its test split.
        return datasets.load_dataset(
            builder.name,
            data_files={split: list(data_files[split])},
            split=split,
            features=builder.info.features,
            streaming=streaming,
            token=self.token,
        )
