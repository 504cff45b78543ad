"""Rewards of a generator: a real judge, a pairwise function, and a model, each with what the rows know."""

import pytest
import torch
from peft import LoraConfig
from PIL import Image
from tiny_refl import PROMPTS, make_trainer, pixel_reward, tiny_wan, trained_weights

from rewarddance_hf import RewardDanceForYesScoring, RewardDanceScorer, RewardDynamicsCallback
from rewarddance_hf.alignment.refl.objective import with_gradient_at_once
from rewarddance_hf.rewards import as_reward
from rewarddance_hf.shapes.models import BASE_VLM, judge_processor


IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def images(*colors: str) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), color) for color in colors]


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
    columns = {"references": references, "wins": [[3, 2], [1]], "criteria": ["colors", None]}
    rewards = as_reward(dict(judges))
    assert rewards.is_pairwise
    values = rewards.by_name(IMAGES, PROMPTS[:2], **columns)
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
    # References are seen once in the whole run, and what goes before a sample is computed once for each prompt.
    assert judges["pairwise"].statistics.num_encoded == 2 + 2 * trainer.state.max_steps
    assert all(not torch.equal(value, weights[name]) for name, value in trained_weights(trainer).items())
    for name, value in judges["pairwise"].model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_what_is_maximised_by_default(judges, tmp_path):
    """The logarithm of one judge's reward, which was found to hack it later; any other reward as it is."""
    for reward, wanted in ((judges["pointwise"], "log"), (pixel_reward, "none"), ([judges["pointwise"]] * 2, "none")):
        assert make_trainer(tmp_path, reward=reward).args.reward_transform == wanted
    args = {"reward_weights": [0.0, 1.0]}
    assert make_trainer(tmp_path, reward=[pixel_reward, judges["pointwise"]], **args).args.reward_transform == "log"


def test_adapter_by_default(judges, tmp_path):
    """An adapter that names no layers gets those of the attention, and the learning rate of adapters."""
    trainer = make_trainer(tmp_path, peft_config=LoraConfig(r=2), learning_rate=None)
    layers = {
        name.split(".lora_A")[0].split("attn.")[-1] for name, _ in trainer.model.named_parameters() if "lora_A" in name
    }
    assert layers == {"to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
    assert trainer.args.learning_rate == 5e-5


def test_a_pairwise_function_tunes_a_generator(tmp_path):
    """A pairwise reward that is no judge: one reference for each image, and columns that it takes, in training and held out."""
    seen = []

    class Brighter:
        is_pairwise = True

        def __call__(self, images, prompts, references, kind):
            seen.append((len(images), len(references), set(kind)))
            levels = torch.tensor([image.convert("L").getpixel((0, 0)) / 255 for image in references])
            return (images.mean(dim=(1, 2, 3)) - levels).sigmoid()

    rows = [{"prompt": prompt, "references": images("gray", "black"), "kind": "k"} for prompt in PROMPTS]
    monitor = RewardDynamicsCallback(Brighter(), rows[:2], eval_steps=1, num_samples=1, plot=False)
    trainer = make_trainer(
        tmp_path, reward=Brighter(), train_dataset=rows, eval_dataset=rows[:3], callbacks=[monitor], max_steps=1
    )
    trainer.train()
    assert trainer.evaluate()["eval_reward"] == pytest.approx(0.5, abs=0.4)
    assert {count for count, _, _ in seen} == {4, 6}
    assert all(count == others and kinds == {"k"} for count, others, kinds in seen)
    last = monitor.dynamics.history[-1]
    assert {"held_out", "tuned_change"} <= last.keys()


def test_a_reward_model_gets_no_gradient(tmp_path):
    """A differentiable reward model that requires grad is frozen while it is asked; otherwise its `.grad` would grow."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 1), torch.nn.Flatten(0))

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, images, prompts):
            return self.model(images)

    reward = Model()
    make_trainer(tmp_path, reward=reward, max_steps=1).train()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in reward.parameters())


def test_a_reward_that_edits_its_images_changes_no_sample(tmp_path):
    """What a reward function is given is a copy: editing it in place neither breaks the gradient nor the next reward."""

    def careless(images, prompts):
        rewards = images.mean(dim=(1, 2, 3)).clone()
        images.detach().zero_()
        return rewards

    def mean(images, prompts):
        return images.mean(dim=(1, 2, 3))

    trainer = make_trainer(tmp_path, reward={"careless": careless, "mean": mean}, reward_weights=[1.0, 0.0])
    trainer.train()
    logs = trainer.state.log_history[0]
    assert logs["rewards/mean"] == pytest.approx(logs["rewards/careless"]) != 0


def test_rows_of_clips_without_a_task(tmp_path):
    """Where only some rows of clips name a task, the others are clips all the same. They used to be judged as images."""
    seen = []

    def reward(images, prompts, task):
        seen.extend(zip(prompts, task, strict=True))
        return images.flatten(1).mean(dim=1)

    rows = [{"prompt": PROMPTS[0], "task": "image-to-video"}, {"prompt": PROMPTS[1], "task": None}]
    make_trainer(tmp_path, tiny_wan(), reward=reward, train_dataset=rows, max_steps=1).train()
    assert set(seen) == {(PROMPTS[0], "image-to-video"), (PROMPTS[1], "text-to-video")}


def test_the_gradient_is_taken_at_once():
    """Value and gradient are those of the function, which is gone when the backward pass begins; without a gradient there is none."""
    images = torch.randn(2, 3, 4, 4, requires_grad=True)
    calls = []

    def function(images):
        calls.append(images.requires_grad)
        return (images**3).sum()

    (wanted,) = torch.autograd.grad(3 * function(images * 2), images)
    for scale in (1.0, 65536.0):
        value = with_gradient_at_once(function, images * 2, scale)
        (found,) = torch.autograd.grad(3 * value, images)
        torch.testing.assert_close(found, wanted)
    assert not with_gradient_at_once(function, images.detach()).requires_grad
    assert not with_gradient_at_once(lambda images: torch.ones(()), images).requires_grad
    assert calls == [True, True, True, False]


def test_models_that_a_function_asks_get_no_gradients(tmp_path):
    """A model that a function closes over cannot be frozen; its `grad` used to grow with each update."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.Tanh(), torch.nn.AdaptiveAvgPool2d(1))

    def reward(images, prompts):
        return net(images).flatten(1).mean(dim=1)

    trainer = make_trainer(tmp_path, reward=reward)
    before = trained_weights(trainer)
    trainer.train()
    assert any(not torch.equal(weight, before[name]) for name, weight in trained_weights(trainer).items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())
