"""Judges of every family, and the same questions written by hand for the plain model and its own processor."""

import json

import pytest
import torch
from tiny_vlms import FAMILIES, random_image
from transformers import AutoTokenizer

from rewarddance_hf.models import RewardDanceForYesScoring, RewardDanceProcessor


SYSTEM = "You judge the output of image and video generators."
CRITERIA = (
    "how well it shows every object, attribute, count and relation of the prompt, then visual quality: structure, detail "
    "and aesthetics"
)


@pytest.fixture(scope="session")
def judge(vlm_folder):
    """Function that gives a family's model and processor, made from its plain checkpoint. Read only."""
    judges = {}

    def load(family: str):
        if family not in judges:
            folder = vlm_folder(family)
            judges[family] = (
                RewardDanceForYesScoring.from_pretrained(folder),
                RewardDanceProcessor.from_pretrained(folder),
            )
        return judges[family]

    return load


@pytest.fixture(scope="session")
def stock_inputs(vlm_folder):
    """Function that writes one question out and gives it to the plain model's own tokenizer and processor."""

    def inputs(family: str, sample, prompt: str, reference=None) -> dict[str, torch.Tensor]:
        statement = f"\nGeneration prompt: {json.dumps(prompt)}\nCriteria: {CRITERIA}\n"
        if reference is None:
            images = [sample]
            content = [{"type": "text", "text": "Image: "}, {"type": "image"}]
            question = "Is this a high-quality result by these criteria? Answer yes or no."
        else:
            images = [reference, sample]
            content = [
                *({"type": "text", "text": "Image 1: "}, {"type": "image"}),
                *({"type": "text", "text": "\nImage 2: "}, {"type": "image"}),
            ]
            question = "Is image 2 better than image 1 by these criteria? Answer yes or no."
        messages = [
            {"role": "system", "content": [{"type": "text", "text": SYSTEM}]},
            {"role": "user", "content": [*content, {"type": "text", "text": statement + question}]},
        ]
        tokenizer = AutoTokenizer.from_pretrained(vlm_folder(family))
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        _, processor = FAMILIES[family]()
        return dict(processor(text=[text], images=[images], return_tensors="pt"))

    return inputs


@pytest.fixture(scope="session")
def rows():
    """Four comparisons, as arguments of the processor, that differ in prompt length and image size."""
    return {
        "images": [random_image(1), random_image(2, 64, 30), random_image(3, 28, 90), random_image(4, 57, 57)],
        "prompts": [
            "a red circle",
            "two green triangles left of a blue square, with a very long shadow and a yellow sun above them all",
            "",
            "three red squares",
        ],
        "references": [random_image(5, 90, 28), random_image(6), random_image(7), random_image(8, 33, 71)],
    }


@pytest.fixture(scope="session")
def select():
    """Function that takes some rows of the processor's arguments."""

    def rows_at(rows: dict[str, list], indices: list[int]) -> dict[str, list]:
        return {name: [column[i] for i in indices] for name, column in rows.items()}

    return rows_at
