"""Text-to-video and image-to-video preference datasets, whose videos are fetched when a row is read."""

import csv
from collections.abc import Mapping
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from .media import VideoFiles
from .repository import DatasetRepository
from .rows import DIMENSION_CRITERIA, check_schema, make_row, rows_from_records, rows_from_table, share_of_votes
from .source import Benchmark, DatasetTerms, Source


# What annotators of VideoGen-RewardBench were asked (VQ, MQ, TA; Overall is all three).
VIDEOGEN_CRITERIA = {
    "Overall": None,
    "VQ": "visual quality: clarity, aesthetics and plausible single frames",
    "MQ": "motion quality: stable, plausible and natural motion, and enough of it",
    "TA": "text alignment: how well the video shows what the prompt says",
}


def _read_rapidata(repository: DatasetRepository, split: str, streaming: bool, dimension: str) -> Any:
    votes = [f"weighted_results{i}_{dimension.capitalize()}" for i in (1, 2)]
    columns = ["prompt", "file_name1", "file_name2", *votes]
    table = repository.table(None, split, columns, streaming, optional=["prompt_asset"])
    convert = partial(_rapidata_rows, votes=votes, criteria=DIMENSION_CRITERIA[dimension])
    return rows_from_table(table, convert, VideoFiles(repository, streaming))


def _rapidata_rows(row: Mapping[str, Any], votes: list[str], criteria: str | None) -> list[dict[str, Any]]:
    share = share_of_votes(row[votes[0]], row[votes[1]], repr(row["prompt"]))
    context: dict[str, Any] = {"task": "text-to-video", "criteria": criteria}
    if row.get("prompt_asset"):
        context |= {"task": "image-to-video", "condition": {"path": None, **row["prompt_asset"]}}
    return [make_row(row["prompt"], row["file_name1"], row["file_name2"], share, is_soft=True, **context)]


def _read_videogen_rewardbench(repository: DatasetRepository, split: str, streaming: bool, dimension: str) -> Any:
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
    convert = partial(_videogen_rows, dimension=dimension)
    return rows_from_records(records, convert, streaming, VideoFiles(repository, streaming))


def _videogen_rows(record: Mapping[str, Any], dimension: str) -> list[dict[str, Any]]:
    preferences = {"A": 1.0, "B": 0.0, "same": 0.5}
    verdict = record[dimension]
    if verdict not in preferences:
        raise ValueError(
            f"`{dimension}` of {record['path_A']!r} and {record['path_B']!r} is {verdict!r}, but must be one of "
            f"{sorted(preferences)}. The schema of VideoGen-RewardBench has moved."
        )
    context: dict[str, Any] = {"task": "text-to-video", "criteria": VIDEOGEN_CRITERIA[dimension]}
    return [make_row(record["prompt"], record["path_A"], record["path_B"], preferences[verdict], **context)]


def _read_videodpo(repository: DatasetRepository, split: str, streaming: bool) -> Any:
    name = next((file for file in sorted(repository.files) if PurePosixPath(file).name == "pair.json"), "pair.json")
    records = repository.records(name, ["video1", "video2", "frame_caption"])
    return rows_from_records(records, _videodpo_rows, streaming, VideoFiles(repository, streaming))


def _videodpo_rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    # A video that is given by its number is one half of a pair.
    preferred, other = (
        video if isinstance(video, str) else f"{('winvideos', 'losevideos')[video % 2]}/{video // 2:06d}.mp4"
        for video in (record["video1"], record["video2"])
    )
    return [make_row(record["frame_caption"], preferred, other, 1.0, task="text-to-video")]


SOURCES = (
    Source(
        "rapidata-videos",
        "Rapidata videos",
        "Rapidata/text-2-video-human-preferences",
        "Weighted votes become margins; equal votes are ties. `repo_id` may be one for a generator (`...-pika2.2`, `-veo2`, "
        "`-veo3`, `-wan2.1`, `-seedance-1-pro`), or one of `Rapidata/image-2-video-human-preferences-*`, whose rows have their "
        "first frame as `condition`. `dimension` is what annotators were asked about.",
        _read_rapidata,
        split="train",
        terms=DatasetTerms("apache-2.0", True),
        options={"dimension": ("preference", "coherence", "alignment")},
        is_family=True,
    ),
    Source(
        "videogen-rewardbench",
        "VideoGen-RewardBench",
        "KlingTeam/VideoGen-RewardBench",
        "[Paper](https://huggingface.co/papers/2501.13918). `dimension` says whose verdicts are used, `Overall`, or `VQ`, `MQ` "
        "or `TA`, whose rows have `criteria`. Rows without a verdict are left out; 'same' is a tie. The archive has 13 GB.",
        _read_videogen_rewardbench,
        split="eval",
        splits=("eval",),
        terms=DatasetTerms("apache-2.0", True),
        options={"dimension": tuple(VIDEOGEN_CRITERIA)},
        benchmarks={
            "videogen-rewardbench" + (f"-{dimension.lower()}" if criteria else ""): Benchmark(
                f"VideoGen-RewardBench, {dimension}", "eval", {"dimension": dimension}
            )
            for dimension, criteria in VIDEOGEN_CRITERIA.items()
        },
    ),
    Source(
        "videodpo",
        "VideoDPO",
        "chungimungi/VideoDPO-10k",
        "[Paper](https://huggingface.co/papers/2412.14167). Pairs of `pair.json`, which names the preferred video first.",
        _read_videodpo,
        split="train",
        splits=("train",),
    ),
)
