"""Rewards of generated samples: context, references, weights, and a real pairwise judge."""

import pytest
import torch
from PIL import Image
from tiny_refl import PROMPTS, make_trainer, pixel_reward, trained_weights

from rewarddance_hf import RewardDanceForYesScoring, RewardDanceScorer
from rewarddance_hf.alignment.refl.rewards import RewardFunctions
from rewarddance_hf.shapes.models import BASE_VLM, judge_processor


IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
COLUMNS = {"prompt": PROMPTS[:2], "draw": [7, 8]}


def images(*colors: str) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), color) for color in colors]


def test_columns_go_where_they_are_taken():
    """A function gets the columns that it has arguments for, in singular or plural, and never the trainer's own."""
    seen = {}

    def narrow(images, prompts, conditions, kind=None):
        seen["narrow"] = (prompts, conditions, kind)
        return images.mean(dim=(1, 2, 3))

    def wide(images, prompts, **context):
        seen["wide"] = context
        return images.mean(dim=(1, 2, 3))

    def bare(images, prompts):
        return images.mean(dim=(1, 2, 3))

    columns = {**COLUMNS, "condition": ["x", "y"], "kind": ["one", "two"], "seeds": [1, 2]}
    values = RewardFunctions([narrow, wide, bare])(IMAGES, columns)
    assert seen["narrow"] == (PROMPTS[:2], ["x", "y"], ["one", "two"])
    assert seen["wide"] == {"condition": ["x", "y"], "kind": ["one", "two"], "seeds": [1, 2]}
    assert list(values) == ["narrow", "wide", "bare", "reward"]


def test_several_references_are_averaged():
    """A function sees one reference per image; the reward of a sample is the mean over its references."""
    calls = []

    def brightness_above(images, prompts, references):
        calls.append((len(images), prompts, references))
        return images.mean(dim=(1, 2, 3)) - torch.tensor(references)

    columns = {**COLUMNS, "references": [[0.1, 0.3], [0.5]]}
    images = IMAGES.clone().requires_grad_()
    values = RewardFunctions(brightness_above)(images, columns)["reward"]
    assert calls == [(3, [PROMPTS[0], PROMPTS[0], PROMPTS[1]], [0.1, 0.3, 0.5])]
    means = IMAGES.mean(dim=(1, 2, 3))
    torch.testing.assert_close(values, means - torch.tensor([0.2, 0.5]))
    (gradient,) = torch.autograd.grad(values.sum(), images)
    torch.testing.assert_close(gradient, torch.full_like(images, 1 / (3 * 8 * 8)))


def test_weights_names_and_rewards_for_the_logs():
    """The reward is the weighted sum; one of weight 0 is computed without gradient and left out of it."""
    grad_modes = []

    def logged_only(images, prompts):
        grad_modes.append(images.requires_grad or torch.is_grad_enabled())
        return (images > 0.5).float().mean(dim=(1, 2, 3))

    rewards = RewardFunctions({"pixels": pixel_reward, "logs": logged_only}, weights=[0.5, 0.0])
    images = IMAGES.clone().requires_grad_()
    values = rewards(images, COLUMNS)
    torch.testing.assert_close(values["reward"], 0.5 * pixel_reward(IMAGES, PROMPTS[:2]))
    assert grad_modes == [False]
    assert values["reward"].requires_grad
    assert not values["logs"].requires_grad
    twice = RewardFunctions([pixel_reward, pixel_reward])
    assert twice.names == ["pixel_reward_1", "pixel_reward_2"]


def test_clips_have_the_task_of_clips():
    """A reward that takes a task is told that a sample is a clip, unless the row says another task."""
    tasks = []

    def reward(images, prompts, task=None):
        tasks.append(task)
        return images.flatten(1).mean(dim=1)

    clips = IMAGES[:, None].expand(2, 4, 3, 8, 8)
    RewardFunctions(reward)(clips, COLUMNS)
    RewardFunctions(reward)(clips, {**COLUMNS, "condition": images("red", "blue")})
    RewardFunctions(reward)(clips, {**COLUMNS, "task": ["mine", "mine"]})
    RewardFunctions(reward)(IMAGES, COLUMNS)
    assert tasks == [["text-to-video"] * 2, ["image-to-video"] * 2, ["mine", "mine"], None]


@pytest.fixture(scope="module")
def judges():
    """The base model as a zero-shot judge in two paradigms."""
    return {
        paradigm: RewardDanceScorer(
            RewardDanceForYesScoring.from_pretrained(BASE_VLM, paradigm=paradigm).requires_grad_(False),
            judge_processor(),
        )
        for paradigm in ("pairwise", "pointwise")
    }


def test_a_scorer_gets_its_own_arguments(judges):
    """A pairwise scorer is given references, a pointwise one is not; both know nothing of foreign columns."""
    references = [images("red", "blue"), images("green")]
    columns = {**COLUMNS, "references": references, "wins": [[3, 2], [1]], "criteria": ["colors", None]}
    rewards = RewardFunctions(dict(judges))
    assert rewards.is_pairwise
    values = rewards(IMAGES, columns)
    flat = judges["pairwise"].score(
        IMAGES[[0, 0, 1]],
        [PROMPTS[0], PROMPTS[0], PROMPTS[1]],
        references=[*references[0], *references[1]],
        criteria=["colors", "colors", None],
    )
    torch.testing.assert_close(values["pairwise"], torch.stack([(flat[0] + flat[1]) / 2, flat[2]]))
    alone = judges["pointwise"].score(IMAGES, PROMPTS[:2], criteria=["colors", None])
    torch.testing.assert_close(values["pointwise"], alone)


def test_a_pairwise_judge_tunes_a_generator(judges, tmp_path):
    """The whole chain: prompts with references, pipeline, judge, gradient, update; the judge itself stays."""
    rows = [{"prompt": prompt, "references": images("red", "white")} for prompt in PROMPTS]
    before = {name: value.clone() for name, value in judges["pairwise"].model.state_dict().items()}
    trainer = make_trainer(tmp_path, reward=judges["pairwise"], train_dataset=rows, reward_transform="log_odds")
    weights = trained_weights(trainer)
    trainer.train()
    assert trainer.last_rewards.shape == (2,)
    assert "rewards/RewardDanceScorer" in trainer.state.log_history[0]
    assert all(not torch.equal(value, weights[name]) for name, value in trained_weights(trainer).items())
    for name, value in judges["pairwise"].model.state_dict().items():
        assert torch.equal(value, before[name]), name
