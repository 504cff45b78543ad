"""Edits: every door shows the source image, and the engine computes what it is once for all candidates."""

import itertools
from dataclasses import replace

import pytest
import torch
from PIL import Image
from tiny_vlms import random_image

from rewarddance_hf import RewardDanceEvaluator, RewardDanceForYesScoring, RewardDanceProcessor, RewardDanceScorer
from rewarddance_hf.models.question_rewarddance import Question
from rewarddance_hf.rewards import as_reward
from rewarddance_hf.scoring.engine import engine as engine_module


SOURCES = [random_image(7, 64, 32), random_image(8, 30, 50)]
CANDIDATES = [random_image(i, *size) for i, size in enumerate([(40, 40), (64, 32), (28, 56), (40, 40)])]
LAYOUTS = ("images_first", "text_first")


@pytest.fixture(scope="module")
def make_scorer(vlm_folder):
    """Function that makes a scorer, and one on the plain path, on a tiny model. Read only."""

    def make(family="internvl", paradigm="pairwise", layout="images_first"):
        folder = vlm_folder(family)
        torch.manual_seed(0)
        model = RewardDanceForYesScoring.from_pretrained(folder, paradigm=paradigm).requires_grad_(False)
        processor = RewardDanceProcessor.from_pretrained(folder, prompt_layout=layout)
        return [RewardDanceScorer(model, processor, batch_size=3, engine=engine) for engine in ("auto", "plain")]

    return make


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["internvl", "qwen2_5_vl", "gemma3"])
def test_shared_sources_change_no_score(make_scorer, family, layout, monkeypatch):
    """
    Candidates of two sources in all orders, some of other size than their source, beside an image without source: scores
    are those of the plain path, with every image encoded once, and fewer tokens than without sharing.
    """
    monkeypatch.setattr(engine_module, "MIN_SAVING", 8)  # images are small
    scorer, plain = make_scorer(family, layout=layout)
    transparent = SOURCES[1].convert("RGBA")
    transparent.putalpha(Image.new("L", transparent.size, 100))
    questions = [
        Question(second, "make it red", first, source)
        for source in (SOURCES[0], transparent)
        for first, second in itertools.permutations(CANDIDATES, 2)
    ]
    questions.append(Question(CANDIDATES[0], "a red circle", CANDIDATES[1]))
    got, want = scorer.ask(questions), plain.ask(questions)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert want[0].std() > 1e-3
    assert scorer.statistics.num_images == scorer.statistics.num_encoded == 6
    assert scorer.statistics.minimum_tokens <= scorer.statistics.tokens < 0.8 * scorer.statistics.plain_tokens
    # Other sources, and none, are seen.
    others = [replace(question, condition=SOURCES[1]) for question in questions[:4]]
    assert (plain.ask(others)[1] - want[1][:4]).abs().max() > 1e-6


def test_source_states_are_computed_once(make_scorer, monkeypatch):
    """With one more candidate for a single-sample judge, only what comes after the source is computed for it."""
    monkeypatch.setattr(engine_module, "MIN_SAVING", 8)  # images are small
    scorer, _ = make_scorer(paradigm="pointwise")
    alone = [
        len(scorer.processor.encode([Question(c, "x", condition=SOURCES[0])])["input_ids"][0]) for c in CANDIDATES
    ]
    batch = scorer.processor.encode([Question(CANDIDATES[0], "x", condition=SOURCES[0])])
    (places,) = (batch["input_ids"][0] == scorer.model.config.vlm_config.image_token_id).nonzero(as_tuple=True)
    shared = int(places[1:][places.diff() > 1][0])  # all before the first token of the second image
    scorer.ask([Question(candidate, "x", condition=SOURCES[0]) for candidate in CANDIDATES])
    assert scorer.statistics.minimum_tokens == shared + sum(length - shared for length in alone)
    assert scorer.statistics.tokens <= 1.05 * scorer.statistics.minimum_tokens


@pytest.mark.parametrize("family", ["internvl", "llava_onevision"])
def test_gradient_beside_a_source(make_scorer, family):
    """The gradient to edited images through shared source states is that of the full graph."""
    scorer, plain = make_scorer(family, "pointwise")
    samples = torch.rand(3, 3, 40, 36, generator=torch.Generator().manual_seed(0)).requires_grad_()
    arguments = (samples, ["make it red", "make it red", "remove it"])
    context = {"conditions": [SOURCES[0], SOURCES[0], SOURCES[1]]}
    (want,) = torch.autograd.grad(plain.score(*arguments, **context).log().sum(), samples)
    (got,) = torch.autograd.grad(scorer.score(*arguments, **context).log().sum(), samples)
    assert want.abs().amax(dim=(1, 2, 3)).min() > 0
    assert (got - want).norm() <= 1e-5 * want.norm()


def test_task_of_edits_is_inferred(make_scorer):
    """Images with a condition are edits by every door; without one nothing says so."""
    scorer, _ = make_scorer()
    images, source = CANDIDATES[:2], SOURCES[0]

    def by_task(ask):
        inferred, told, other = (ask(task) for task in (None, "image-editing", "text-to-image"))
        assert inferred == told != other

    by_task(lambda task: scorer.score(images[:1], "a", images[1:], conditions=[source], task=task).item())
    by_task(lambda task: scorer.compare(*images, "a", condition=source, task=task).probability_a)
    by_task(lambda task: scorer.rank(images, "a", condition=source, task=task).scores.tolist())
    row = {"prompt": "a", "chosen": images[0], "rejected": images[1], "condition": source}

    def evaluate(task):
        evaluator = RewardDanceEvaluator([{**row, "task": task}])
        evaluator(scorer)
        return evaluator.results.scores.tolist()

    by_task(evaluate)
    reward = as_reward(scorer)
    by_task(lambda task: reward(images[:1], ["a"], references=images[1:], condition=[source], task=[task]).item())
    with pytest.raises(ValueError, match=r"`conditions\[0\]` is None, but the task is 'image-editing'"):
        scorer.score(images[:1], "a", images[1:], task="image-editing")


def test_functions_are_told_the_task_of_edits():
    """A reward function that asks for the task of a sample gets it, where it has a condition."""
    seen = []

    def reward(images, prompts, task=None, conditions=None):
        seen.append(task)
        return torch.zeros(len(images))

    images = torch.rand(3, 3, 8, 8)
    as_reward(reward)(images, ["a"] * 3, condition=[SOURCES[0], None, SOURCES[1]], task=[None, None, "sticker"])
    as_reward(reward)(images, ["a"] * 3)
    assert seen == [["image-editing", "text-to-image", "sticker"], None]
