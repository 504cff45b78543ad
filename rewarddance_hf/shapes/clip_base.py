"""
Teach the base model of shapes, which has seen single images only, to watch clips. It does not learn to compare them.

    python -m rewarddance_hf.shapes.clip_base --output_dir outputs/shapes_clip_base    # about 15 minutes of one core

One clip is asked about many times, which gives many verdicts for the cost of one clip. Each question sees the clip and
itself: if it saw the others, the model would read its answer off theirs, and not off the frames.
"""

import argparse
import random
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
from .models import BASE_VLM, PROMPT_TEXTS, judge_processor
from .questions import QuestionCollator
from .scenes import COLORS, SHAPES, TRAINING_COMPOSITIONS, PlacedObject


QUESTIONS_PER_CLIP = 10
BATCH_SIZE = 20
STEPS = 1800
LEARNING_RATE = 8e-4

# Wording of a judge of clips. Criteria are left out: all rows have the same.
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
        task = rng.choice(list(CATEGORY_SHARES))
        given = task == "image-to-video"
        shares = CATEGORY_SHARES[task]
        # What is learned last comes more often than in preference rows.
        category = rng.choice([name for name in shares for _ in range(1 + (name in _HARD_CATEGORIES))])
        wanted, right, wrong = plan_pair(category, given, "train", rng)
        plan = rng.choice((right, wrong))
        jitter = 0.05 * IN_DOMAIN.position_jitter
        look = (
            rng.uniform(*RADIUS_RANGES[None]),
            (rng.uniform(-jitter, jitter), rng.uniform(-jitter, jitter)),
            rng.getrandbits(64),
        )
        images = draw_plan(plan, *look, IN_DOMAIN, 32)
        opening = "Image: " + "\n".join(["{}"] * NUM_FRAMES) + "\n"
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


_HARD_CATEGORIES = ("turn", "order", "swap", "flicker", "first frame")


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


def train_clip_base(output_dir: Path, seed: int = 0, steps: int = STEPS) -> None:
    """Train the base model to answer questions about clips, and save it as a plain checkpoint."""
    torch.set_num_threads(1)
    processor = judge_processor()
    model = AutoModelForImageTextToText.from_pretrained(BASE_VLM)
    trainer = ChatTrainer(
        model,
        processor.tokenizer,
        QuestionCollator(processor.vlm_processor),
        ClipQuestions(steps * BATCH_SIZE, seed),
        steps,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        logging_steps=50,
        seed=seed,
    )
    trainer.train()
    model.save_pretrained(output_dir)
    processor.vlm_processor.save_pretrained(output_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/shapes_clip_base"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    train_clip_base(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
