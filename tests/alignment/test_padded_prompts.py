"""
CogView 4 pads prompts to the longest of a batch without a mask, and Kandinsky 3 takes the mean over what it has padded, so that a
prompt's sample would depend on those beside it.
"""

import diffusers
import pytest
import torch
import transformers
from tiny_pipelines import image_vae, ready, reward
from tiny_refl import SIZES, WORDS, make_trainer, tokenizer, trained_weights

from rewarddance_hf.alignment.search.search import best_of_n


SIZE = {"height": 16, "width": 16, "negative_prompt": "a blue square"}
SIZES["CogView4Pipeline"] = SIZE
STEPS, GUIDANCE = 2, 3.0
# It pads to a multiple of 16 tokens on the left, too: these have 3 and 19.
SHORT, LONG = "a red circle", " and ".join(["a red square"] * 5)


def cogview4() -> diffusers.CogView4Pipeline:
    torch.manual_seed(0)
    transformer = diffusers.CogView4Transformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        text_embed_dim=16, time_embed_dim=8, condition_dim=4, pos_embed_max_size=8, sample_size=8,
    )  # fmt: skip
    encoder = transformers.GlmConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    words = tokenizer()
    words.padding_side, words.model_max_length = "left", 1024
    pipeline = diffusers.CogView4Pipeline(
        tokenizer=words,
        text_encoder=transformers.GlmModel(encoder),
        vae=image_vae(),
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )
    with torch.no_grad():
        for model in (transformer, pipeline.text_encoder):
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.3)
    return ready(pipeline)


def kandinsky3() -> diffusers.Kandinsky3Pipeline:
    torch.manual_seed(0)
    unet = diffusers.Kandinsky3UNet(
        in_channels=4, time_embedding_dim=4, groups=2, attention_head_dim=4, layers_per_block=3,
        block_out_channels=(32, 64), cross_attention_dim=4, encoder_hid_dim=16,
    )  # fmt: skip
    movq = diffusers.VQModel(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), latent_channels=4,
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"), norm_num_groups=8, norm_type="spatial",
        num_vq_embeddings=12, vq_embed_dim=4,
    )  # fmt: skip
    encoder = transformers.T5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    pipeline = diffusers.Kandinsky3Pipeline(
        tokenizer=tokenizer(),
        text_encoder=transformers.T5EncoderModel(encoder),
        unet=unet,
        scheduler=diffusers.DDPMScheduler(),
        movq=movq,
    )
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    return ready(pipeline)


def plain(pipeline, prompt, seed):
    seed = torch.Generator().manual_seed(seed)
    settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "pt", **SIZE}
    image = pipeline(prompt, generator=seed, **settings).images[0]
    in_minus_one_to_one = isinstance(pipeline, diffusers.Kandinsky3Pipeline)  # its tensors
    return (image / 2 + 0.5).clamp(0, 1) if in_minus_one_to_one else image


def gap(ours, theirs):
    return (ours - theirs).abs().max().item()


def test_the_pipeline_itself_makes_others_of_a_batch():
    """Else the tests below would show nothing."""
    pipeline = cogview4()
    seeds = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    both = pipeline(
        [SHORT, LONG], generator=seeds, num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="pt",
        **SIZE | {"negative_prompt": [SIZE["negative_prompt"]] * 2},
    ).images  # fmt: skip
    assert gap(both[0], plain(pipeline, SHORT, 5)) > 1e-2
    assert gap(both[1], plain(pipeline, LONG, 6)) < 1e-5


@pytest.mark.parametrize("precompute_prompts", [False, True])
def test_samples_of_the_trainer_are_those_of_each_prompt_alone(precompute_prompts, tmp_path):
    pipeline = cogview4()
    expected = [plain(pipeline, prompt, seed) for prompt, seed in zip((SHORT, LONG), (5, 6), strict=True)]
    arguments = {"precompute_prompts": precompute_prompts, "num_inference_steps": STEPS}
    trainer = make_trainer(tmp_path, pipeline, per_device_eval_batch_size=2, **arguments)
    samples = trainer.sample([SHORT, LONG], seeds=[5, 6], output_type="pt")
    for sample, image in zip(samples, expected, strict=True):
        torch.testing.assert_close(sample, image, rtol=0, atol=1e-6)


def test_updates_do_not_depend_on_the_prompts_beside(tmp_path):
    """One update of both prompts is one of each, accumulated."""
    settings = {"max_steps": 1, "optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 10.0}
    settings |= {
        "num_inference_steps": STEPS,
        "step_ratio_range": [0.5, 1.0],
        "train_dataset": [{"prompt": SHORT}, {"prompt": LONG}],
    }
    together, apart = (
        make_trainer(
            tmp_path, cogview4(), per_device_train_batch_size=size, gradient_accumulation_steps=2 // size, **settings
        )
        for size in (2, 1)
    )
    start = trained_weights(together)
    for trainer in (together, apart):
        trainer.train()
    ours, theirs = trained_weights(together), trained_weights(apart)
    assert any(not torch.equal(start[name], weight) for name, weight in ours.items())
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [cogview4, kandinsky3])
def test_candidates_of_a_search_over_two_prompts(make):
    pipeline = make()
    settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "pt", **SIZE}
    for prompt, result in zip(
        (SHORT, LONG),
        best_of_n(pipeline, [SHORT, LONG], reward, num_candidates=2, num_images=2, batch_size=4, **settings),
        strict=True,
    ):
        for place in range(2):
            expected = plain(pipeline, prompt, result.lineage(place)[0].seed)
            torch.testing.assert_close(result.images[place], expected, rtol=0, atol=1e-6)
