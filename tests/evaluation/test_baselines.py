"""CLIP judges and reward functions against plain computations, on tiny models of real classes."""

import math

import numpy as np
import pytest
import torch
from tiny_clip import save_tiny_clip
from tiny_vlms import random_image
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from rewarddance_hf import RewardDanceEvaluator
from rewarddance_hf.evaluation.baselines import CLIPJudge, load_baseline


PROMPTS = ["a red circle", "two green triangles " * 40, "a blue square"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def judge(clip_folder):
    return CLIPJudge.from_pretrained(clip_folder)


def rows(count=5):
    return [
        {
            "prompt": f"a red circle {i}",
            "chosen": random_image(i, 40, 30 + i),
            "rejected": random_image(100 + i),
            "tie": i == 2,
            "category": "even" if i % 2 == 0 else "odd",
        }
        for i in range(count)
    ]


def similarity(folder, image, prompt):
    """The model card's way: scale times cosine of the two features, one by one."""
    model, tokenizer = CLIPModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        pixels = CLIPImageProcessorPil.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
        image = model.get_image_features(pixel_values=pixels).pooler_output[0]
        ids = tokenizer(prompt, truncation=True, max_length=77, return_tensors="pt")["input_ids"]
        text = model.get_text_features(input_ids=ids).pooler_output[0]
        return (model.logit_scale.exp() * torch.cosine_similarity(image, text, dim=0)).item()


def test_scores_equal_plain_transformers(clip_folder, judge):
    """Scores of a batch are those of the plain classes one by one, also for prompts beyond 77 tokens."""
    images = [random_image(i, 30 + i, 40) for i in range(3)]
    got = judge(images, PROMPTS, task=["text-to-image"] * 3)
    want = [similarity(clip_folder, image, prompt) for image, prompt in zip(images, PROMPTS, strict=True)]
    assert got.tolist() == pytest.approx(want, rel=1e-4)
    assert len(set(want)) == 3


def test_clips_score_the_mean_of_their_frames(judge):
    """A clip among images gets the mean over its frames."""
    frames = [random_image(i) for i in range(3)]
    got = judge([frames, frames[0]], ["a red circle"] * 2)
    alone = judge(frames, ["a red circle"] * 3)
    assert got.tolist() == pytest.approx([alone.mean().item(), alone[0].item()], rel=1e-4)


def test_incomplete_weights_are_refused(clip_folder, tmp_path):
    """Weights that are missing would be random numbers, so they are an error."""
    model = CLIPModel.from_pretrained(clip_folder)
    state = {name: weight for name, weight in model.state_dict().items() if "visual_projection" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match="lacks 1 weights of a CLIP model"):
        CLIPJudge.from_pretrained(tmp_path, clip_folder)


def test_function_metrics_equal_a_plain_loop(judge):
    """A function is measured by the same statistics: both samples of each row, ties left out, equal scores half right."""
    evaluator = RewardDanceEvaluator(rows(), batch_size=2)
    metrics = evaluator(judge)
    scores = np.array([judge([row["chosen"], row["rejected"]], [row["prompt"]] * 2).tolist() for row in rows()])
    untied = [0, 1, 3, 4]
    assert metrics["accuracy"] == pytest.approx((scores[untied, 0] > scores[untied, 1]).mean())
    assert metrics["order_consistency"] == 1
    assert (metrics["num_rows"], metrics["num_ties"]) == (5, 1)
    assert evaluator.results.scores == pytest.approx(scores, rel=1e-4)
    assert evaluator.results.categories == ["even", "odd", "even", "odd", "even"]
    constant = RewardDanceEvaluator(rows())(lambda images, prompts, **context: torch.zeros(len(images)))
    assert constant["accuracy"] == 0.5


def test_function_gets_the_whole_context():
    """Functions see images, clips as lists, prompts, tasks, criteria and first frames, one entry for each sample."""
    seen = {}

    def reward(images, prompts, conditions, task, criteria):
        seen.update(images=images, prompts=prompts, conditions=conditions, task=task, criteria=criteria)
        return [float(i) for i in range(len(images))]

    clip = [random_image(i) for i in range(4)]
    row = {"prompt": "a", "chosen": clip, "rejected": clip[::-1], "task": "image-to-video", "condition": clip[0]}
    other = {"prompt": "b", "chosen": clip[0], "rejected": clip[1], "criteria": "quality"}
    assert RewardDanceEvaluator([row, other])(reward)["accuracy"] == 0
    assert seen["prompts"] == ["a", "a", "b", "b"]
    assert seen["task"] == ["image-to-video"] * 2 + ["text-to-image"] * 2
    assert seen["criteria"] == [None, None, "quality", "quality"]
    assert [None if c is None else c.size for c in seen["conditions"]] == [clip[0].size] * 2 + [None] * 2
    assert [len(sample) for sample in seen["images"][:2]] == [4, 4]
    assert seen["images"][2].tobytes() == clip[0].tobytes()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda n: torch.zeros(n, 1), r"tensor of shape \(4, 1\) for 4 images"),
        (lambda n: torch.zeros(n - 1), r"tensor of shape \(3,\) for 4 images"),
        (
            lambda n: torch.tensor([0.0, 1.0, math.nan, 0.0]),
            r"Scores of the rows \[3\] are NaN",
        ),
    ],
)
def test_wrong_scores_are_refused(answer, message):
    """What is not one finite score for each sample is no result; rows before it are kept."""
    evaluator = RewardDanceEvaluator(rows(4), batch_size=2)

    def reward(images, prompts, **context):
        return torch.arange(4.0) if prompts[0].endswith("0") else answer(len(images))

    with pytest.raises(ValueError, match=message):
        evaluator(reward)
    assert evaluator.results.scores.tolist() == [[0, 1], [2, 3]]


def test_names_of_the_command_line(clip_folder, monkeypatch, tmp_path):
    """CLIP models and functions are told from repository IDs; a function may lie in the working folder."""
    assert isinstance(load_baseline(f"clipscore:{clip_folder}"), CLIPJudge)
    assert isinstance(load_baseline(f"pickscore:{clip_folder}"), CLIPJudge)
    for name in ("org/judge", "/some/folder", "outputs/judge"):
        assert load_baseline(name) is None
    (tmp_path / "my_rewards.py").write_text(
        "def bright(images, prompts, **context):\n    return [0.0] * len(images)\n"
    )
    monkeypatch.chdir(tmp_path)
    before = list(__import__("sys").path)
    assert load_baseline("my_rewards:bright")([1, 2], ["a", "b"]) == [0.0, 0.0]
    assert __import__("sys").path == before
    with pytest.raises(ValueError, match="'my_rewards' has no callable 'dark'"):
        load_baseline("my_rewards:dark")
    with pytest.raises(ImportError, match="no_such_module"):
        load_baseline("no_such_module:reward")


def test_pairwise_function_sees_the_other_sample_as_reference():
    """A function that compares is asked in both orders, and the higher reward is the verdict."""
    seen = []

    def reward(images, prompts, references):
        seen.extend(zip(images, references, strict=True))
        return torch.tensor([float(len(image) - len(other)) for image, other in zip(images, references, strict=True)])

    reward.is_pairwise = True
    clips = [[random_image(i) for i in range(count)] for count in (3, 2)]
    evaluator = RewardDanceEvaluator([{"prompt": "a", "chosen": clips[0], "rejected": clips[1]}])
    assert evaluator(reward)["accuracy"] == 1
    assert [(len(image), len(other)) for image, other in seen] == [(3, 2), (2, 3)]
    assert evaluator.results.scores.tolist() == [[1, -1]]
