"""Text-to-image preference datasets."""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import datasets

from .media import MediaFiles
from .repository import DatasetRepository
from .rows import (
    DIMENSION_CRITERIA,
    check_schema,
    make_row,
    ranked_pairs,
    rows_from_records,
    rows_from_table,
    share_of_votes,
    vote_margin,
)
from .source import Benchmark, DatasetTerms, Source


def _read_pickapic(repository: DatasetRepository, split: str, streaming: bool) -> Any:
    columns = ["caption", "jpg_0", "jpg_1", "label_0", "label_1", "has_label"]
    return rows_from_table(repository.table(None, split, columns, streaming), _pickapic_rows)


def _pickapic_rows(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    if not row["has_label"]:
        return []
    first, second = ({"bytes": row[column], "path": None} for column in ("jpg_0", "jpg_1"))
    share = share_of_votes(row["label_0"], row["label_1"], repr(row["caption"]))
    return [make_row(row["caption"], first, second, share)]


def _read_hpdv2(repository: DatasetRepository, split: str, streaming: bool) -> Any:
    columns = {"train": ["prompt", "file_path", "human_preference"], "test": ["prompt", "image_path", "rank"]}
    records = repository.records(f"{split}.json", columns[split])
    media = MediaFiles(repository, streaming, (split, ""), archives=split)
    return rows_from_records(records, partial(_hpdv2_rows, media=media), streaming)


def _hpdv2_rows(record: Mapping[str, Any], media: MediaFiles) -> Iterator[dict[str, Any]]:
    is_ranking = "rank" in record
    paths = record["image_path" if is_ranking else "file_path"]
    ranks = record["rank"] if is_ranking else [-preferred for preferred in record["human_preference"]]
    votes = [annotation["rank"] for annotation in record.get("raw_annotations") or ()]
    if any(len(ranking) != len(paths) for ranking in (ranks, *votes)):
        raise ValueError(
            f"{record['prompt']!r} of HPDv2 has {len(paths)} images, and rankings of {[len(r) for r in (ranks, *votes)]}, but "
            "each must rank all images. Drop it from the JSON file."
        )
    for i, j in itertools.combinations(range(len(paths)), 2):
        if ranks[i] == ranks[j] and not is_ranking and len(paths) > 2:
            continue  # nobody has compared two images that are both not the preferred one
        better, worse = (i, j) if ranks[i] <= ranks[j] else (j, i)
        agreeing = sum((vote[better] < vote[worse]) + 0.5 * (vote[better] == vote[worse]) for vote in votes)
        yield make_row(
            record["prompt"],
            media(paths[better]),
            media(paths[worse]),
            0.5 if ranks[i] == ranks[j] else 1.0,
            margin=vote_margin(agreeing / len(votes)) if votes else None,
        )


def _read_hpdv3(repository: DatasetRepository, split: str, streaming: bool, min_confidence: float | None) -> Any:
    records = repository.records(f"{split}.json", ["prompt", "path1", "path2", "confidence"])
    if min_confidence is not None:
        records = [record for record in records if (record["confidence"] or 0) >= min_confidence]
    media = MediaFiles(repository, streaming, archives="images")
    return rows_from_records(records, partial(_hpdv3_rows, media=media), streaming)


def _hpdv3_rows(record: Mapping[str, Any], media: MediaFiles, criteria: str | None = None) -> Iterator[dict[str, Any]]:
    confidence = record.get("confidence")
    margin = None if confidence is None else vote_margin(confidence)
    images = media(record["path1"]), media(record["path2"])
    yield make_row(record["prompt"], *images, 1.0, margin=margin, criteria=criteria)


def _read_hpdv3_plus_plus(repository: DatasetRepository, split: str, streaming: bool) -> Any:
    criteria = DIMENSION_CRITERIA["aesthetics" if split.endswith("_aes") else "alignment"]
    records = repository.records(f"{split}.json", ["prompt", "path1", "path2"])
    media = MediaFiles(repository, streaming, archives="images")
    return rows_from_records(records, partial(_hpdv3_rows, media=media, criteria=criteria), streaming)


def _read_imagereward_db(repository: DatasetRepository, split: str, streaming: bool) -> Any:
    columns = ["image_path", "prompt_id", "prompt", "classification", "rank"]
    name = f"metadata-{split}.parquet"
    table = datasets.Dataset.from_parquet(repository.path(name))
    check_schema(table.column_names, columns, f"{name} of {repository.repo_id!r}")
    prompts: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in table.select_columns(columns):
        prompts[row["prompt_id"]].append(row)
    media = MediaFiles(repository, streaming, archives=f"images/{split}")
    return rows_from_records(list(prompts.values()), partial(_imagereward_rows, media=media), streaming)


def _imagereward_rows(images: list[Mapping[str, Any]], media: MediaFiles) -> Iterator[dict[str, Any]]:
    for a, b, preference in ranked_pairs(images, [image["rank"] for image in images]):
        pair = media(a["image_path"]), media(b["image_path"])
        yield make_row(a["prompt"], *pair, preference, category=a["classification"])


def _read_binarized(repository: DatasetRepository, split: str, streaming: bool) -> Any:
    table = repository.table(None, split, ["prompt", "chosen", "rejected"], streaming, optional=["category"])
    return rows_from_table(table, _binarized_rows)


def _binarized_rows(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [make_row(row["prompt"], row["chosen"], row["rejected"], 1.0, category=row.get("category"))]


def _read_rapidata(repository: DatasetRepository, split: str, streaming: bool, dimension: str) -> Any:
    forms = [[f"weighted_results_image{i}_{dimension}" for i in (1, 2)]]
    if dimension == "preference":
        forms += [["votes_image1", "votes_image2"], ["weighted_results_image1", "weighted_results_image2"]]
    table = repository.table(None, split, ["prompt", "image1", "image2"], streaming, one_of=forms)
    convert = partial(_rapidata_rows, votes=table.column_names[3:], criteria=DIMENSION_CRITERIA[dimension])
    return rows_from_table(table, convert)


def _rapidata_rows(row: Mapping[str, Any], votes: list[str], criteria: str | None) -> list[dict[str, Any]]:
    share = share_of_votes(row[votes[0]], row[votes[1]], repr(row["prompt"]))
    return [make_row(row["prompt"], row["image1"], row["image2"], share, is_soft=True, criteria=criteria)]


SOURCES = (
    Source(
        "pickapic",
        "Pick-a-Pic v2",
        "yuvalkirstain/pickapic_v2",
        "[Paper](https://huggingface.co/papers/2305.01569). Splits `train` (335 GB), `validation`, `test`, and each with "
        "`_unique` (one pair for each prompt). Rows without a label are left out, labels of 0.5 are ties.",
        _read_pickapic,
        split="train",
        terms=DatasetTerms("mit", True, "third-party audit of the dataset card"),
        benchmarks={"pickapic": Benchmark("Pick-a-Pic v2", "test")},
    ),
    Source(
        "hpdv2",
        "HPDv2",
        "ymhao/HPDv2",
        "[Paper](https://huggingface.co/papers/2306.09341). Rankings of the test split become all pairs, whose margin is that "
        "of the annotators who agree.",
        _read_hpdv2,
        split="test",
        splits=("train", "test"),
        terms=DatasetTerms("apache-2.0", True),
        benchmarks={"hpdv2": Benchmark("HPDv2", "test")},
    ),
    Source(
        "hpdv3",
        "HPDv3",
        "MizzenAI/HPDv3",
        "[Paper](https://huggingface.co/papers/2508.03789). Confidence in the preferred image becomes the margin. With "
        "`min_confidence` rows of less confidence, or of none, are left out: HPSv3 is trained with 0.95.",
        _read_hpdv3,
        split="train",
        terms=DatasetTerms("mit", True),
        options={"min_confidence": ()},
        benchmarks={"hpdv3": Benchmark("HPDv3", "test")},
    ),
    Source(
        "hpdv3pp",
        "HPDv3++",
        "Junjun2333/HPDv3-PlusPlus",
        "Splits are about aesthetics (`_aes`) or text following (`_tf`), which the `criteria` of their rows say.",
        _read_hpdv3_plus_plus,
        split="train_aes",
        splits=("train_aes", "train_tf", "test_aes", "test_tf"),
        terms=DatasetTerms("apache-2.0", True),
        benchmarks={
            "hpdv3pp-aes": Benchmark("HPDv3++, aesthetics", "test_aes"),
            "hpdv3pp-tf": Benchmark("HPDv3++, text following", "test_tf"),
        },
    ),
    Source(
        "imagereward",
        "ImageRewardDB",
        "zai-org/ImageRewardDB",
        "[Paper](https://huggingface.co/papers/2304.05977). The ranking of each prompt's images becomes all pairs, equal ranks "
        "become ties. The class of the prompt is the category.",
        _read_imagereward_db,
        split="test",
        splits=("train", "validation", "test"),
        benchmarks={"imagereward": Benchmark("ImageRewardDB", "test")},
    ),
    Source(
        "open-image-preferences",
        "Open Image Preferences",
        "data-is-better-together/open-image-preferences-v1-binarized",
        "The binarized version, with `category` where the dataset has it.",
        _read_binarized,
        split="train",
        terms=DatasetTerms("apache-2.0", True),
    ),
    Source(
        "rapidata-images",
        "Rapidata images",
        "Rapidata/open-image-preferences-v1-more-results",
        "Votes of many annotators, weighted where the dataset weights them, become margins; equal votes are ties. `repo_id` may "
        "be any dataset with `prompt`, `image1`, `image2`, and either `votes_image1` and `votes_image2`, or "
        "`weighted_results_image1_<dimension>` and `weighted_results_image2_<dimension>`, or the latter without a dimension. "
        "`dimension` is what annotators were asked about.",
        _read_rapidata,
        split="train",
        options={"dimension": ("preference", "coherence", "alignment")},
        is_family=True,
    ),
)
