"""Images of preference rows at the size at which a judge sees them: read and resized once, not in each epoch."""

import contextlib
import copy
import hashlib
import io
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from PIL import Image

from ..models import RewardDanceProcessor
from ..models.pixels_rewarddance import watch_resizing
from ..models.question_rewarddance import Question
from ..resumable import digest_of
from .preference import check_columns, check_row, row_question
from .rows import keep_images_encoded


# What the media of a row are in a question
MEDIA_COLUMNS = {"chosen": "sample", "rejected": "reference", "condition": "condition"}
CACHE_FOLDER = "rewarddance_resized"  # in that of `datasets`
FORMAT = 1  # of what is kept: a higher one makes all of it anew


def resize_images(
    dataset: datasets.Dataset,
    processor: RewardDanceProcessor,
    num_proc: int | None = None,
    name: str = "dataset",
) -> datasets.Dataset:
    r"""
    Bring the images of preference rows to the size at which a judge sees them, so that training reads small files in each epoch.
    The result is kept in the cache of `datasets`, without loss, and found again as long as rows, files and processor are the same.

    The judge sees the same pixels: for each size of images, noise is prepared before and after, and rows stay as they are if anything
    differs. So do rows with clips.

    Args:
        dataset (`datasets.Dataset`):
            Preference rows, see [`~rewarddance_hf.data.preference.check_row`].
        processor ([`RewardDanceProcessor`]):
            Processor of the judge.
        num_proc (`int`, *optional*):
            Number of processes.
        name (`str`, *optional*, defaults to `"dataset"`):
            Name of the dataset in error messages.

    Returns:
        `datasets.Dataset`: The same rows. Their images are undecoded PNG files.

    Raises:
        `TypeError`: If `dataset` is not a `datasets.Dataset`.
        `ValueError`: If a column is missing, an image cannot be read, or images of the first row cannot be brought to one size, as
            those that are cut into tiles.

    Example:

    ```python
    from rewarddance_hf import RewardDanceProcessor, resize_images

    processor = RewardDanceProcessor.from_pretrained("OpenGVLab/InternVL3_5-2B-HF")
    pairs = resize_images(pairs, processor, num_proc=16)
    ```
    """
    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(
            f"`{name}` is a `{type(dataset).__name__}`, but images can be resized once in a `datasets.Dataset` only, which keeps them. "
            "Load it without streaming, or leave its images as they are."
        )
    check_columns(dataset.column_names, name)
    if len(dataset) == 0:
        return dataset
    dataset = keep_images_encoded(dataset)
    for column in MEDIA_COLUMNS:
        if isinstance(dataset.features.get(column), datasets.Value):  # paths or bytes
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
    resizer = _Resizer(processor, name)
    if "chosen" not in resizer(dataset[0], 0):
        raise ValueError(
            f"Images of `{name}[0]` cannot be resized beforehand: they are clips, or `{type(processor.image_processor).__name__}` cuts "
            "them into tiles, pads them, or resizes them again. Leave `resize_images` out; or, where the processor has tiles, load it with "
            "`vlm_images_kwargs={'crop_to_patches': False}`."
        )
    # `datasets` would hash the processor as it is pickled, which changes when its tokenizer is used, and paths in place of their files.
    fingerprint = digest_of(FORMAT, dataset._fingerprint, resizer.settings(), _state_of_files(dataset))
    folder = Path(datasets.config.HF_DATASETS_CACHE, CACHE_FOLDER)
    folder.mkdir(parents=True, exist_ok=True)
    return dataset.map(
        resizer,
        with_indices=True,
        num_proc=num_proc,
        # Where nothing else is said, what is made of rows in memory is gone with the process.
        cache_file_name=None if dataset.cache_files else str(folder / f"{fingerprint}.arrow"),
        new_fingerprint=fingerprint,
        desc=f"Resizing images of {name}",
    )


def _state_of_files(dataset: datasets.Dataset) -> str:
    """Digest of names, sizes and times of the files that rows name without holding them."""
    digest = hashlib.blake2b()
    for column in dataset.column_names:
        if column in MEDIA_COLUMNS and isinstance(dataset.features[column], datasets.Image):
            for batch in dataset.select_columns(column).with_format("arrow").iter(1000):
                media = batch[column].combine_chunks()
                for path, is_held in zip(media.field("path"), media.field("bytes").is_valid(), strict=True):
                    if not is_held.as_py() and path.as_py() is not None and os.path.exists(path.as_py()):
                        state = os.stat(path.as_py())
                        digest.update(f"{path} {state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.hexdigest()


class _Resizer:
    """Columns of a row that change when its images are brought to the size at which a judge sees them."""

    def __init__(self, processor: RewardDanceProcessor, name: str) -> None:
        self.processor = processor
        self.name = name
        # How an image is prepared depends on its size, and on those beside it: what has been found for these
        self._keeps_size: dict[tuple[int, int], bool] = {}
        self._agrees: dict[tuple[tuple[int, int], ...], bool] = {}

    def __call__(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        name = f"{self.name}[{index}]"
        check_row(row, name)
        question = self.processor.load(
            row_question(row), names=(f"chosen of {name}", f"rejected of {name}", f"condition of {name}")
        )
        if len(question.sample) > 1 or len(question.reference) > 1:  # clips
            return {}
        images: dict[str, Any] = {"sample": question.sample[0], "reference": question.reference[0]}
        if question.condition is not None:
            images["condition"] = question.condition
        try:
            can_be_resized = self._can_be_resized(question, {part: image.size for part, image in images.items()})
        except ValueError as error:  # as of a line of pixels
            raise ValueError(f"{name}: {error}") from error
        if not can_be_resized:
            return {}
        resized = {part: self._resize(image)[0] for part, image in images.items()}
        return {
            column: {"bytes": _png(resized[part]), "path": None}
            for column, part in MEDIA_COLUMNS.items()
            if part in resized
        }

    def settings(self) -> list[str]:
        """All that the size of images depends on."""
        kind = type(self.processor.image_processor).__name__
        return [transformers.__version__, kind, self.processor.to_json_string()]

    def _can_be_resized(self, question: Question, sizes: Mapping[str, tuple[int, int]]) -> bool:
        """
        Whether images of these sizes are given to a judge as before, alone and in one question, after they are resized. That is found
        out on noise: of images of a single color nothing could be told.
        """
        for size in sizes.values():
            if size not in self._keeps_size:
                self._keeps_size[size] = self._is_resized_once(size)
        key, is_kept = tuple(sizes.values()), all(self._keeps_size[size] for size in sizes.values())
        if is_kept and key not in self._agrees:
            images: dict[str, Any] = {part: _noise(size) for part, size in sizes.items()}
            resized: dict[str, Any] = {part: self._resize(image)[0] for part, image in images.items()}
            self._agrees[key] = self._look_alike(replace(question, **images), replace(question, **resized))
        return is_kept and self._agrees[key]

    def _is_resized_once(self, size: tuple[int, int]) -> bool:
        """Whether images of a size are resized once, to a size that they keep."""
        image = _noise(size)
        resized = self._resize(image, stop=False)
        return len(resized) == 1 and self._look_alike(Question(image, ""), Question(resized[0], ""))

    def _resize(self, image: Image.Image, stop: bool = True) -> list[Image.Image]:
        """Images that are made by resizing when one is prepared, with `stop` only the first; none if they have not 8 bits."""
        found: list[Any] = []

        def watch(result: Any) -> None:
            found.append(np.asarray(result))
            if stop:
                raise _Resized

        processor = copy.copy(self.processor)
        vars(processor)["vlm_processor"] = watch_resizing(self.processor.vlm_processor, watch)
        with contextlib.suppress(_Resized):
            processor.encode([Question(image, "")])
        return [_to_image(array) for array in found] if all(map(_is_image, found)) else []

    def _look_alike(self, question: Question, other: Question) -> bool:
        """Whether a judge is given the same for both."""
        return _equal(*(self.processor.encode([asked]) for asked in (question, other)))


class _Resized(Exception):
    """An image has been resized, and the rest of its preparation is not wanted."""


def _equal(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    def same(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor):
            return torch.equal(a, b)
        if isinstance(a, (list, tuple)):
            return len(a) == len(b) and all(map(same, a, b))
        return bool(a == b)

    return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)


def _noise(size: tuple[int, int]) -> Image.Image:
    return Image.effect_noise(size, 64).convert("RGB")


def _is_image(array: np.ndarray) -> bool:
    """Whether an array of shape `(..., height, width)` is a single image of 8 bits."""
    return array.dtype == np.uint8 and array.size == 3 * np.prod(array.shape[-2:])


def _to_image(array: np.ndarray) -> Image.Image:
    colors = array.reshape(3, *array.shape[-2:]).transpose(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(colors))


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=1)
    return stream.getvalue()
