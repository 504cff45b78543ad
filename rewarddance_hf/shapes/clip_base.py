"""
Teach the base model of shapes, which has seen single images only, to watch clips: first one at a time, then also two of them, of which it
says which show a prompt. It never says which is better.

    make shapes-clip-base    # about half an hour of one core

A clip, or a pair of them, is asked about many times, which gives many verdicts for the cost of one. Each question sees the clips and
itself: if it saw the others, the model would read its answer off theirs, and not off the frames. Pairs come with two more text
layers, as for judges of images.
"""

import argparse
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import AutoModelForImageTextToText

from .base import ChatTrainer
from .clip_oracle import check_clip_facts
from .clip_scenes import MANNERS, ClipScene, clip_paraphrases
from .clips import CATEGORY_SHARES, NUM_FRAMES, ClipPlan, draw_plan, plan_pair
from .drawing import IN_DOMAIN, RADIUS_RANGES
from .ladder import Curriculum, Stage, with_more_layers
from .models import BASE_VLM, PROMPT_TEXTS, SHIPPED_SIZE, build_vlm, judge_processor
from .questions import QuestionCollator
from .scenes import COLORS, SHAPES, TRAINING_COMPOSITIONS, PlacedObject


QUESTIONS_PER_CLIP = 10
BATCH_SIZE = 20
STEPS = 1800
PROMPTS_PER_PAIR = 5
PAIR_BATCH_SIZE = 16
PAIR_STEPS = 1000
ADDED_LAYERS = 2
LEARNING_RATE = 8e-4

# Wording of a judge of clips, which gets the prompt last. Criteria are left out: all rows have the same.
CLIP_LAYOUT = "images_first"
CLIP_TEXTS = {**PROMPT_TEXTS, "prompt": "{prompt}", "criteria": "", "pointwise_question": "Is it this?"}


class ClipQuestions(Dataset):
    """
    Clips with several questions about each, and their answers.

    A row holds `images` (the given first frame if there is one, then the frames), `opening` (`str`, with `"{}"` for each
    image), and `questions` (pairs of question and answer). The last question asks for a description.
    """

    def __init__(self, num_rows: int, seed: int = 0) -> None:
        self.num_rows = num_rows
        self.seed = seed

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = random.Random(f"clip questions/{self.seed}/{index}")
        category, given = _draw_category(rng)
        wanted, right, wrong = plan_pair(category, given, "train", rng)
        plan = rng.choice((right, wrong))
        look = (rng.uniform(*RADIUS_RANGES[None]), _draw_shift(rng), rng.getrandbits(64))
        images = draw_plan(plan, *look, IN_DOMAIN, 32)
        opening = f"Image: {_FRAMES}\n"
        other_beginning = False
        if given:
            images.insert(0, draw_plan(right, *look, IN_DOMAIN, 32)[0])
            opening = "Image: {}\n" + opening
            other_beginning = category == "first frame" and plan is wrong

        questions: list[tuple[str, str]] = []
        for _ in range(2 if other_beginning else QUESTIONS_PER_CLIP):  # all answers are "no" then
            for _ in range(20):  # as many right as wrong prompts, if there are such
                scene = wanted if rng.random() < 0.3 else _ask_about(plan, rng)
                holds = _shows(plan, scene)
                if holds == (len(questions) % 2 == 0):
                    break
            prompt = CLIP_TEXTS["prompt"].format(prompt=f'"{rng.choice(clip_paraphrases(scene))}"')
            question = f"{prompt}\n{CLIP_TEXTS['pointwise_question']}"
            questions.append((question, "yes" if holds and not other_beginning else "no"))
        return {
            "images": images,
            "opening": opening,
            "questions": [*questions, ("Describe it.", f"{_describe_motion(plan)}: {plan.description}.")],
        }


class ClipPairQuestions(Dataset):
    """Pairs of clips with several prompts, and which of the two show each; rows are as those of [`ClipQuestions`]."""

    def __init__(self, num_rows: int, seed: int = 0) -> None:
        self.num_rows = num_rows
        self.seed = seed

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = random.Random(f"clip pair questions/{self.seed}/{index}")
        category, given = _draw_category(rng)
        wanted, right, wrong = plan_pair(category, given, "train", rng)
        plans = [rng.choice((right, wrong)) for _ in range(2)]
        radius = rng.uniform(*RADIUS_RANGES[None])
        looks = [(radius, _draw_shift(rng), rng.getrandbits(64)) for _ in range(2)]
        if given:  # both go on from the same image, each in its own way
            looks[1] = looks[0]
        images = [
            image for plan, look in zip(plans, looks, strict=True) for image in draw_plan(plan, *look, IN_DOMAIN, 32)
        ]
        opening = f"Image 1: {_FRAMES}\nImage 2: {_FRAMES}\n"
        if given:
            images.insert(0, draw_plan(right, *looks[0], IN_DOMAIN, 32)[0])
            opening = "Image: {}\n" + opening
        questions: list[tuple[str, str]] = []
        for number in range(PROMPTS_PER_PAIR):
            scene = wanted if rng.random() < 0.4 else _ask_about(rng.choice(plans), rng)
            prompt = f'"{rng.choice(clip_paraphrases(scene))}"'
            other_beginning = category == "first frame"
            holds = [_shows(plan, scene) and not (other_beginning and plan is wrong) for plan in plans]
            questions += [
                (f"{prompt}\nIs image {place} right?", "yes" if held else "no") for place, held in enumerate(holds, 1)
            ]
            if number == 0:
                which = " and ".join(str(place) for place, held in enumerate(holds, 1) if held)
                questions.append((f"{prompt}\nWhich is right?", which or "nothing"))
        told = f"{_describe_motion(plans[1])}: {plans[1].description}."
        return {"images": images, "opening": opening, "questions": [*questions, ("Describe image 2.", told)]}


_FRAMES = "\n".join(["{}"] * NUM_FRAMES)
_HARD_CATEGORIES = ("turn", "order", "swap", "flicker", "first frame")


def _draw_category(rng: random.Random) -> tuple[str, bool]:
    """A category, and whether the first frame is given. What is learned last comes more often than in preference rows."""
    task = rng.choice(list(CATEGORY_SHARES))
    names = [name for name in CATEGORY_SHARES[task] for _ in range(1 + (name in _HARD_CATEGORIES))]
    return rng.choice(names), task == "image-to-video"


def _draw_shift(rng: random.Random) -> tuple[float, float]:
    jitter = 0.05 * IN_DOMAIN.position_jitter
    return rng.uniform(-jitter, jitter), rng.uniform(-jitter, jitter)


def _shows(plan: ClipPlan, scene: ClipScene) -> bool:
    frames = [[PlacedObject(*name, x, y, 0.18)] for (x, y), name in zip(plan.path, plan.names, strict=True)]
    return all(check_clip_facts(scene, frames).values())


def _motions(plan: ClipPlan) -> dict[str, tuple[str, ...]]:
    """Kinds of scenes that the motion of a plan fits, each with its manner."""
    frames = [[PlacedObject("red", "circle", x, y, 0.18)] for x, y in plan.path]
    kinds = [kind for kind in MANNERS if kind != "order"]
    fitting = {
        kind: tuple(
            manner
            for manner in MANNERS[kind]
            if all(check_clip_facts(ClipScene(kind, (("red", "circle"),), manner), frames).values())
        )
        for kind in kinds
    }
    return {kind: manners for kind, manners in fitting.items() if manners}


def _describe_motion(plan: ClipPlan) -> str:
    motions = _motions(plan)
    if "stay" in motions:
        return "stays"
    if "move" in motions:
        return clip_paraphrases(ClipScene("move", (("red", "circle"),), motions["move"][0]))[0].removeprefix(
            "a red circle "
        )
    return f"turns {motions['turn'][0]} {motions['pace'][0]}"


def _ask_about(plan: ClipPlan, rng: random.Random) -> ClipScene:
    """A scene that a plan shows, or from which it differs in one thing."""
    name, *others = dict.fromkeys(plan.names)
    if rng.random() < (0.35 if others else 0.08):
        pair = (name, others[0] if others else rng.choice(TRAINING_COMPOSITIONS))
        return ClipScene("order", pair if rng.random() < 0.5 else pair[::-1])
    motions = _motions(plan)
    kind = "stay" if "stay" in motions else "move" if "move" in motions else rng.choice(("turn", "turn", "pace"))
    manner = rng.choice(motions[kind])
    if others:  # as in rows about swaps and flicker, the prompt leaves open what changes
        color, shape = (name[0], None) if others[0][0] == name[0] else (None, name[1])
    else:
        color, shape = rng.choice((name, (None, name[1]), (name[0], None)))
    edit = rng.choice(("none", "none", "manner", "manner", "object"))
    if edit == "manner":
        if rng.random() < 0.35:
            kind = rng.choice([kind for kind in MANNERS if kind != "order"])
        manner = rng.choice(MANNERS[kind])
    elif edit == "object" and color is not None and (shape is None or rng.random() < 0.5):
        color = rng.choice(list(COLORS))
    elif edit == "object":
        shape = rng.choice(SHAPES)
    return ClipScene(kind, ((color, shape),), manner)


def train_clip_base(output_dir: Path, seed: int = 0, steps: int = STEPS, pair_steps: int = PAIR_STEPS) -> None:
    """Train the base model to answer questions about clips and pairs of them, and save it as a plain checkpoint."""
    torch.set_num_threads(1)
    model = AutoModelForImageTextToText.from_pretrained(BASE_VLM)
    _train(model, ClipQuestions(steps * BATCH_SIZE, seed), steps, BATCH_SIZE, seed)
    model = teach_pairs(model, seed, pair_steps)
    model.save_pretrained(output_dir)
    judge_processor().vlm_processor.save_pretrained(output_dir)


def teach_pairs(model: Any, seed: int = 0, steps: int = PAIR_STEPS) -> Any:
    """A deeper model with the weights of one that has seen clips, taught by pairs of clips and single ones in turn."""
    size = replace(SHIPPED_SIZE, text_layers=SHIPPED_SIZE.text_layers + ADDED_LAYERS)
    model = with_more_layers(model, build_vlm(judge_processor().tokenizer, seed, size))
    stages = (Stage(steps, (ClipPairQuestions, ClipQuestions)),)
    rows = Curriculum(stages, seed + 1, PAIR_BATCH_SIZE)
    _train(model, rows, steps, PAIR_BATCH_SIZE, seed + 1, train_sampling_strategy="sequential")
    return model


def _train(model: Any, rows: Dataset, steps: int, batch_size: int, seed: int, **settings: Any) -> None:
    processor = judge_processor()
    trainer = ChatTrainer(
        model,
        processor.tokenizer,
        QuestionCollator(processor.vlm_processor),
        rows,
        steps,
        per_device_train_batch_size=batch_size,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        logging_steps=50,
        seed=seed,
        **settings,
    )
    trainer.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/shapes_clip_base"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS, help="updates on single clips")
    parser.add_argument("--pair_steps", type=int, default=PAIR_STEPS, help="updates on pairs of clips and single ones")
    train_clip_base(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
