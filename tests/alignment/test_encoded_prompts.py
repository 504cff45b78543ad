"""Prompts that are encoded once: same updates as without, text encoders away, and batches put together as each pipeline does."""

import diffusers
import pytest
import torch
from tiny_pipelines import qwen_image
from tiny_refl import (
    PROMPTS,
    SIZES,
    WORDS,
    make_trainer,
    rows,
    tiny_img2img,
    tiny_sd,
    tiny_sd3,
    tiny_wan,
    tokenizer,
    trained_weights,
)
from tiny_vlms import random_image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from rewarddance_hf.alignment.refl.encoded_prompts import EncodedPrompts
from rewarddance_hf.alignment.refl.joining import NotJoinedError, join, learn_to_join


def tiny_qwen() -> diffusers.QwenImagePipeline:
    """Qwen-Image, which pads to the longest prompt of a batch, and masks what it pads if there is any."""
    torch.manual_seed(0)
    pipeline, _ = qwen_image()
    width = pipeline.transformer.config.joint_attention_dim
    text = {
        "hidden_size": width,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": len(WORDS),
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [width // 4, 0, 0]},
    }
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": width, "depth": 1}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    encoder = Qwen2_5_VLForConditionalGeneration(config).eval()
    pipeline.register_modules(text_encoder=encoder, tokenizer=tokenizer())
    return pipeline


SIZES["QwenImagePipeline"] = {
    "height": 8,
    "width": 8,
    "true_cfg_scale": 3.0,
    "negative_prompt": "a square and a circle",
}


def count_calls(pipeline) -> list[str]:
    """Names of text encoders, as they are called from now on."""
    calls = []
    for name, part in pipeline.components.items():
        if name.startswith("text_encoder") and part is not None:
            part.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    return calls


@pytest.mark.parametrize(
    "make_pipeline",
    [tiny_sd3, *(pytest.param(slow, marks=pytest.mark.slow) for slow in (tiny_sd, tiny_wan, tiny_img2img, tiny_qwen))],
)
def test_updates_are_those_without(make_pipeline, tmp_path):
    """
    Weights after two updates and samples are those of a run that encodes prompts again and again, in a resumed run too; text
    encoders are called once for each prompt, and the pipeline is whole afterwards.
    """
    data = rows(3)
    if make_pipeline is tiny_img2img:
        data = [{**row, "condition": random_image(index, 16, 16)} for index, row in enumerate(data)]
    settings = {"train_dataset": data, "save_strategy": "steps", "save_steps": 1, "eval_dataset": data[:1]}
    settings |= {"eval_strategy": "steps", "eval_steps": 1}
    settings |= {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 10.0}
    if make_pipeline is tiny_img2img:
        settings["pipeline_kwargs"] = {"strength": 1.0}
    weights, samples = [], []
    for precompute_prompts in (False, True):
        pipeline = make_pipeline()
        before = dict(pipeline.config)
        trainer = make_trainer(tmp_path, pipeline, precompute_prompts=precompute_prompts, **settings)
        calls = count_calls(pipeline)
        if precompute_prompts:
            make_trainer(tmp_path, make_pipeline(), precompute_prompts=True, max_steps=1, **settings).train()
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1") if precompute_prompts else None)
        weights.append(trained_weights(trainer))
        known = len(calls)
        conditions = [row.get("condition") for row in data[:2]] if make_pipeline is tiny_img2img else None
        samples.append(trainer.sample(PROMPTS[:2], output_type="pt", conditions=conditions))
        assert (len(calls) == known) == precompute_prompts  # none is called again
        assert pipeline.text_encoder is not None
        assert dict(pipeline.config) == before
    # Two for each of three prompts, with and without guidance, and two for what a batch is like
    assert len(set(calls)) * 3 <= known <= len(set(calls)) * 8
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(samples[1], samples[0], rtol=1e-5, atol=1e-6)


def test_prompts_that_come_later_are_encoded_then(tmp_path):
    """Other prompts, and other settings of the pipeline, give the samples that they give without."""
    plain, trainer = (make_trainer(tmp_path, tiny_qwen(), precompute_prompts=kept) for kept in (False, True))
    calls = count_calls(trainer.pipeline)
    for prompts, changes in ((PROMPTS[:1], {}), (PROMPTS[:3], {}), (PROMPTS, {"true_cfg_scale": 1.0}), (PROMPTS, {})):
        ours, theirs = (one.sample(prompts, output_type="pt", **changes) for one in (trainer, plain))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    made = len(calls)
    trainer.sample(PROMPTS[::-1])
    trainer.sample(PROMPTS[-1:])  # alone, as a string
    assert len(calls) == made
    assert trainer.encoded_prompts.num_bytes > 0


def test_all_prompts_are_encoded_where_samples_are_made_one_by_one(tmp_path):
    """The denoiser ends a call at its first sample; the prompts of the others of a batch were encoded later, one at a time."""
    arguments = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "pipeline_kwargs": {"strength": 1.0},
    }
    conditions = [random_image(index, 16, 16) for index in range(len(PROMPTS))]
    data = [{"prompt": prompt, "condition": image} for prompt, image in zip(PROMPTS, conditions, strict=True)]
    trainer = make_trainer(tmp_path, tiny_img2img(), precompute_prompts=True, train_dataset=data, **arguments)
    calls = count_calls(trainer.pipeline)
    trainer.encode_prompts(PROMPTS, conditions[0])
    known = len(calls)
    assert known >= len(PROMPTS)
    trainer.train()
    trainer.sample(PROMPTS, conditions=conditions)
    assert len(calls) == known


def test_ways_of_batches_are_learned_and_checked():
    """Padding with a mask or without, lists, what all prompts share, another dimension; what fits none is refused."""
    short, long = torch.randn(1, 2, 3), torch.randn(1, 4, 3)
    padded = torch.zeros(2, 4, 3)
    padded[0, :2], padded[1] = short, long
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    ids = torch.zeros(4, 3)
    alone = [(short, None, ids, [short[0]], 7), (long, None, ids, [long[0]], 7)]
    together = (padded, mask, ids, [short[0], long[0]], 7)
    way = learn_to_join(alone, together)
    joined = join(alone, way)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(joined[:3], together[:3], strict=True))
    assert join([alone[0], alone[0]], way)[1] is None  # nothing is padded
    layers = [torch.randn(2, 1, 4), torch.randn(2, 1, 4)]
    assert torch.equal(join(layers, learn_to_join(layers, torch.cat(layers, 1))), torch.cat(layers, 1))
    with pytest.raises(NotJoinedError, match="not seen yet"):
        join([short, long], learn_to_join([short, short], torch.cat([short, short])))
    with pytest.raises(NotJoinedError, match="became one of the shape"):
        learn_to_join([short, long], padded.flip(1))


def test_pipelines_whose_prompts_cannot_be_kept_are_refused(tmp_path):
    """No text encoder, batches that pad on the left, prompts that come with an image, encoders that are needed elsewhere."""
    without = tiny_sd()
    without.text_encoder = None
    with pytest.raises(ValueError, match="has no component `text_encoder`, and encodes"):
        make_trainer(tmp_path, without, precompute_prompts=True)

    class PadsLeft(diffusers.QwenImagePipeline):
        def encode_prompt(self, **kwargs):
            embeds, mask = super().encode_prompt(**kwargs)
            return embeds.flip(1), mask if mask is None else mask.flip(1)

    SIZES["PadsLeft"] = SIZES["QwenImagePipeline"]
    pipeline = PadsLeft(**tiny_qwen().components)
    with pytest.raises(ValueError, match="`PadsLeft` makes of several prompts at once cannot be put together"):
        make_trainer(tmp_path, pipeline, precompute_prompts=True).train()
    pipeline = PadsLeft(**tiny_qwen().components)
    one_by_one = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
    make_trainer(tmp_path, pipeline, precompute_prompts=True, **one_by_one).train()

    class NeedsEncoder(diffusers.StableDiffusionPipeline):
        def encode_prompt(self, *args, **kwargs):
            return super().encode_prompt(*args, **kwargs)

        def __call__(self, *args, **kwargs):
            self.text_encoder.config  # noqa: B018
            return super().__call__(*args, **kwargs)

    SIZES["NeedsEncoder"] = SIZES["StableDiffusionPipeline"]
    for option in ("precompute_prompts", "offload"):
        pipeline = NeedsEncoder(**tiny_sd().components, requires_safety_checker=False)
        with pytest.raises(ValueError, match=f"`{option}` is True, but .* needs its text encoders outside of"):
            make_trainer(tmp_path, pipeline, **{option: True}).train()
    encoded = EncodedPrompts(tiny_sd(), torch.device("cpu"))
    with (
        encoded.in_use(),
        pytest.raises(ValueError, match="together with `prompt_embeds` of type `Tensor`"),
    ):
        encoded.pipeline.encode_prompt(None, "cpu", 1, False, prompt_embeds=torch.zeros(1, 8, 8))
