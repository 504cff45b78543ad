"""Text-to-video and image-to-video preference datasets, whose videos are fetched when a row is read."""

import csv
import os
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import datasets
from datasets.utils.file_utils import cached_path

from .images import DIMENSION_CRITERIA, read_json
from .repository import DatasetRepository, MediaFiles
from .rows import FEATURES, check_schema, make_row, rows_from_records, rows_from_table, share_of_votes


RAPIDATA_VIDEOS = "Rapidata/text-2-video-human-preferences"
VIDEOGEN_REWARDBENCH = "KlingTeam/VideoGen-RewardBench"
VIDEODPO = "chungimungi/VideoDPO-10k"

# A clip is known by the name that the annotations have for it, until it is fetched.
CLIP_FEATURES = datasets.Features(
    {**FEATURES, "chosen": datasets.Value("string"), "rejected": datasets.Value("string")}
)

# What annotators of VideoGen-RewardBench were asked (VQ, MQ, TA; Overall is all three).
VIDEO_CRITERIA = {
    "Overall": None,
    "VQ": "visual quality: clarity, aesthetics and plausible single frames",
    "MQ": "motion quality: stable, plausible and natural motion, and enough of it",
    "TA": "text alignment: how well the video shows what the prompt says",
}


def load_rapidata_videos(
    split: str = "train",
    streaming: bool = False,
    revision: str | None = None,
    token: str | None = None,
    repo_id: str | os.PathLike = RAPIDATA_VIDEOS,
    dimension: str = "preference",
) -> Any:
    """
    Load a text-to-video or image-to-video comparison of Rapidata. Weighted votes become margins; equal votes are ties.

    Args:
        split (`str`, *optional*, defaults to `"train"`):
            Split.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to read rows as they are needed.
        revision (`str`, *optional*):
            Branch, tag or commit.
        token (`str`, *optional*):
            Token for the Hub.
        repo_id (`str` or `os.PathLike`, *optional*, defaults to `"Rapidata/text-2-video-human-preferences"`):
            This one, or one for a generator (`...-pika2.2`, `-veo2`, `-veo3`, `-wan2.1`, `-seedance-1-pro`), or one of
            `Rapidata/image-2-video-human-preferences-*`, whose rows have their first frame as `condition`.
        dimension (`str`, *optional*, defaults to `"preference"`):
            `"preference"`, `"coherence"` or `"alignment"`, what annotators were asked about.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: Preference rows. Videos are fetched when a row is read.

    Raises:
        `ValueError`: If the dataset, the split or a column is not found.
    """
    if dimension not in ("preference", "coherence", "alignment"):
        raise ValueError(f"`dimension` is {dimension!r}, but must be 'preference', 'coherence' or 'alignment'.")
    repository = DatasetRepository(repo_id, revision, token)
    votes = [f"weighted_results{i}_{dimension.capitalize()}" for i in (1, 2)]
    columns = ["prompt", "file_name1", "file_name2", *votes]
    table = repository.table(None, split, columns, streaming, optional=["prompt_asset"])
    convert = partial(_rapidata_rows, votes=votes, criteria=DIMENSION_CRITERIA[dimension])
    rows = rows_from_table(table, convert, CLIP_FEATURES)
    return repository.describe(fetch_clips(rows, VideoFiles(repository, streaming)), None)


def _rapidata_rows(row: Mapping[str, Any], votes: list[str], criteria: str | None) -> list[dict[str, Any]]:
    share = share_of_votes(row[votes[0]], row[votes[1]], repr(row["prompt"]))
    context: dict[str, Any] = {"task": "text-to-video", "criteria": criteria}
    if row.get("prompt_asset"):
        context |= {"task": "image-to-video", "condition": {"path": None, **row["prompt_asset"]}}
    return [make_row(row["prompt"], row["file_name1"], row["file_name2"], share, is_soft=True, **context)]


def load_videogen_rewardbench(
    split: str = "eval",
    streaming: bool = False,
    revision: str | None = None,
    token: str | None = None,
    repo_id: str | os.PathLike = VIDEOGEN_REWARDBENCH,
    dimension: str = "Overall",
) -> Any:
    """
    Load VideoGen-RewardBench ([paper](https://huggingface.co/papers/2501.13918)). Verdicts of "same" are ties.

    Args:
        split (`str`, *optional*, defaults to `"eval"`):
            Split, of which there is one.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to read rows as they are needed. Videos are then read one by one out of the remote archive of 13 GB.
        revision (`str`, *optional*):
            Branch, tag or commit.
        token (`str`, *optional*):
            Token for the Hub.
        repo_id (`str` or `os.PathLike`, *optional*, defaults to `"KlingTeam/VideoGen-RewardBench"`):
            Mirror, or local folder, of the same layout.
        dimension (`str`, *optional*, defaults to `"Overall"`):
            `"Overall"`, `"VQ"`, `"MQ"` or `"TA"`: whose verdicts are used. Rows without one are left out.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: Preference rows, with `criteria` for single dimensions. Videos are
        fetched when a row is read.

    Raises:
        `ValueError`: If the dataset, a file or a column is not found, or a verdict is neither A, B nor same.
    """
    if dimension not in VIDEO_CRITERIA:
        raise ValueError(f"`dimension` is {dimension!r}, but must be one of {sorted(VIDEO_CRITERIA)}.")
    if split != "eval":
        raise ValueError(f"`split` is {split!r}, but VideoGen-RewardBench has 'eval' only.")
    repository = DatasetRepository(repo_id, revision, token)
    tables = sorted(file for file in repository.files if file.endswith(".csv"))
    if len(tables) != 1:
        raise ValueError(
            f"{repository.repo_id!r} has the tables {tables}, but VideoGen-RewardBench has one CSV file. Its layout has moved: "
            "pass `revision=` of an older version."
        )
    with open(repository.path(tables[0]), encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        columns = ["path_A", "path_B", "prompt", dimension]
        check_schema(reader.fieldnames, columns, f"{tables[0]} of {repository.repo_id!r}")
        records = [record for record in reader if record[dimension]]
    rows = rows_from_records(records, partial(_videogen_rows, dimension=dimension), streaming, CLIP_FEATURES)
    return repository.describe(fetch_clips(rows, VideoFiles(repository, streaming)), VIDEOGEN_REWARDBENCH)


def _videogen_rows(record: Mapping[str, Any], dimension: str) -> list[dict[str, Any]]:
    preferences = {"A": 1.0, "B": 0.0, "same": 0.5}
    verdict = record[dimension]
    if verdict not in preferences:
        raise ValueError(
            f"`{dimension}` of {record['path_A']!r} and {record['path_B']!r} is {verdict!r}, but must be one of "
            f"{sorted(preferences)}. The schema of VideoGen-RewardBench has moved."
        )
    row = make_row(record["prompt"], record["path_A"], record["path_B"], preferences[verdict])
    return [row | {"task": "text-to-video", "criteria": VIDEO_CRITERIA[dimension]}]


def load_videodpo(
    split: str = "train",
    streaming: bool = False,
    revision: str | None = None,
    token: str | None = None,
    repo_id: str | os.PathLike = VIDEODPO,
) -> Any:
    """
    Load VideoDPO ([paper](https://huggingface.co/papers/2412.14167)) from its `pair.json`. The preferred video always is
    `video1`, as `chosen` is here. A video that is given by its number is `winvideos/<half>.mp4` if that is even, else
    `losevideos/<half>.mp4`, with six digits.

    Args:
        split (`str`, *optional*, defaults to `"train"`):
            Split, of which there is one.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to read rows as they are needed.
        revision (`str`, *optional*):
            Branch, tag or commit.
        token (`str`, *optional*):
            Token for the Hub.
        repo_id (`str` or `os.PathLike`, *optional*, defaults to `"chungimungi/VideoDPO-10k"`):
            Mirror, or local folder, of the same layout.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: Preference rows. Videos are fetched when a row is read.

    Raises:
        `ValueError`: If the dataset, a file or a column is not found.
    """
    if split != "train":
        raise ValueError(f"`split` is {split!r}, but VideoDPO has 'train' only.")
    repository = DatasetRepository(repo_id, revision, token)
    name = next((file for file in sorted(repository.files) if PurePosixPath(file).name == "pair.json"), "pair.json")
    records = read_json(repository, name, ["video1", "video2", "frame_caption"])
    rows = rows_from_records(records, _videodpo_rows, streaming, CLIP_FEATURES)
    return repository.describe(fetch_clips(rows, VideoFiles(repository, streaming)), VIDEODPO)


def _videodpo_rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    preferred, other = (
        video if isinstance(video, str) else f"{('winvideos', 'losevideos')[video % 2]}/{video // 2:06d}.mp4"
        for video in (record["video1"], record["video2"])
    )
    return [make_row(record["frame_caption"], preferred, other, 1.0, task="text-to-video")]


class VideoFiles(MediaFiles):
    """
    Videos of a repository by the names that its annotations have: a path or its end, wherever the file lies, a member of an
    archive, or an address on the web, which is downloaded into the cache of `datasets`.

    Args:
        repository ([`DatasetRepository`]):
            Repository.
        streaming (`bool`):
            Whether rows are streamed.
    """

    def __init__(self, repository: DatasetRepository, streaming: bool) -> None:
        super().__init__(repository, streaming, ("", "videos", "Videos"))
        self._by_name: dict[str, list[str]] = defaultdict(list)
        for file in repository.files:
            self._by_name[PurePosixPath(file).name].append(file)

    def __call__(self, path: str) -> str | dict[str, Any]:
        """
        Find a video.

        Args:
            path (`str`):
                Name in the annotations.

        Returns:
            `str` or `dict`: Local path, or `{"bytes": ..., "path": ...}`.

        Raises:
            `ValueError`: If there is no such video, or several have this name.
        """
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


def fetch_clips(rows: Any, files: VideoFiles) -> Any:
    """
    Let rows have their videos as files on this machine, or as bytes, when they are read.

    Args:
        rows (`datasets.Dataset` or `datasets.IterableDataset`):
            Rows whose `chosen` and `rejected` are names of videos.
        files ([`VideoFiles`]):
            Finds a video by its name.

    Returns:
        Rows of the same kind, with what [`~rewarddance_hf.models.video_rewarddance.open_clip`] takes.
    """
    fetch = partial(_fetch_columns, files=files)
    if isinstance(rows, datasets.IterableDataset):
        return rows.map(fetch, batched=True, batch_size=1)
    return rows.with_transform(fetch)


def _fetch_columns(batch: dict[str, list[Any]], files: VideoFiles) -> dict[str, list[Any]]:
    columns = [column for column in ("chosen", "rejected") if column in batch]
    return {**batch, **{column: [files(name) for name in batch[column]] for column in columns}}
