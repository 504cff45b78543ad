"""Code of the README: all of it compiles, and what needs no download runs, on tiny models and with small numbers."""

import re
from contextlib import nullcontext
from pathlib import Path

import datasets
import pytest
import torch
from tiny_refl import PROMPTS, tiny_sd3
from tiny_vlms import random_image

from rewarddance_hf import NoAnswerError, RewardDanceScorer
from rewarddance_hf.shapes.models import BASE_VLM


README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
# Each holds a text by which a block is known. These need a download, or run elsewhere (the Hub's snippets are run by tests/hub).
ELSEWHERE = ["load_dataset(", "load_preferences(", "trust_remote_code"]
SMALL = {
    "OpenGVLab/InternVL3_5-2B-HF": str(BASE_VLM),
    "org/my-judge": str(BASE_VLM),
    "num_candidates=16": "num_candidates=2, num_inference_steps=2",
    "max_denoiser_evaluations=512": "max_denoiser_evaluations=64, num_inference_steps=4",
    "num_inference_steps=20": "num_inference_steps=2",
    "max_steps=200": "max_steps=1",
    "eval_steps=25": "eval_steps=1",
    "sample_steps=25": "sample_steps=1",
    "num_samples=8": "num_samples=2, max_new_tokens=4",
}


def title(block: str) -> str:
    return re.sub(r"\W+", " ", block)[:40].strip()


@pytest.mark.parametrize("block", BLOCKS, ids=title)
def test_code_compiles(block):
    """Every block is Python."""
    compile(block, "README.md", "exec")


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if not any(text in block for text in ELSEWHERE)], ids=title
)
def test_code_runs(block, tmp_path, monkeypatch):
    """What a block uses without making it is given; all else happens as it is written."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    images = [random_image(index) for index in range(4)]
    pipeline = tiny_sd3()
    pipeline.set_progress_bar_config(disable=True)
    names = {
        "images": images,
        "references": images[::-1],
        "reference": images[0],
        "image_a": images[0],
        "image_b": images[1],
        "good": images[2],
        "bad": images[3],
        "prompts": PROMPTS[:4],
        "prompt": PROMPTS[0],
        "held_out_prompts": PROMPTS[:2],
        "rows": datasets.Dataset.from_list([{"prompt": "a", "image": images[0], "reference": images[1]}]),
        "scorer": RewardDanceScorer.from_pretrained(BASE_VLM),
        "pointwise_scorer": lambda images, prompts: images.mean((1, 2, 3)),
        "other_judge": lambda images, prompts: images.mean((1, 2, 3)),
        "pipeline": pipeline,
    }
    for text, small in SMALL.items():
        block = block.replace(text, small)
    untrained = pytest.raises(NoAnswerError, match="did not reach") if ".reason(" in block else nullcontext()
    with untrained:  # a judge that has learned no reasons is called as it should be, and finds no answer
        exec(compile(block, "README.md", "exec"), names)
