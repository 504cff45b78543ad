"""
Preference pairs of the tiny generator's own samples, kept in a folder: sampling is split over processes, survives a kill, and
is done once.
"""

import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset

from ..parallel import Processes, run_split
from ..resumable import RowFolder, describe_weights, write_atomically
from .demo import GENERATED_PROMPTS
from .generated import (
    SAMPLES_PER_PROMPT,
    SAMPLING_BATCH_SIZE,
    ShapesPrompts,
    check_images,
    pair_samples,
    sample_images,
    sampling_seed,
)
from .generator import SAMPLING, load_generator
from .oracle import OracleResult
from .preferences import ShapesPreferences


PAIRS_FILE = "pairs.arrow"
MIXED_SEED = 2

# Samples of one prompt, and what the oracle sees in them.
Samples = tuple[list[Image.Image], list[OracleResult]]


def sample_pairs(
    split: str,
    output_dir: str | os.PathLike,
    num_prompts: int | None = None,
    on_progress: Callable[[int], Any] = lambda count: None,
) -> datasets.Dataset:
    """
    Draw pairs of the generator's own samples, six for each prompt, labelled by the oracle, or read those that are in a folder.

    Every process must come here. Each samples its share of the prompts, and each prompt is on disk when it is done, so that a
    call after a kill goes on. One process makes rows of all samples.

    Args:
        split (`str`):
            `"train"`, whose rows also hold pairs with descriptions as prompts, and ties; or `"id"`.
        output_dir (`str` or `os.PathLike`):
            Folder, which all processes see.
        num_prompts (`int`, *optional*):
            Number of prompts. Defaults to that of the demo.
        on_progress (`Callable`, *optional*):
            Is told of how many more prompts this process has samples.

    Returns:
        `datasets.Dataset`: Rows as those of [`~rewarddance_hf.shapes.generated.generated_preferences`].

    Raises:
        `ValueError`: If the folder holds pairs of other prompts or of another generator.
        `RuntimeError`: If another process failed.
    """
    num_prompts = num_prompts or GENERATED_PROMPTS[split]
    processes, folder = Processes.current(), Path(output_dir)
    pipeline: Any = load_generator()
    fingerprint = {
        "split": split,
        "num_prompts": num_prompts,
        "generator": [describe_weights(pipeline.transformer), describe_weights(pipeline.vae), SAMPLING],
    }
    error: BaseException | None = None
    try:
        store = RowFolder(folder, fingerprint, num_prompts, f"The folder {os.fspath(folder)!r}", ".npy")
    except (OSError, ValueError) as raised:
        error = raised
    processes.raise_together(error)
    # One process looks, so that all do the same.
    if not processes.gather([(folder / PAIRS_FILE).exists()])[0]:
        dataset = ShapesPrompts(num_prompts, split)
        prompts = [row["prompt"] for row in dataset]

        def work(indices: Sequence[int]) -> list[Samples]:
            return _sample(pipeline, prompts, indices, sampling_seed(split), store, on_progress)

        samples = run_split(work, num_prompts)
        if processes.is_main:
            images = [image for of_prompt, _ in samples for image in of_prompt]
            results = [result for _, of_prompt in samples for result in of_prompt]
            training = split == "train"
            try:
                rows = pair_samples(dataset, images, results, with_described=training, with_ties=training)
                _write(folder / PAIRS_FILE, rows)
            except Exception as raised:
                error = raised
        processes.raise_together(error)
        if processes.is_main:
            shutil.rmtree(store.folder)
    try:
        pairs = datasets.Dataset.from_file(str(folder / PAIRS_FILE))
    except OSError as raised:
        error = raised
    processes.raise_together(error)
    return pairs


def mixed_rows(num_rows: int, pairs: datasets.Dataset) -> Dataset:
    """Rendered pairs, others than in the first training, and as many of [`sample_pairs`], which come several times if few."""
    indices = [i % len(pairs) for i in range(num_rows // 2)]
    random.Random(0).shuffle(indices)
    return ConcatDataset([ShapesPreferences(num_rows - len(indices), seed=MIXED_SEED), Subset(pairs, indices)])


def _sample(
    pipeline: Any,
    prompts: Sequence[str],
    indices: Sequence[int],
    seed: int,
    store: RowFolder,
    on_progress: Callable[[int], Any],
) -> list[Samples]:
    """Samples of some prompts; those that are on disk are read."""
    left = [index for index in indices if not store.is_done(index, prompts[index])]
    on_progress(len(indices) - len(left))
    size = max(1, SAMPLING_BATCH_SIZE // SAMPLES_PER_PROMPT)
    for start in range(0, len(left), size):
        part = left[start : start + size]
        places = [index * SAMPLES_PER_PROMPT + i for index in part for i in range(SAMPLES_PER_PROMPT)]
        texts = [prompts[index] for index in part for _ in range(SAMPLES_PER_PROMPT)]
        pixels = np.stack([np.asarray(image) for image in sample_images(pipeline, texts, seed, places=places)])
        for index, of_prompt in zip(part, np.split(pixels, len(part)), strict=True):
            store.write(index, prompts[index], of_prompt.tobytes())
        on_progress(len(part))
    results = []
    side = pipeline.vae.config.sample_size
    for index in indices:
        pixels = np.frombuffer(store.read(index), dtype=np.uint8).reshape(SAMPLES_PER_PROMPT, side, side, 3)
        images = [Image.fromarray(image) for image in pixels]
        results.append((images, check_images(images, [prompts[index]] * len(images))))
    return results


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    made = datasets.Dataset.from_list(rows)
    schema = made.features.arrow_schema

    def write(stream: Any) -> None:
        with pa.ipc.new_stream(stream, schema) as writer:
            writer.write_table(made.data.table.cast(schema))

    write_atomically(file, write)
