"""Text-to-image preference datasets."""

import itertools
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import datasets

from .repository import DatasetRepository, MediaFiles
from .rows import check_schema, make_row, rows_from_records, rows_from_table, share_of_votes, vote_margin


PICKAPIC = "yuvalkirstain/pickapic_v2"
HPDV2 = "ymhao/HPDv2"
HPDV3 = "MizzenAI/HPDv3"
HPDV3_PLUS_PLUS = "Junjun2333/HPDv3-PlusPlus"
IMAGEREWARD_DB = "zai-org/ImageRewardDB"
OPEN_IMAGE_PREFERENCES = "data-is-better-together/open-image-preferences-v1-binarized"
RAPIDATA_IMAGES = "Rapidata/open-image-preferences-v1-more-results"

# Criteria of what annotators were asked, where that is not the overall preference.
DIMENSION_CRITERIA = {
    "preference": None,
    "coherence": "coherence: which has fewer errors, such as wrong anatomy, broken objects and impossible structure",
    "alignment": "alignment: which shows the prompt better: every object, attribute, count and relation",
    "aesthetics": "aesthetics: composition, light, color, detail and finish",
}


def load_pickapic(
    split: str = "train",
    streaming: bool = False,
    revision: str | None = None,
    token: str | None = None,
    repo_id: str | os.PathLike = PICKAPIC,
) -> Any:
    """
    Load Pick-a-Pic v2 ([paper](https://huggingface.co/papers/2305.01569)). Rows without a label are dropped, and labels of
    0.5 are ties.

    Args:
        split (`str`, *optional*, defaults to `"train"`):
            `train`, `validation`, `test`, or one of them with `_unique` (one pair for each prompt).
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to read rows as they are needed. The whole dataset has 335 GB.
        revision (`str`, *optional*):
            Branch, tag or commit.
        token (`str`, *optional*):
            Token for the Hub.
        repo_id (`str` or `os.PathLike`, *optional*, defaults to `"yuvalkirstain/pickapic_v2"`):
            Mirror, or local folder, of the same layout.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: Preference rows.

    Raises:
        `ValueError`: If the dataset, the split or a column is not found.
    """
    repository = DatasetRepository(repo_id, revision, token)
    columns = ["caption", "jpg_0", "jpg_1", "label_0", "label_1", "has_label"]
    table = repository.table(None, split, columns, streaming)
    return repository.describe(rows_from_table(table, _pickapic_rows), PICKAPIC)


def _pickapic_rows(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    if not row["has_label"]:
        return []
    first, second = ({"bytes": row[column], "path": None} for column in ("jpg_0", "jpg_1"))
    share = share_of_votes(row["label_0"], row["label_1"], repr(row["caption"]))
    return [make_row(row["caption"], first, second, share)]


def load_hpdv2(
    split: str = "test",
    streaming: bool = False,
    revision: str | None = None,
    token: str | None = None,
    repo_id: str | os.PathLike = HPDV2,
) -> Any:
    """
    Load HPDv2 ([paper](https://huggingface.co/papers/2306.09341)) from its JSON and image files: its loader script does not
    run any more. Rankings of the test split become all pairs; their margin is that of the annotators who agree.

    Args:
        split (`str`, *optional*, defaults to `"test"`):
            `train` or `test`.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to convert rows as they are needed. Image archives are downloaded whole before the first row.
        revision (`str`, *optional*):
            Branch, tag or commit.
        token (`str`, *optional*):
            Token for the Hub.
        repo_id (`str` or `os.PathLike`, *optional*, defaults to `"ymhao/HPDv2"`):
            Mirror, or local folder, of the same layout.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: Preference rows.

    Raises:
        `ValueError`: If the dataset, a file or a column is not found.
    """
    columns = {"train": ["prompt", "file_path", "human_preference"], "test": ["prompt", "image_path", "rank"]}
    if split not in columns:
        raise ValueError(f"`split` is {split!r}, but HPDv2 has {sorted(columns)}. Choose one of them.")
    repository = DatasetRepository(repo_id, revision, token)
    records = read_json(repository, f"{split}.json", columns[split])
    media = MediaFiles(repository, streaming, (split, ""), archives=split)
    return repository.describe(rows_from_records(records, partial(_hpdv2_rows, media=media), streaming), HPDV2)


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


def load_hpdv3(
    split: str = "train",
    streaming: bool = False,
    revision: str | None = None,
    token: str | None = None,
    repo_id: str | os.PathLike = HPDV3,
    min_confidence: float | None = None,
) -> Any:
    """
    Load HPDv3 ([paper](https://huggingface.co/papers/2508.03789)). Its confidence in the preferred image becomes the
    margin. `path1` always is the preferred one, as `chosen` is here: whoever shows the images to a judge has to draw
    their order ([`DataCollatorForRewardDance`] does).

    Args:
        split (`str`, *optional*, defaults to `"train"`):
            `train` or `test`: name of the JSON file.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to convert rows as they are needed. Image archives are downloaded whole before the first row.
        revision (`str`, *optional*):
            Branch, tag or commit.
        token (`str`, *optional*):
            Token for the Hub.
        repo_id (`str` or `os.PathLike`, *optional*, defaults to `"MizzenAI/HPDv3"`):
            Mirror, or local folder, of the same layout.
        min_confidence (`float`, *optional*):
            Confidence from which on a row is kept; rows without any are dropped then. HPSv3 is trained with 0.95.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: Preference rows.

    Raises:
        `ValueError`: If the dataset, a file or a column is not found.
    """
    repository = DatasetRepository(repo_id, revision, token)
    columns = ["prompt", "path1", "path2", "confidence"]
    records = read_json(repository, f"{split}.json", columns)
    if min_confidence is not None:
        records = [record for record in records if (record["confidence"] or 0) >= min_confidence]
    media = MediaFiles(repository, streaming, archives="images")
    return repository.describe(rows_from_records(records, partial(_hpdv3_rows, media=media), streaming), HPDV3)


def _hpdv3_rows(record: Mapping[str, Any], media: MediaFiles, criteria: str | None = None) -> Iterator[dict[str, Any]]:
    confidence = record.get("confidence")
    margin = None if confidence is None else vote_margin(confidence)
    images = media(record["path1"]), media(record["path2"])
    yield make_row(record["prompt"], *images, 1.0, margin=margin, criteria=criteria)


def load_hpdv3_plus_plus(
    split: str = "train_aes",
    streaming: bool = False,
    revision: str | None = None,
    token: str | None = None,
    repo_id: str | os.PathLike = HPDV3_PLUS_PLUS,
) -> Any:
    """
    Load HPDv3++. As in HPDv3 the preferred image is stored first. Rows say in `criteria` which of its two dimensions, text
    following or aesthetics, they are about.

    Args:
        split (`str`, *optional*, defaults to `"train_aes"`):
            `train_aes`, `train_tf`, `test_aes` or `test_tf`.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to convert rows as they are needed. Image archives are downloaded whole before the first row.
        revision (`str`, *optional*):
            Branch, tag or commit.
        token (`str`, *optional*):
            Token for the Hub.
        repo_id (`str` or `os.PathLike`, *optional*, defaults to `"Junjun2333/HPDv3-PlusPlus"`):
            Mirror, or local folder, of the same layout.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: Preference rows.

    Raises:
        `ValueError`: If the dataset, a file or a column is not found.
    """
    dimensions = {"aes": "aesthetics", "tf": "alignment"}
    dimension = split.rpartition("_")[2]
    if dimension not in dimensions:
        raise ValueError(f"`split` is {split!r}, but must be train or test with _aes or _tf, e.g. 'test_tf'.")
    repository = DatasetRepository(repo_id, revision, token)
    records = read_json(repository, f"{split}.json", ["prompt", "path1", "path2"])
    media = MediaFiles(repository, streaming, archives="images")
    convert = partial(_hpdv3_rows, media=media, criteria=DIMENSION_CRITERIA[dimensions[dimension]])
    return repository.describe(rows_from_records(records, convert, streaming), HPDV3_PLUS_PLUS)


def load_imagereward_db(
    split: str = "test",
    streaming: bool = False,
    revision: str | None = None,
    token: str | None = None,
    repo_id: str | os.PathLike = IMAGEREWARD_DB,
) -> Any:
    """
    Load ImageRewardDB ([paper](https://huggingface.co/papers/2304.05977)) from its metadata and image archives: its loader
    script does not run any more. The ranking of each prompt's images becomes all pairs, and equal ranks become ties.

    Args:
        split (`str`, *optional*, defaults to `"test"`):
            `train`, `validation` or `test`.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to read rows as they are needed. Images are then read one by one out of the remote archives.
        revision (`str`, *optional*):
            Branch, tag or commit.
        token (`str`, *optional*):
            Token for the Hub.
        repo_id (`str` or `os.PathLike`, *optional*, defaults to `"zai-org/ImageRewardDB"`):
            Mirror, or local folder, of the same layout.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: Preference rows, with the class of the prompt as category.

    Raises:
        `ValueError`: If the dataset, a file or a column is not found.
    """
    repository = DatasetRepository(repo_id, revision, token)
    columns = ["image_path", "prompt_id", "prompt", "classification", "rank"]
    name = f"metadata-{split}.parquet"
    table = datasets.Dataset.from_parquet(repository.path(name))
    check_schema(table.column_names, columns, f"{name} of {repository.repo_id!r}")
    prompts: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in table.select_columns(columns):
        prompts[row["prompt_id"]].append(row)
    media = MediaFiles(repository, streaming, archives=f"images/{split}")
    convert = partial(_imagereward_rows, media=media)
    return repository.describe(rows_from_records(list(prompts.values()), convert, streaming), IMAGEREWARD_DB)


def _imagereward_rows(images: list[Mapping[str, Any]], media: MediaFiles) -> Iterator[dict[str, Any]]:
    for a, b in itertools.combinations(images, 2):
        preference = 0.5 if a["rank"] == b["rank"] else float(a["rank"] < b["rank"])
        pair = media(a["image_path"]), media(b["image_path"])
        yield make_row(a["prompt"], *pair, preference, category=a["classification"])


def load_open_image_preferences(
    split: str = "train",
    streaming: bool = False,
    revision: str | None = None,
    token: str | None = None,
    repo_id: str | os.PathLike = OPEN_IMAGE_PREFERENCES,
) -> Any:
    """
    Load the binarized Open Image Preferences.

    Args:
        split (`str`, *optional*, defaults to `"train"`):
            Split, of which there is one.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to read rows as they are needed.
        revision (`str`, *optional*):
            Branch, tag or commit.
        token (`str`, *optional*):
            Token for the Hub.
        repo_id (`str` or `os.PathLike`, *optional*, defaults to `"data-is-better-together/open-image-preferences-v1-binarized"`):
            Mirror, or local folder, of the same layout.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: Preference rows, with `category` where the dataset has it.

    Raises:
        `ValueError`: If the dataset, the split or a column is not found.
    """
    repository = DatasetRepository(repo_id, revision, token)
    table = repository.table(None, split, ["prompt", "chosen", "rejected"], streaming, optional=["category"])
    return repository.describe(rows_from_table(table, _binarized_rows), OPEN_IMAGE_PREFERENCES)


def _binarized_rows(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [make_row(row["prompt"], row["chosen"], row["rejected"], 1.0, category=row.get("category"))]


def load_rapidata_images(
    split: str = "train",
    streaming: bool = False,
    revision: str | None = None,
    token: str | None = None,
    repo_id: str | os.PathLike = RAPIDATA_IMAGES,
    dimension: str = "preference",
) -> Any:
    """
    Load an image comparison of Rapidata. Votes of many annotators, weighted where the dataset weights them, become
    margins; equal votes are ties.

    Args:
        split (`str`, *optional*, defaults to `"train"`):
            Split; `Rapidata/700k_Human_Preference_Dataset_FLUX_SD3_MJ_DALLE3` has `train_0001`, `train_0002`, ...
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to read rows as they are needed.
        revision (`str`, *optional*):
            Branch, tag or commit.
        token (`str`, *optional*):
            Token for the Hub.
        repo_id (`str` or `os.PathLike`, *optional*, defaults to `"Rapidata/open-image-preferences-v1-more-results"`):
            Dataset with the columns `prompt`, `image1`, `image2`, and either `votes_image1` and `votes_image2`, or
            `weighted_results_image1_<dimension>` and `weighted_results_image2_<dimension>`, or the latter without a
            dimension.
        dimension (`str`, *optional*, defaults to `"preference"`):
            `"preference"`, `"coherence"` or `"alignment"`, what annotators were asked about.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: Preference rows, with `criteria` for other dimensions.

    Raises:
        `ValueError`: If the dataset, the split or a column is not found.
    """
    if dimension not in ("preference", "coherence", "alignment"):
        raise ValueError(f"`dimension` is {dimension!r}, but must be 'preference', 'coherence' or 'alignment'.")
    repository = DatasetRepository(repo_id, revision, token)
    forms = [[f"weighted_results_image{i}_{dimension}" for i in (1, 2)]]
    if dimension == "preference":
        forms += [["votes_image1", "votes_image2"], ["weighted_results_image1", "weighted_results_image2"]]
    table = repository.table(None, split, ["prompt", "image1", "image2"], streaming, one_of=forms)
    convert = partial(_rapidata_rows, votes=table.column_names[3:], criteria=DIMENSION_CRITERIA[dimension])
    return repository.describe(rows_from_table(table, convert), None)


def _rapidata_rows(row: Mapping[str, Any], votes: list[str], criteria: str | None) -> list[dict[str, Any]]:
    share = share_of_votes(row[votes[0]], row[votes[1]], repr(row["prompt"]))
    return [make_row(row["prompt"], row["image1"], row["image2"], share, is_soft=True, criteria=criteria)]


def read_json(repository: DatasetRepository, name: str, columns: list[str]) -> list[dict[str, Any]]:
    """Records of a JSON file with one list, or with one record a line."""
    with open(repository.path(name), encoding="utf-8") as file:
        text = file.read()
    try:
        records = json.loads(text)
    except json.JSONDecodeError:
        try:
            records = [json.loads(line) for line in text.splitlines() if line.strip()]
        except json.JSONDecodeError as error:
            raise ValueError(f"{name} of {repository.repo_id!r} is no JSON ({error}). Download it again.") from error
    records = [records] if isinstance(records, dict) else records  # a file of one line
    for record in records:
        if not set(columns) <= set(record):
            check_schema(record, columns, f"{name} of {repository.repo_id!r}")
    return records
