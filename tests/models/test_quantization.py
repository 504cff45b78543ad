"""Judges in 8 bit by bitsandbytes, which runs on CPUs too: scores, gradients, stored weights, adapters on them."""

from collections import Counter

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from rewarddance_hf import (
    RewardDanceForYesScoring,
    RewardDanceProcessor,
    RewardDanceScorer,
    RewardDanceTrainer,
    RewardDanceTrainingArguments,
)
from rewarddance_hf.shapes.models import BASE_VLM
from rewarddance_hf.shapes.preferences import ShapesPreferences


pytest.importorskip("bitsandbytes")

EIGHT_BIT = BitsAndBytesConfig(load_in_8bit=True)
ROWS = [ShapesPreferences(8, "id")[index] for index in range(8)]
VISION_MODULES = 12  # linear modules of the base model's vision tower


def score(scorer, images=None):
    images = images if images is not None else [row["chosen"] for row in ROWS]
    return scorer.score(images, [row["prompt"] for row in ROWS], [row["rejected"] for row in ROWS])


def linear_modules(scorer) -> Counter:
    names = (type(module).__name__ for module in scorer.model.modules())
    return Counter(name for name in names if name in ("Linear", "Linear8bitLt"))


@pytest.fixture(scope="module")
def scorer():
    return RewardDanceScorer.from_pretrained(BASE_VLM)


@pytest.fixture(scope="module")
def quantized():
    return RewardDanceScorer.from_pretrained(BASE_VLM, quantization_config=EIGHT_BIT, device_map="cpu")


def test_scores_and_gradient(scorer, quantized):
    """A judge in 8 bit gives nearly the same reward and, for a generator, nearly the same direction, in half the memory."""
    assert linear_modules(quantized)["Linear8bitLt"] > 30
    assert quantized.model.get_memory_footprint() < 0.6 * scorer.model.get_memory_footprint()
    torch.testing.assert_close(score(quantized), score(scorer), rtol=0, atol=0.03)
    gradients = []
    for judge in (scorer, quantized):
        images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        score(judge, images).logit().sum().backward()
        gradients.append(images.grad.flatten(1))
    assert torch.cosine_similarity(*gradients).min() > 0.98


def test_weights_that_are_stored_in_8_bit(quantized, tmp_path):
    """A plain model that was saved in 8 bit becomes a judge as it is, also where it leaves modules out by name."""
    skipping = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["model.vision_tower", "lm_head"])
    for name, settings in {"whole": EIGHT_BIT, "partial": skipping}.items():
        model = AutoModelForImageTextToText.from_pretrained(BASE_VLM, quantization_config=settings, device_map="cpu")
        model.save_pretrained(tmp_path / name)
        RewardDanceProcessor.from_pretrained(BASE_VLM).save_pretrained(tmp_path / name)
    whole = RewardDanceScorer.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(score(whole), score(quantized), rtol=0, atol=1e-6)
    partial = RewardDanceScorer.from_pretrained(tmp_path / "partial")
    assert linear_modules(partial)["Linear"] == linear_modules(whole)["Linear"] + VISION_MODULES
    torch.testing.assert_close(score(partial), score(quantized), rtol=0, atol=0.03)

    quantized.model.save_pretrained(tmp_path / "judge")
    quantized.processor.save_pretrained(tmp_path / "judge")
    again = RewardDanceScorer.from_pretrained(tmp_path / "judge")
    torch.testing.assert_close(score(again), score(quantized), rtol=0, atol=1e-6)


def test_adapter_of_a_quantized_model(tmp_path):
    """An adapter that was trained on 8 bit loads onto 8 bit, to the same scores, or onto the whole base model."""
    model = RewardDanceForYesScoring.from_pretrained(BASE_VLM, quantization_config=EIGHT_BIT, device_map="cpu")
    trainer = RewardDanceTrainer(
        model=model,
        args=RewardDanceTrainingArguments(
            tmp_path / "run",
            max_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=ShapesPreferences(8),
        processing_class=RewardDanceProcessor.from_pretrained(BASE_VLM),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    before = score(RewardDanceScorer(model, trainer.processing_class))
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    wanted = score(RewardDanceScorer(trainer.model, trainer.processing_class))
    assert (wanted - before).abs().max() > 0.02
    same = RewardDanceScorer.from_pretrained(tmp_path / "adapter", quantization_config=EIGHT_BIT, device_map="cpu")
    torch.testing.assert_close(score(same), wanted, rtol=0, atol=1e-6)
    whole = RewardDanceScorer.from_pretrained(tmp_path / "adapter")
    assert linear_modules(whole)["Linear8bitLt"] == 0
    torch.testing.assert_close(score(whole), wanted, rtol=0, atol=0.05)
