"""Any callable is a reward: context, references, weights, failures, and what a function must give."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from rewarddance_hf.rewards import NonFiniteScoreError, RewardContractError, as_reward


IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a red circle", "two blue squares"]


def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3))


def colors(*names: str) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), name) for name in names]


def test_columns_go_where_they_are_taken():
    """A function gets the columns that it has arguments for, in singular or plural, and the task of what has a condition."""
    seen = {}

    def narrow(images, prompts, conditions, kind=None):
        seen["narrow"] = (prompts, conditions, kind)
        return brightness(images, prompts)

    def wide(images, prompts, **context):
        seen["wide"] = context
        return brightness(images, prompts)

    columns = {"condition": ["x", "y"], "kind": ["one", "two"], "seeds": [1, 2], "criteria": None}
    values = as_reward([narrow, wide, brightness]).by_name(IMAGES, PROMPTS, **columns)
    assert seen["narrow"] == (PROMPTS, ["x", "y"], ["one", "two"])
    task = ["image-editing"] * 2
    assert seen["wide"] == {"condition": ["x", "y"], "kind": ["one", "two"], "seeds": [1, 2], "task": task}
    assert list(values) == ["narrow", "wide", "brightness", "reward"]


def test_several_references_are_averaged():
    """A function sees one reference per image; the reward of a sample is the mean over its references."""
    calls = []

    def above(images, prompts, references):
        calls.append((len(images), prompts, references))
        return brightness(images, prompts) - torch.tensor(references)

    images = IMAGES.clone().requires_grad_()
    values = as_reward(above)(images, PROMPTS, references=[[0.1, 0.3], [0.5]])
    assert calls == [(3, [PROMPTS[0], PROMPTS[0], PROMPTS[1]], [0.1, 0.3, 0.5])]
    torch.testing.assert_close(values, brightness(IMAGES, PROMPTS) - torch.tensor([0.2, 0.5]))
    (gradient,) = torch.autograd.grad(values.sum(), images)
    torch.testing.assert_close(gradient, torch.full_like(images, 1 / (3 * 8 * 8)))
    pointwise = as_reward(above)
    above.is_pairwise = False
    with pytest.raises(TypeError, match="references"):  # not handed on
        pointwise(IMAGES, PROMPTS, references=[[0.1], [0.5]])


def test_weights_names_and_rewards_for_the_logs():
    """The reward is the weighted sum; one of weight 0 is computed without gradient and left out of it."""
    grad_modes = []

    def logged_only(images, prompts):
        grad_modes.append(images.requires_grad or torch.is_grad_enabled())
        return (images > 0.5).float().mean(dim=(1, 2, 3))

    images = IMAGES.clone().requires_grad_()
    values = as_reward({"pixels": brightness, "logs": logged_only}, [0.5, 0.0]).by_name(images, PROMPTS)
    torch.testing.assert_close(values["reward"], 0.5 * brightness(IMAGES, PROMPTS))
    assert grad_modes == [False]
    assert values["reward"].requires_grad
    assert not values["logs"].requires_grad
    assert as_reward([brightness, brightness]).names == ["brightness_1", "brightness_2"]
    reward = as_reward(brightness)
    assert as_reward(reward) is reward
    assert as_reward(reward, [2.0])(IMAGES, PROMPTS).tolist() == (2 * brightness(IMAGES, PROMPTS)).tolist()


@pytest.mark.parametrize("as_list", [False, True])
def test_clips_have_the_task_of_clips(as_list):
    """A reward that takes a task is told that a sample is a clip, unless its row says another task."""
    tasks = []

    def reward(images, prompts, task=None):
        tasks.append(task)
        return torch.zeros(len(prompts))

    clips = IMAGES[:, None].expand(2, 4, 3, 8, 8)
    clips = [list(clip) for clip in clips] if as_list else clips
    as_reward(reward)(clips, PROMPTS)
    as_reward(reward)(clips, PROMPTS, condition=colors("red", "blue"))
    as_reward(reward)(clips, PROMPTS, condition=[None, *colors("blue")], task=["mine", None])
    as_reward(reward)(list(IMAGES) if as_list else IMAGES, PROMPTS)
    as_reward(reward)(clips, PROMPTS, task="mine")
    assert tasks == [
        ["text-to-video"] * 2,
        ["image-to-video"] * 2,
        ["mine", "image-to-video"],
        None,
        ["mine", "mine"],
    ]


def test_lists_of_images():
    """Images that are no tensor are handed on one by one, with one reference each."""

    def sizes(images, prompts, references):
        return [image.size[0] / reference.size[0] for image, reference in zip(images, references, strict=True)]

    images = [Image.new("RGB", (width, 8)) for width in (8, 16)]
    references = [[Image.new("RGB", (4, 8)), Image.new("RGB", (8, 8))], Image.new("RGB", (16, 8))]
    assert as_reward(sizes)(images, PROMPTS, references=references).tolist() == [1.5, 1.0]


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda images, prompts: images.mean(), r"shape \(\) for 2 images"),
        (lambda images, prompts: images.mean(dim=(1, 2, 3))[:, None], r"shape \(2, 1\) for 2 images"),
        (lambda images, prompts: "good", "returned a `str`"),
        (lambda images, prompts: images.detach().mean(dim=(1, 2, 3)), "carries no gradient"),
        (lambda images, prompts: [0.5, 0.5], "carries no gradient"),
    ],
)
def test_what_a_function_must_return(function, match):
    """Everything but one number for each sample, with its gradient, is refused by name."""
    with pytest.raises(RewardContractError, match=match):
        as_reward({"mine": function})(IMAGES.clone().requires_grad_(), PROMPTS)


def test_bad_arguments():
    """What cannot be a reward is refused before anything is computed."""
    with pytest.raises(TypeError, match="must be callable"):
        as_reward("judge")
    with pytest.raises(ValueError, match="is empty"):
        as_reward([])
    with pytest.raises(ValueError, match="Give one weight for each"):
        as_reward(brightness, [1.0, 2.0])
    with pytest.raises(ValueError, match="must differ from 0"):
        as_reward(brightness, [0.0])
    with pytest.raises(ValueError, match="`criteria` has 1 entries for 2 images"):
        as_reward(lambda images, prompts, criteria: images.mean(dim=(1, 2, 3)))(IMAGES, PROMPTS, criteria=["x"])


def test_rewards_that_are_not_finite():
    """NaN stops a call with the row and the prompt, and loses one sample of `score_each`; the others keep their reward."""

    def broken(images, prompts):
        return torch.where(
            torch.tensor(["two" in prompt for prompt in prompts]), torch.nan, brightness(images, prompts)
        )

    with pytest.raises(NonFiniteScoreError, match="two blue squares") as caught:
        as_reward(broken)(IMAGES, PROMPTS)
    assert caught.value.rows == [1]
    assert caught.value.scores[0] == brightness(IMAGES, PROMPTS)[0]
    assert as_reward(broken).score_each(IMAGES, PROMPTS) == [brightness(IMAGES, PROMPTS)[0].item(), None]


def test_failures_are_set_apart():
    """A sample on which the function raises is None, in lists as in tensors; a wrong shape is an error all the same."""

    def picky(images, prompts, criteria):
        if any("two" in prompt for prompt in prompts):
            raise RuntimeError("cannot count")
        return [len(name) / 10 for name in criteria]

    assert as_reward(picky).score_each(IMAGES, PROMPTS, criteria=["abc", "ab"]) == [pytest.approx(0.3), None]
    assert as_reward(picky).score_each(colors("red", "red"), PROMPTS[::-1], criteria=["abc", "ab"])[
        1
    ] == pytest.approx(0.2)
    with pytest.raises(RewardContractError, match="one number for each"):
        as_reward(lambda images, prompts: images.mean()).score_each(IMAGES, PROMPTS)


def test_a_model_is_frozen_and_what_the_caller_keeps_stays():
    """Weights of a reward model get no gradient and keep `requires_grad`; in-place edits of images and lists reach nobody."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, images, prompts, criteria):
            rewards = (images.mean(dim=(2, 3)) * self.weight).sum(-1)
            prompts.clear()
            criteria.clear()
            images.data.zero_()
            return rewards

    model, images = Model(), IMAGES.clone().requires_grad_()
    prompts, criteria = list(PROMPTS), ["a", "b"]
    for function in (model, model.forward):
        as_reward(function)(images, prompts, criteria=criteria).sum().backward()
    assert model.weight.grad is None
    assert model.weight.requires_grad
    assert images.grad.abs().sum() > 0
    assert torch.equal(images, IMAGES)
    assert (prompts, criteria) == (PROMPTS, ["a", "b"])


def test_fingerprint():
    """Another function, weight or state of a model is told from the first."""
    first, second = nn.Linear(2, 1), nn.Linear(2, 1)
    seen = [as_reward(first), as_reward(second), as_reward(brightness), as_reward(brightness, [2.0])]
    prints = [str(reward.fingerprint()) for reward in seen]
    assert len(set(prints)) == 4
    assert prints == [str(reward.fingerprint()) for reward in seen]


def test_what_a_function_edits_is_a_copy():
    """Samples and references as images, clips or arrays, and what it returned before."""
    buffer = torch.zeros(2)

    def edits(images, prompts, references, conditions):
        for sample in (*images, *references, *conditions):
            for image in sample if isinstance(sample, list) else [sample]:
                if isinstance(image, Image.Image):
                    image.paste((1, 2, 3), (0, 0, *image.size))
                else:
                    image[:] = 0
            if isinstance(sample, list):
                sample.clear()
        buffer.copy_(torch.rand(2))
        return buffer

    reward = as_reward({"edits": edits})
    images = [colors("red", "red"), [torch.ones(3, 2, 2), np.ones((2, 2, 3))]]
    references, conditions = [colors("blue"), colors("green", "red")], colors("red", "blue")
    before = copy.deepcopy((images, references, conditions))
    first = reward.by_name(images, PROMPTS, references=[[clip] for clip in references], condition=conditions)
    known = {name: values.clone() for name, values in first.items()}
    reward.by_name(images, PROMPTS, references=[[clip] for clip in references], condition=conditions)
    assert all(torch.equal(first[name], values) for name, values in known.items())

    def pixels(value):
        return [pixels(item) for item in value] if isinstance(value, (list, tuple)) else np.asarray(value).tolist()

    assert pixels((images, references, conditions)) == pixels(before)
