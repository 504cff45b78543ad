"""
Pipelines in which a language model writes before the first step: prompts (ERNIE-Image, LongCat-Image), or tokens of the image
(GLM-Image). It goes on with all prompts of a batch by one seed, or by the state of the process.
"""

import diffusers
import pytest
import torch
import transformers
from tiny_pipelines import flux2_vae, ready, reward
from tokenizers import pre_tokenizers

from rewarddance_hf.alignment.gradient import RewardGradientCallback
from rewarddance_hf.alignment.pipelines.prompts import differs_in_batches
from rewarddance_hf.alignment.refl.drawing import draw
from rewarddance_hf.alignment.refl.references import best_of_n_references
from rewarddance_hf.alignment.search.replay import replay
from rewarddance_hf.alignment.search.search import best_of_n


TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}{% endfor %}"
)
TEXT = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
STEPS = 2


def tokenizer(length: int = 4, **named: str):
    """Of bytes; what it writes ends after `length` of them."""
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>", *named.values()]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    backend = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=[]).backend_tokenizer
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|endoftext|>", padding_side="left", model_max_length=length, **named
    )
    made.chat_template = TEMPLATE
    return made


def image_vae(latent_channels: int = 4, **config):
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return diffusers.AutoencoderKL(
        block_out_channels=(4,) * 4,
        norm_num_groups=2,
        layers_per_block=1,
        latent_channels=latent_channels,
        **blocks,
        **config,
    )


def ernie_image():
    """A language model writes each prompt anew, by the state of the process."""
    vae = flux2_vae()
    transformer = diffusers.ErnieImageTransformer2DModel(
        hidden_size=16, num_attention_heads=1, num_layers=1, ffn_hidden_size=16, in_channels=16, out_channels=16,
        text_in_dim=16, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    pipeline = diffusers.ErnieImagePipeline(
        transformer=transformer,
        vae=vae,
        text_encoder=transformers.MistralModel(transformers.MistralConfig(**TEXT)),
        tokenizer=tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        pe=transformers.MistralForCausalLM(transformers.MistralConfig(**TEXT)),
        pe_tokenizer=tokenizer(),
    )
    return pipeline, {"height": 16, "width": 16}


def longcat_image():
    """A language model writes all prompts anew at once, by the state of the process."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 16}
    encoder = transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(text_config=TEXT | {"rope_parameters": rope}, vision_config=vision)
    )
    encoder.generation_config.do_sample = True
    transformer = diffusers.LongCatImageTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=1,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=[4, 6, 6],
    )  # fmt: skip
    texts = tokenizer()
    pipeline = diffusers.LongCatImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=image_vae(latent_channels=16, scaling_factor=1.0, shift_factor=0.0),
        text_encoder=encoder,
        tokenizer=texts,
        text_processor=texts,
        transformer=transformer,
    )
    pipeline.tokenizer_max_length = 4
    return pipeline, {"height": 16, "width": 16}


def glm_image():
    """A language model writes tokens of all images of a batch by the first seed."""
    config = transformers.GlmImageConfig(
        text_config=TEXT
        | {
            "max_position_embeddings": 512,
            "vision_vocab_size": 128,
            "pad_token_id": 0,
            "rope_parameters": {"mrope_section": (2, 1, 1)},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "num_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "intermediate_size": 16,
        },
        vq_config={"embed_dim": 16, "num_embeddings": 128, "latent_channels": 16},
    )
    named = {
        "image_token": "<|image|>",
        "grid_bos_token": "<sop>",
        "grid_eos_token": "<eop>",
        "bos_token": "<|dit_token_16384|>",
    }
    images = transformers.GlmImageImageProcessorPil(patch_size=8, merge_size=1, min_pixels=32 * 32, max_pixels=64 * 64)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), ("a", -3.0), ("b", -3.0)]
    encoder = transformers.T5Config(vocab_size=8, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformer = diffusers.GlmImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        text_embed_dim=16, time_embed_dim=16, condition_dim=8, prior_vq_quantizer_codebook_size=128,
    )  # fmt: skip
    pipeline = diffusers.GlmImagePipeline(
        tokenizer=transformers.T5Tokenizer(vocab=pieces, extra_ids=0),
        processor=transformers.GlmImageProcessor(images, tokenizer(64, **named), chat_template=TEMPLATE),
        text_encoder=transformers.T5EncoderModel(encoder),
        vision_language_encoder=transformers.GlmImageForConditionalGeneration(config),
        vae=image_vae(latents_mean=[0.0] * 4, latents_std=[1.0] * 4),
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )
    return pipeline, {"height": 32, "width": 32, "max_sequence_length": 16, "guidance_scale": 1.5}


def built(make):
    torch.manual_seed(0)
    pipeline, settings = make()
    if not hasattr(pipeline, "image_processor"):
        pytest.skip(f"`{type(pipeline).__name__}` makes arrays of all images in this version of diffusers")
    for model in (pipeline.transformer, *(part for part in pipeline.components.values() if hasattr(part, "generate"))):
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(0, 0.5)
    return ready(pipeline), {"num_inference_steps": STEPS, "output_type": "pt", **settings}


def plain(pipeline, prompt, seed, settings):
    torch.manual_seed(seed)
    return pipeline(prompt, generator=torch.Generator().manual_seed(seed), **settings).images[0]


@pytest.mark.parametrize("make", [ernie_image, longcat_image, glm_image])
def test_samples_are_those_of_their_seeds(make):
    """Whatever the batch and the state of the process, which a call leaves as it was."""
    pipeline, settings = built(make)
    expected = [plain(pipeline, "a b", seed, settings) for seed in (5, 6)]
    assert not torch.equal(*expected)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert differs_in_batches(pipeline, settings, ["a b", "a b"])
    for seed, image in zip((5, 6), expected, strict=True):
        assert torch.equal(draw(pipeline, ["a b"], [seed], **settings)[0][0], image)
    assert torch.equal(torch.get_rng_state(), state)
    rows = best_of_n_references(
        pipeline, None, ["a b", "c"], method="random", num_candidates=2, top_k=2, show_progress=False,
        batch_size=2, **{name: value for name, value in settings.items() if name != "output_type"},
    )  # fmt: skip
    assert len(rows) == 2


@pytest.mark.parametrize("make", [glm_image, pytest.param(longcat_image, marks=pytest.mark.slow)])
def test_search_makes_each_candidate_alone(make):
    pipeline, settings = built(make)
    result = best_of_n(pipeline, "a b", reward, num_candidates=2, num_images=2, preview_step=1, num_kept=2, **settings)
    for place in range(2):
        image = plain(pipeline, "a b", result.lineage(place)[0].seed, settings)
        torch.testing.assert_close(result.images[place], image, rtol=0, atol=0)
    again = replay(pipeline, "a b", result.lineage(), **settings)
    torch.testing.assert_close(again, result.images[0], rtol=0, atol=0)


def test_step_end_callback_of_a_pipeline_that_tells_no_number_of_steps():
    """ERNIE-Image calls step-end callbacks, but has no `num_timesteps`, which was read."""
    pipeline, settings = built(ernie_image)
    pipeline.transformer.requires_grad_(True)
    settings |= {"use_pe": False}
    callback = RewardGradientCallback("draft")
    passed = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": callback.tensor_inputs}
    images = pipeline("a", generator=torch.Generator().manual_seed(0), **passed, **settings).images
    assert images.requires_grad
    torch.testing.assert_close(images[0].detach(), plain(pipeline, "a", 0, settings), rtol=0, atol=2e-6)


def test_nothing_is_written_where_the_pipeline_is_told_so():
    for make, setting in ((ernie_image, {"use_pe": False}), (longcat_image, {"enable_prompt_rewrite": False})):
        pipeline, _ = built(make)
        assert not differs_in_batches(pipeline, setting, ["a", "b"])
        assert not differs_in_batches(pipeline, {"prompt_embeds": torch.zeros(2, 4, 16)}, ["a", "b"])
    pipeline.pe = None
    assert not differs_in_batches(pipeline, {"enable_prompt_rewrite": False}, ["a"])
