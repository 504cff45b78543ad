"""
A ladder of tiny base models, all trained by one recipe: what a judge gains from a larger base can be measured where truth is known.

They answer questions about the facts of images, and say of single images, then also of two of one prompt, whether each is right and what
is wrong with it, as judges of the layout `"text_after_each"` see them. They never see a preference. `make shapes-base SIZE=2m` trains one into
`outputs/shapes_base_2m`; the same seed gives the same weights on the same machine. `0.12m` and `0.7m` ship.
"""

import argparse
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import AutoModelForImageTextToText

from .base import BATCH_SIZE, ChatTrainer
from .edit_instructions import instruction_words
from .lessons import ShapesLessons, ShapesMatching, ShapesPairMatching, lesson_words
from .matrix_optimizer import MatrixOptimizer
from .models import VlmSize, build_tokenizer, build_vlm, build_vlm_processor
from .questions import QuestionCollator


# By parameters. Attention heads have a width of 32, which serving engines take.
SIZES = {
    "0.12m": VlmSize(32, 5, 1, 32, 2, 1),
    "0.32m": VlmSize(64, 5, 2, 32, 2, 1),
    "0.7m": VlmSize(96, 5, 3, 64, 2, 2),
    "1.1m": VlmSize(128, 5, 4, 64, 2, 2),
    "2m": VlmSize(160, 6, 5, 96, 3, 3),
    "5m": VlmSize(256, 6, 8, 128, 4, 4),
    "10m": VlmSize(320, 8, 10, 192, 4, 6),
}
WEIGHT_DECAY = 0.02
# Who has which color, what is where and which is larger: learned late.
HARD_KIND_SHARES = {"binding": 0.34, "relation": 0.33, "size": 0.33}
FAULTS_KIND_SHARES = {"single": 0.15, "count": 0.15, "binding": 0.2, "relation": 0.3, "size": 0.2}
EXPLAINED_KIND_SHARES = {"binding": 0.1, "relation": 0.6, "size": 0.3}


@dataclass(frozen=True)
class Stage:
    """
    Part of a training: `steps` updates, each on a batch of one of `rows` in turn. Each of these makes a dataset from a number of
    rows and a seed.
    """

    steps: int
    rows: tuple[Callable[[int, int], Dataset], ...]


def lessons(num_rows: int, seed: int) -> Dataset:
    """Questions about facts."""
    return ShapesLessons(num_rows, seed=seed)


def matching(num_rows: int, seed: int) -> Dataset:
    """Prompts for single images."""
    return ShapesMatching(num_rows, seed=seed)


def hard_matching(num_rows: int, seed: int) -> Dataset:
    """The same, only of what is learned late."""
    return ShapesMatching(num_rows, seed=seed, kind_shares=HARD_KIND_SHARES)


def pair_matching(num_rows: int, seed: int) -> Dataset:
    """Prompts for two images each."""
    return ShapesPairMatching(num_rows, seed=seed)


def hard_pair_matching(num_rows: int, seed: int) -> Dataset:
    """The same, only of what is learned late."""
    return ShapesPairMatching(num_rows, seed=seed, kind_shares=HARD_KIND_SHARES)


def explained_matching(num_rows: int, seed: int) -> Dataset:
    """Prompts for single images, of what is learned late, with what these show."""
    return ShapesMatching(num_rows, seed=seed, kind_shares=EXPLAINED_KIND_SHARES, explained=True)


def explained_pair_matching(num_rows: int, seed: int) -> Dataset:
    """The same for two images each."""
    return ShapesPairMatching(num_rows, seed=seed, kind_shares=EXPLAINED_KIND_SHARES, explained=True)


def pair_faults(num_rows: int, seed: int) -> Dataset:
    """What is wrong with two images of a prompt."""
    return ShapesPairMatching(num_rows, seed=seed, kind_shares=FAULTS_KIND_SHARES, faults=True)


def hard_pair_faults(num_rows: int, seed: int) -> Dataset:
    """The same, only of what is learned late, with what the images show."""
    return ShapesPairMatching(num_rows, seed=seed, kind_shares=EXPLAINED_KIND_SHARES, faults=True, explained=True)


@dataclass(frozen=True)
class Phase:
    """
    A training with a learning rate of its own, which goes on from the weights of the one before, with `added_layers` more text layers
    ([`with_more_layers`]).
    """

    learning_rate: float
    stages: tuple[Stage, ...]
    added_layers: int = 0


FAULTS = (lessons, explained_matching, pair_faults, hard_pair_faults)
PHASES = (
    Phase(
        1e-3,
        (
            Stage(400, (lessons,)),
            Stage(1000, (lessons, matching)),
            Stage(2200, (lessons, matching, hard_matching)),
        ),
    ),
    Phase(7e-4, (Stage(600, (lessons, hard_matching, pair_matching, hard_pair_matching)),)),
    # Where one object is from another is known by now, but not used to say whether a prompt holds.
    Phase(7e-4, (Stage(600, (lessons, explained_matching, pair_matching, explained_pair_matching)),)),
    # Nor is it known how much is wrong with an image.
    Phase(7e-4, (Stage(600, FAULTS),)),
    # To compare two images takes more layers than to see what is wrong with each: they come when that is known.
    Phase(7e-4, (Stage(600, FAULTS),), added_layers=2),
)
# Phases see other rows.
SEED_STEP = 7


class Curriculum(Dataset):
    """Rows of stages, one batch after the other; they are to be read in order."""

    def __init__(self, stages: Sequence[Stage], seed: int, batch_size: int = BATCH_SIZE) -> None:
        self.batches: list[tuple[Dataset, int]] = []
        self.batch_size = batch_size
        for number, stage in enumerate(stages):
            each = -(-stage.steps // len(stage.rows))
            parts = [rows(each * batch_size, 100 * seed + 10 * number + k) for k, rows in enumerate(stage.rows)]
            self.batches += [(parts[step % len(parts)], step // len(parts)) for step in range(stage.steps)]

    def __len__(self) -> int:
        return len(self.batches) * self.batch_size

    def __getitem__(self, index: int) -> dict[str, Any]:
        part, batch = self.batches[index // self.batch_size]
        return part[batch * self.batch_size + index % self.batch_size]


def with_more_layers(model: Any, deeper: Any) -> Any:
    """
    `deeper`, a new model that has more text layers and is else alike, with the weights of `model`. The new layers come before the last one,
    and write nothing until they are trained: both give the same answers.
    """
    last, new_last = (len(vlm.model.language_model.layers) - 1 for vlm in (model, deeper))
    weights = {
        name.replace(f"language_model.layers.{last}.", f"language_model.layers.{new_last}."): weight
        for name, weight in model.state_dict().items()
    }
    deeper.load_state_dict(weights, strict=False)
    for layer in deeper.model.language_model.layers[last:new_last]:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            torch.nn.init.zeros_(projection.weight)
    return deeper


def train_rung(output_dir: str | Path, size: str = "0.7m", seed: int = 0, phases: Sequence[Phase] = PHASES) -> None:
    """
    Train a base model of one of the `SIZES` from scratch and save it as a plain checkpoint.

    What each phase has learned is kept in `output_dir` until the last has ended: a call after a stop goes on with the phase that was
    stopped, and gives the weights of a run that was not.
    """
    torch.set_num_threads(1)
    folder = Path(output_dir)
    tokenizer = build_tokenizer([*lesson_words(), *instruction_words()])
    num_layers = SIZES[size].text_layers - sum(phase.added_layers for phase in phases)
    model: Any = build_vlm(tokenizer, seed, replace(SIZES[size], text_layers=num_layers))
    processor = build_vlm_processor(tokenizer)
    finished = [folder / f"{size}_seed_{seed}_phase_{number}" for number in range(len(phases))]
    for number, phase in enumerate(phases):
        num_layers += phase.added_layers
        if finished[number].is_dir():
            continue
        own_seed = seed + SEED_STEP * number
        if number > 0:
            model = AutoModelForImageTextToText.from_pretrained(finished[number - 1], dtype=torch.float32)
        if phase.added_layers:
            deeper = build_vlm(tokenizer, own_seed, replace(SIZES[size], text_layers=num_layers))
            model = with_more_layers(model, deeper)
        steps = sum(stage.steps for stage in phase.stages)
        trainer = ChatTrainer(
            model,
            tokenizer,
            QuestionCollator(processor),
            Curriculum(phase.stages, own_seed),
            steps,
            optimizer=(lambda: MatrixOptimizer, {"lr": phase.learning_rate, "weight_decay": WEIGHT_DECAY}),
            train_sampling_strategy="sequential",
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=phase.learning_rate,
            lr_scheduler_type="warmup_stable_decay",
            lr_scheduler_kwargs={"num_decay_steps": steps // 2, "min_lr_ratio": 0.03},
            logging_steps=100,
            dataloader_num_workers=1,
            seed=own_seed,
        )
        trainer.train()
        unfinished = folder / f"{finished[number].name}.unfinished"
        model.save_pretrained(unfinished)
        unfinished.rename(finished[number])
    model = AutoModelForImageTextToText.from_pretrained(finished[-1], dtype=torch.float32)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    for path in finished:
        shutil.rmtree(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="0.7m")
    parser.add_argument("--output_dir", type=Path, help="outputs/shapes_base_SIZE by default")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    train_rung(options.output_dir or f"outputs/shapes_base_{options.size}", options.size, options.seed)


if __name__ == "__main__":
    main()
