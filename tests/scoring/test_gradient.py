"""The scorer as a differentiable reward: gradients of images, and of nothing else."""

import numpy as np
import pytest
import torch
from tiny_vlms import random_image

from rewarddance_hf import RewardDanceForYesScoring, RewardDanceProcessor, RewardDanceScorer


PROMPTS = ["a red circle", "two green triangles left of a blue square", "yes", "a blue square", "no"]
REFERENCES = [random_image(10 + i, 30 + 7 * i, 40) for i in range(5)]
PARADIGMS = ("pairwise", "pointwise", "regressive")


def make_scorer(folder, paradigm="pairwise", batch_size=2):
    model = RewardDanceForYesScoring.from_pretrained(folder, paradigm=paradigm)
    if paradigm == "regressive":
        torch.nn.init.normal_(model.score.weight, std=0.5, generator=torch.Generator().manual_seed(0))
    return RewardDanceScorer(model, RewardDanceProcessor.from_pretrained(folder), batch_size=batch_size)


@pytest.fixture(scope="module")
def scorers(vlm_folder):
    """One scorer for each paradigm. Read only."""
    return {paradigm: make_scorer(vlm_folder("internvl"), paradigm) for paradigm in PARADIGMS}


def random_images(*shape: int) -> torch.Tensor:
    """Random floats that are multiples of 1/255: equal as tensors and as images."""
    levels = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0))
    return (levels / 255).requires_grad_()


def tensor_of(image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def assert_useful(gradient):
    assert gradient.isfinite().all()
    assert (gradient != 0).float().mean() > 0.99


@pytest.mark.parametrize("paradigm", PARADIGMS)
@pytest.mark.parametrize("shape", [(5, 3, 40, 52), (5, 2, 3, 31, 44)], ids=["images", "clips"])
def test_reward_has_the_gradient_of_samples(scorers, paradigm, shape):
    """Rewards are those without gradient, in batches of 2; each depends on its own sample only."""
    scorer = scorers[paradigm]
    references = REFERENCES if paradigm == "pairwise" else None
    images = random_images(*shape)
    plain = scorer.score(images.detach(), PROMPTS, references)
    assert not plain.requires_grad
    rewards = scorer.score(images, PROMPTS, references)
    torch.testing.assert_close(rewards.detach(), plain, rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad(rewards.log().sum(), images, retain_graph=True)
    assert_useful(gradient)
    (gradient,) = torch.autograd.grad(rewards[3].log(), images)
    assert_useful(gradient[3])
    assert not gradient[[0, 1, 2, 4]].any()


def test_weights_get_no_gradient(vlm_folder):
    """A reward is frozen, whatever is trained; who trains the judge elsewhere keeps its `requires_grad`."""
    scorer = make_scorer(vlm_folder("internvl"))
    flags = {name: i % 2 == 0 for i, (name, _) in enumerate(scorer.model.named_parameters())}
    for name, parameter in scorer.model.named_parameters():
        parameter.requires_grad_(flags[name])
    images = random_images(5, 3, 40, 52)
    generator = torch.nn.Parameter(torch.tensor(1.0))
    scorer.score(images.detach() * generator.clamp(max=1), PROMPTS, REFERENCES).sum().backward()
    assert generator.grad.abs() > 0
    for name, parameter in scorer.model.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad == flags[name]
    with pytest.raises(ValueError, match="has values from"):
        scorer.score(images + 1, PROMPTS, REFERENCES)
    assert {name: parameter.requires_grad for name, parameter in scorer.model.named_parameters()} == flags


def test_references_and_first_frames(scorers):
    """What is detached gets no gradient; what is not does, even alone."""
    scorer = scorers["pairwise"]
    images = random_images(5, 3, 40, 52)
    references = [tensor_of(reference).requires_grad_() for reference in REFERENCES]
    conditions = [tensor_of(random_image(3)).requires_grad_(), None, None, random_image(4), None]
    arguments = {"conditions": conditions, "task": "image-to-video"}

    wanted = scorer.score(
        images.detach(), PROMPTS, REFERENCES, conditions=[random_image(3), *conditions[1:]], task="image-to-video"
    )
    rewards = scorer.score(images, PROMPTS, references, **arguments)
    torch.testing.assert_close(rewards.detach(), wanted, rtol=0, atol=1e-6)
    for gradient in torch.autograd.grad(rewards.log().sum(), [images, *references, conditions[0]]):
        assert_useful(gradient)
    rewards = scorer.score(images.detach(), PROMPTS, [*references[:1], *REFERENCES[1:]])
    assert_useful(torch.autograd.grad(rewards.log().sum(), references[0])[0])
    rewards = scorer.score(images, PROMPTS, REFERENCES)
    assert torch.autograd.grad(rewards.sum(), references, allow_unused=True) == (None,) * 5


def test_some_samples_have_a_gradient(scorers):
    """One list may hold tensors with and without gradient, and images; batches without any are no obstacle."""
    scorer = scorers["pairwise"]
    sample = random_images(3, 40, 52)
    rewards = scorer.score([random_image(0), random_image(1), sample], PROMPTS[:3], REFERENCES[:3])
    assert_useful(torch.autograd.grad(rewards.sum(), sample)[0])


def test_optimizing_pixels_raises_the_reward(scorers):
    """The gradient leads uphill for the rounded image, which is what is judged."""
    scorer = scorers["pointwise"]
    image = random_images(1, 3, 40, 40)
    before = scorer.score(image.detach(), PROMPTS[:1])
    for _ in range(5):
        (gradient,) = torch.autograd.grad(scorer.score(image, PROMPTS[:1]).log().sum(), image)
        image = (image + 0.02 * gradient.sign()).clamp(0, 1).detach().requires_grad_()
    assert scorer.score(image.detach(), PROMPTS[:1]) > 1.1 * before


def test_no_grad_is_obeyed(scorers):
    """Search and evaluation pay for no graph."""
    with torch.no_grad():
        assert not scorers["pairwise"].score(random_images(5, 3, 40, 52), PROMPTS, REFERENCES).requires_grad
