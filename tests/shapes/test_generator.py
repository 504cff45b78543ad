"""Tests of the tiny generator: a stock pipeline that draws, saves, loads and takes adapters like any other."""

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model_state_dict

from rewarddance_hf.shapes import generator_base
from rewarddance_hf.shapes.captions import caption_words
from rewarddance_hf.shapes.generated import ShapesPrompts, alignment_holds, sample_images
from rewarddance_hf.shapes.generator import (
    BASE_GENERATOR,
    GUIDANCE_SCALE,
    NUM_INFERENCE_STEPS,
    PROMPT_TOKENS,
    SAMPLING,
    build_generator,
    build_prompt_tokenizer,
    load_generator,
)


@pytest.fixture(scope="module")
def pipeline():
    """The base checkpoint. Read only: tests that change weights load their own."""
    return load_generator()


def draw(pipeline, prompt="two red circles"):
    generator = torch.Generator().manual_seed(0)
    return pipeline([prompt] * 2, generator=generator, output_type="pt", **SAMPLING).images


def test_base_checkpoint_is_small():
    """It travels in the repository."""
    assert sum(file.stat().st_size for file in BASE_GENERATOR.rglob("*")) < 6e6


def test_plain_call_draws(pipeline, capsys):
    """Nobody needs to know the fast settings: the pipeline's own defaults give a right image of 32 pixels, silently."""
    images = pipeline(
        "a red circle",
        num_inference_steps=NUM_INFERENCE_STEPS,
        guidance_scale=GUIDANCE_SCALE,
        num_images_per_prompt=6,
        generator=torch.Generator().manual_seed(0),
    ).images
    assert all(image.mode == "RGB" and image.size == (32, 32) for image in images)
    assert alignment_holds(images, ["a red circle"] * 6).mean() > 0.5
    assert capsys.readouterr() == ("", "")


def test_base_generator_is_imperfect(pipeline):
    """There is something for a judge to mend, and something right to prefer."""
    prompts = [row["prompt"] for row in ShapesPrompts(128, split="id", seed=1)]
    assert 0.25 < alignment_holds(sample_images(pipeline, prompts), prompts).mean() < 0.7
    singles = ["a red circle", "a blue square", "a white triangle", "a purple circle"] * 6
    assert alignment_holds(sample_images(pipeline, singles), singles).mean() > 0.7


def test_saved_pipeline_draws_the_same(pipeline, tmp_path):
    """What `save_pretrained` writes gives the same images to the bit, by the stock class and by our door."""
    pipeline.save_pretrained(tmp_path)
    loaded = StableDiffusion3Pipeline.from_pretrained(tmp_path, text_encoder_3=None, tokenizer_3=None)
    assert torch.equal(draw(load_generator(tmp_path)), draw(pipeline))
    assert torch.equal(draw(loaded), draw(pipeline))


def test_lora_weights_travel(tmp_path):
    """An adapter of the denoiser is saved, loaded and unloaded as for any pipeline."""
    tuned = load_generator()
    before = draw(tuned)
    tuned.transformer.add_adapter(
        LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    )
    after = draw(tuned)
    assert not torch.equal(after, before)
    tuned.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(tuned.transformer))
    fresh = load_generator()
    fresh.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    assert torch.equal(draw(fresh), after)
    fresh.unload_lora_weights()
    assert torch.equal(draw(fresh), before)


def test_every_word_is_one_token():
    """Prompts are short, and none is cut."""
    tokenizer = build_prompt_tokenizer()
    assert all(len(ids) == 3 for ids in tokenizer(caption_words()).input_ids)
    assert len(set(map(tuple, tokenizer(caption_words()).input_ids))) == len(caption_words())
    for split in ("train", "ood"):
        prompts = [row["prompt"] for row in ShapesPrompts(1000, split=split)]
        assert max(map(len, tokenizer(prompts).input_ids)) <= PROMPT_TOKENS


def test_training_is_deterministic_and_changes_every_module(tmp_path):
    """The same seed gives the same weights, and both stages reach all that they should."""
    initial = build_generator(3)
    trained = []
    stages = (generator_base.Stage(10, 3e-3), generator_base.Stage(2, 1e-3, wrong_share=0.8, wrong_own_share=0.5))
    for name in ("first", "second"):
        torch.manual_seed(len(trained))  # the state that the caller left does not matter
        generator_base.train_generator(
            tmp_path / name, seed=3, num_images=40, autoencoder_steps=2, denoiser_stages=stages
        )
        trained.append(load_generator(tmp_path / name))
    for module in ("vae", "transformer", "text_encoder", "text_encoder_2"):
        states = [getattr(pipeline, module).state_dict() for pipeline in (initial, *trained)]
        assert all(torch.equal(value, states[2][name]) for name, value in states[1].items())
        assert any(not torch.equal(value, states[1][name]) for name, value in states[0].items())
    for config in (pipeline.vae.config for pipeline in trained):
        assert config.scaling_factor == trained[0].vae.config.scaling_factor != 0.18215
        assert config.shift_factor == trained[0].vae.config.shift_factor


def test_missing_checkpoint_is_named(tmp_path):
    """A wrong folder is named."""
    with pytest.raises(FileNotFoundError, match="nothing' holds no pipeline"):
        load_generator(tmp_path / "nothing")
