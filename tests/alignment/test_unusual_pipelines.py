"""Pipelines that read or step their scheduler in ways of their own, or give tensors that are not in [0, 1]."""

import inspect

import diffusers
import pytest
import torch
import transformers
from PIL import Image
from tiny_pipelines import BUILDERS, flux2, image_vae, noise, ready, relative_difference, reward, stable_diffusion, wan
from tiny_refl import WORDS, tokenizer

from rewarddance_hf.alignment.gradient import RewardGradientCallback
from rewarddance_hf.alignment.pipelines.hooks import Hooks
from rewarddance_hf.alignment.pipelines.models import checkpoint_as_called, clone_inputs, save_copies
from rewarddance_hf.alignment.pipelines.output import check_count, scaled
from rewarddance_hf.alignment.refl.references import best_of_n_references
from rewarddance_hf.alignment.search.search import best_of_n, search_over_paths


STEPS = 4


def cosmos_transformer(in_channels: int, out_channels: int) -> diffusers.CosmosTransformer3DModel:
    return diffusers.CosmosTransformer3DModel(
        in_channels=in_channels,
        out_channels=out_channels,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        mlp_ratio=2,
        text_embed_dim=8,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        patch_size=(1, 2, 2),
        rope_scale=(2.0, 1.0, 1.0),
        concat_padding_mask=False,
        extra_pos_embed_type="learnable",
    )


class NoGuard(diffusers.ModelMixin, diffusers.ConfigMixin):
    """In place of a safety checker of gigabytes."""

    def __init__(self):
        super().__init__()
        self._dtype = torch.nn.Parameter(torch.zeros(1))

    def check_text_safety(self, prompt):
        return True

    def check_video_safety(self, frames):
        return frames


def cosmos_2_5():
    """Reads `scheduler.sigmas[i]` of a UniPC scheduler."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    pipeline = diffusers.Cosmos2_5_PredictBasePipeline(
        None, None, cosmos_transformer(17, 16), vae, diffusers.UniPCMultistepScheduler(), safety_checker=NoGuard()
    )
    return ready(pipeline), {"num_frames": 1}


def cosmos_1():
    """Makes each step of its scheduler twice."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLCosmos(
        latent_channels=4,
        encoder_block_out_channels=(4, 4, 4, 4),
        decode_block_out_channels=(4, 4, 4, 4),
        num_layers=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )
    scheduler = diffusers.EDMEulerScheduler(
        sigma_min=0.002, sigma_max=80, sigma_data=0.5, sigma_schedule="karras", final_sigmas_type="sigma_min"
    )
    pipeline = diffusers.CosmosTextToWorldPipeline(
        None, None, cosmos_transformer(4, 4), vae, scheduler, safety_checker=NoGuard()
    )
    return ready(pipeline), {"num_frames": 1}


EMBEDDINGS = {"prompt_embeds": noise(1, 1, 7, 8), "negative_prompt_embeds": noise(2, 1, 7, 8)}
SETTINGS = {"height": 32, "width": 32, "num_inference_steps": STEPS, "output_type": "pt", **EMBEDDINGS}


def test_parts_of_a_pipeline_that_reads_noise_levels():
    pipeline, inputs = cosmos_2_5()
    arguments = {"num_candidates": 2, "preview_step": 2, "batch_size": 1, **SETTINGS, **inputs}
    result = best_of_n(pipeline, "a", reward, **arguments)
    plain = pipeline(**SETTINGS, **inputs, generator=[torch.Generator().manual_seed(result.lineage()[0].seed)]).frames
    torch.testing.assert_close(result.images[0], plain[0], rtol=0, atol=0)


def test_a_pipeline_that_makes_each_step_twice():
    pipeline, inputs = cosmos_1()
    arguments = SETTINGS | inputs
    result = best_of_n(pipeline, "a", reward, max_denoiser_evaluations=2 * STEPS, **arguments)
    assert result.denoiser_evaluations == 2 * STEPS
    assert len({node.seed for node in result.nodes}) == 2
    with pytest.raises(NotImplementedError, match="Use `best_of_n` without `preview_step`"):
        search_over_paths(pipeline, "a", reward, num_paths=1, num_branches=2, **arguments, guidance_scale=1.0)
    pipeline.transformer.requires_grad_(True)
    callback = RewardGradientCallback(method="refl")
    with pytest.raises(NotImplementedError, match="calls `scheduler.step` several times"), callback.attach(pipeline):
        pipeline(**arguments)


def test_what_gradient_needs_may_be_written_into():
    """Kandinsky 5 writes each step into the latents that its denoiser got, and its first frames into those of the last step."""
    layer, latents = torch.nn.Linear(3, 3), noise(0, 2, 3)
    before = latents.clone()
    layer.register_forward_pre_hook(clone_inputs, with_kwargs=True)
    output = layer(latents)
    latents[:, 1:] = output[:, 1:]

    def normalized(latents):
        samples = latents.clone()
        samples[:, :1] = samples[:, :1] * samples[:, 1:].std()
        return samples

    gradient = torch.autograd.grad(save_copies(None, normalized, latents).sum(), layer.weight)[0]
    whole = before @ layer.weight.T + layer.bias
    first, rest = before[:, :1], whole[:, 1:]
    expected = torch.autograd.grad((first * rest.std()).sum() + rest.sum(), layer.weight)[0]
    torch.testing.assert_close(gradient, expected)


def test_tensors_of_kandinsky_are_scaled():
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        in_channels=4,
        out_channels=8,
        addition_embed_type="image",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(8, 16),
        layers_per_block=1,
        encoder_hid_dim=8,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=8,
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
        class_embed_type=None,
        norm_num_groups=4,
    )
    movq = diffusers.VQModel(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        num_vq_embeddings=8,
        vq_embed_dim=4,
        norm_type="spatial",
        norm_num_groups=8,
    )
    pipeline = ready(diffusers.KandinskyV22Pipeline(unet, diffusers.DDIMScheduler(), movq))
    inputs = {"image_embeds": noise(1, 1, 8), "negative_image_embeds": noise(2, 1, 8), "height": 16, "width": 16}
    images, arrays = (
        pipeline(**inputs, num_inference_steps=2, output_type=kind, generator=torch.Generator().manual_seed(0)).images
        for kind in ("pt", "np")
    )
    assert images.min() < 0
    torch.testing.assert_close(scaled(pipeline, images), torch.from_numpy(arrays).movedim(-1, -3))
    unet.requires_grad_(True)
    with (
        pytest.raises(ValueError, match='made arrays of its images, but only tensors .*`output_type="pt"`'),
        RewardGradientCallback(method="draft").attach(pipeline),
    ):
        pipeline(**inputs, output_type="pil")
    with (
        pytest.raises(RuntimeError, match="numpy") as error,  # of somebody else, which is none of our business
        RewardGradientCallback(method="draft").attach(pipeline),
    ):
        pipeline(**inputs, output_type="pt").images.numpy()
    assert type(error.value) is RuntimeError
    with pytest.raises(ValueError, match="`KandinskyV22Pipeline` made 1 samples of 2 prompts"):
        check_count(pipeline, images, 2)


def flux2_with_reference():
    torch.manual_seed(0)
    parts, inputs = flux2()
    pipeline = ready(diffusers.Flux2KleinKVPipeline(**parts.components))
    for parameter in pipeline.transformer.parameters():
        if not parameter.abs().max() > 1e-6:
            parameter.data.normal_(0, 0.1)
    pipeline.transformer.requires_grad_(True)
    image = Image.effect_noise((64, 64), 60).convert("RGB")
    settings = {"prompt_embeds": inputs["prompt_embeds"][:1], "image": image, "height": 8, "width": 8}
    return pipeline, settings | {"num_inference_steps": 2, "output_type": "pt"}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_of_keys_that_the_first_step_keeps(checkpointing):
    """
    Flux 2 Klein KV reads keys and values of its reference image from a cache; their part of the gradient was missing, and
    gradient checkpointing read them again when the pipeline had cleared the cache.
    """
    pipeline, inputs = flux2_with_reference()
    if checkpointing:
        pipeline.transformer.enable_gradient_checkpointing()
    parameters = list(pipeline.transformer.parameters())
    callback = RewardGradientCallback(method="draft")
    with callback.attach(pipeline):
        images = pipeline(**inputs, generator=torch.Generator().manual_seed(0)).images
    assert pipeline.transformer.is_gradient_checkpointing == checkpointing
    assert not torch.is_grad_enabled() or images.requires_grad
    ours = torch.autograd.grad(reward(images).mean(), parameters, allow_unused=True)
    pipeline.transformer.disable_gradient_checkpointing()
    step, indices = pipeline.scheduler.step, []

    def cut(model_output, timestep, sample, **kwargs):
        indices.append(len(indices))
        if indices[-1] == 0:
            model_output, sample = model_output.detach(), sample.detach()
        return step(model_output, timestep, sample, **kwargs)

    pipeline.scheduler.step = cut
    whole = inspect.unwrap(type(pipeline).__call__)
    images = whole(pipeline, **inputs, generator=torch.Generator().manual_seed(0)).images
    theirs = torch.autograd.grad(reward(images).mean(), parameters, allow_unused=True)
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if b is not None]
    assert relative_difference(*map(list, zip(*pairs, strict=True))) < 1e-5


def chroma():
    torch.manual_seed(0)
    encoder = transformers.T5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 4, 8), approximator_num_channels=16, approximator_hidden_dim=16,
        approximator_layers=1,
    )  # fmt: skip
    pipeline = diffusers.ChromaPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=image_vae(),
        text_encoder=transformers.T5EncoderModel(encoder),
        tokenizer=tokenizer(),
        transformer=transformer,
    )
    inputs = {"prompt": "a red circle", "negative_prompt": "a blue square", "max_sequence_length": 16}
    return pipeline, {**inputs, "height": 16, "width": 16}


def check_checkpointing(pipeline, model, settings):
    """Images are those of the pipeline alone with and without gradient checkpointing, and gradients agree."""

    def draw():
        return pipeline(**settings, output_type="pt", generator=torch.Generator().manual_seed(0)).images

    model.requires_grad_(True)
    with torch.no_grad():
        plain = draw()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        with RewardGradientCallback(method="draft").attach(pipeline):
            images = draw()
        torch.testing.assert_close(images.detach(), plain, rtol=0, atol=1e-5)
        found = torch.autograd.grad(reward(images).mean(), list(model.parameters()), allow_unused=True)
        gradients.append([gradient for gradient in found if gradient is not None])
    assert relative_difference(*gradients) < 1e-5


def test_checkpointing_passes_the_mask_of_chroma():
    """Checkpointing of diffusers leaves it out of some blocks, so that images and gradients were others."""
    pipeline, inputs = chroma()
    ready(pipeline)
    check_checkpointing(pipeline, pipeline.transformer, {**inputs, "num_inference_steps": 2, "guidance_scale": 3.0})


@pytest.mark.skipif(not hasattr(diffusers, "HunyuanImageTransformer2DModel"), reason="needs HunyuanImage")
def test_checkpointing_of_blocks_that_are_given_arguments_by_name():
    """HunyuanImage passes its mask by name, which the checkpointing of diffusers does not take: it could not be tuned by default."""
    torch.manual_seed(0)
    model = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=(1, 1), text_embed_dim=32, rope_axes_dim=(4, 4),
    ).eval()  # fmt: skip
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    inputs = {"encoder_hidden_states": noise(1, 1, 5, 32), "encoder_attention_mask": mask, "timestep": torch.ones(1)}
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        with Hooks(model) as hooks:
            checkpoint_as_called(model, hooks)
            output = model(noise(2, 1, 4, 4, 4), **inputs).sample
        gradients.append(torch.autograd.grad(output.pow(2).sum(), list(model.parameters()), allow_unused=True))
    assert any(gradient is not None and gradient.any() for gradient in gradients[0])
    for first, second in zip(*gradients, strict=True):
        assert (first is None) == (second is None)
        if first is not None:
            torch.testing.assert_close(first, second)


def test_checkpointing_computes_again_with_the_processors_of_the_call():
    """Perturbed attention guidance gives the denoiser other attention processors for its call, and takes them back before the end."""
    parts, inputs = stable_diffusion()
    components = {**parts.components, "requires_safety_checker": False}
    pipeline = ready(diffusers.StableDiffusionPAGPipeline(**components, pag_applied_layers=["mid", "down"]))
    settings = {**inputs, "num_inference_steps": 2, "guidance_scale": 2.0, "pag_scale": 3.0}
    check_checkpointing(pipeline, pipeline.unet, settings)


def test_a_callback_comes_too_late_for_keys_of_the_first_step():
    pipeline, inputs = flux2_with_reference()
    callback = RewardGradientCallback(method="draft")
    with pytest.raises(NotImplementedError, match=r"Use `with callback.attach\(pipeline\):`"):
        pipeline(**inputs, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=callback.tensor_inputs)
    del inputs["image"]
    images = pipeline(
        **inputs, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=callback.tensor_inputs
    ).images
    assert images.requires_grad


def test_several_images_of_one_prompt():
    """`image` of Flux 2 is a list of references of one prompt, and was taken for one image of each prompt."""
    pipeline, inputs = flux2_with_reference()
    images = [inputs.pop("image"), Image.effect_noise((64, 64), 20).convert("RGB")]
    result = best_of_n(pipeline, "a", reward, num_candidates=2, image=images, **inputs)
    generator = torch.Generator().manual_seed(result.lineage()[0].seed)
    plain = pipeline(**inputs, image=images, generator=generator).images[0]
    torch.testing.assert_close(result.images[0], plain, rtol=0, atol=0)
    inputs["prompt_embeds"] = noise(1, 2, 7, 16)
    two = best_of_n(pipeline, ["a", "b"], reward, num_candidates=1, image=[images, images[:1]], **inputs)
    generator = torch.Generator().manual_seed(two[1].lineage()[0].seed)
    inputs["prompt_embeds"] = inputs["prompt_embeds"][1:]
    plain = pipeline(**inputs, image=images[0], generator=generator).images[0]
    torch.testing.assert_close(two[1].images[0], plain, rtol=0, atol=0)


def test_outputs_of_earlier_steps_are_not_used_again():
    """A denoiser with `enable_cache` leaves out blocks, whose gradient would be missing."""
    pipeline, inputs = BUILDERS["Flux"]()
    ready(pipeline)
    pipeline.transformer.requires_grad_(True)
    pipeline.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.2))
    inputs = {name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    with (
        pytest.raises(ValueError, match=r"Call `pipeline.transformer.disable_cache\(\)`"),
        RewardGradientCallback().attach(pipeline),
    ):
        pipeline(**inputs, num_inference_steps=STEPS, output_type="pt")
    with pytest.raises(ValueError, match="but a search that stops in between requires"):
        search_over_paths(pipeline, "a", reward, num_branches=1, num_inference_steps=STEPS, **inputs)
    pipeline.transformer.disable_cache()
    search_over_paths(pipeline, "a", reward, num_paths=1, num_branches=1, num_inference_steps=STEPS, **inputs)


def wan_vace():
    """Takes one prompt, as a string."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    transformer = diffusers.WanVACETransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=32, freq_dim=16, ffn_dim=16, num_layers=1,
        cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32, vace_layers=[0], vace_in_channels=96,
    )  # fmt: skip
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), ("a", -3.0), ("b", -3.0)]
    encoder = transformers.UMT5Config(vocab_size=8, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    pipeline = diffusers.WanVACEPipeline(
        tokenizer=transformers.T5Tokenizer(vocab=pieces, extra_ids=0),
        text_encoder=transformers.UMT5EncoderModel(encoder),
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        transformer=transformer,
    )
    settings = {"height": 16, "width": 16, "num_frames": 1, "num_inference_steps": 2, "max_sequence_length": 4}
    return ready(pipeline), settings | {"negative_prompt": "b"}


def test_pipelines_that_take_one_prompt():
    pipeline, settings = wan_vace()
    result = best_of_n(pipeline, "a", reward, num_candidates=2, batch_size=1, output_type="pt", **settings)
    seed = torch.Generator().manual_seed(result.lineage()[0].seed)
    plain = pipeline("a", **settings, generator=seed, output_type="pt").frames[0]
    torch.testing.assert_close(result.images[0], plain, rtol=0, atol=0)
    references = best_of_n_references(
        pipeline, None, ["a", "b"], method="random", num_candidates=1, top_k=1, show_progress=False, **settings
    )
    assert len(references) == 2
    with pytest.raises(ValueError, match="was given 2 prompts and says: .* set the batch size to 1"):
        best_of_n(pipeline, "a", reward, num_candidates=2, **settings)


@pytest.mark.skipif(not hasattr(diffusers, "AnyFlowFARPipeline"), reason="needs a diffusers version with AnyFlow")
def test_budget_of_a_pipeline_without_progress_bar():
    """AnyFlow makes a clip chunk by chunk. To learn its number of steps took an evaluation, and found those of one chunk."""
    parts, inputs = wan()
    transformer = diffusers.AnyFlowFARTransformer3DModel(
        patch_size=(1, 2, 2), compressed_patch_size=(1, 4, 4), full_chunk_limit=3, num_attention_heads=2,
        attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=32, ffn_dim=16, num_layers=1,
        cross_attn_norm=True, rope_max_seq_len=32, gate_value=0.25, deltatime_type="r", chunk_partition=(1, 1, 1),
    )  # fmt: skip
    scheduler = diffusers.FlowMapEulerDiscreteScheduler(shift=5.0)
    pipeline = ready(diffusers.AnyFlowFARPipeline(None, None, transformer, parts.vae, scheduler))
    inputs = {name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    inputs |= {"num_frames": 9, "num_inference_steps": 2}
    calls = []

    def count(_, args, kwargs):
        calls.append(len(kwargs["hidden_states"]))

    hook = transformer.register_forward_pre_hook(count, with_kwargs=True)
    pipeline(**inputs, output_type="pt", generator=torch.Generator().manual_seed(0))
    alone, steps = sum(calls), 2 * 3
    calls.clear()
    with pytest.raises(ValueError, match=f"`max_denoiser_evaluations` is {steps - 1}, but one image takes {steps}"):
        best_of_n(pipeline, "a", reward, max_denoiser_evaluations=steps - 1, **inputs)
    assert not calls
    result = best_of_n(pipeline, "a", reward, max_denoiser_evaluations=2 * steps + 1, batch_size=1, **inputs)
    hook.remove()
    assert result.denoiser_evaluations == 2 * steps
    assert result.forward_passes == sum(calls) == 2 * alone


def latte():
    """Cuts padding from the text of a single prompt, and keeps it in a batch."""
    torch.manual_seed(0)
    transformer = diffusers.LatteTransformer3DModel(
        sample_size=4, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2, caption_channels=16,
        in_channels=4, cross_attention_dim=16, out_channels=8, attention_bias=True, num_embeds_ada_norm=1000,
        norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6, activation_fn="gelu-approximate",
    )  # fmt: skip
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), ("a", -3.0), ("b", -3.0)]
    encoder = transformers.T5Config(vocab_size=8, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    pipeline = diffusers.LattePipeline(
        tokenizer=transformers.T5Tokenizer(vocab=pieces, extra_ids=0),
        text_encoder=transformers.T5EncoderModel(encoder),
        vae=diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=2),
        transformer=transformer,
        scheduler=diffusers.DDIMScheduler(),
    )
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.normal_(0, 0.2)
    return ready(pipeline), {
        "height": 8,
        "width": 8,
        "video_length": 1,
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
    }


def test_samples_that_differ_in_batches_are_made_alone():
    pipeline, settings = latte()
    inputs = {**settings, "clean_caption": False, "output_type": "pt"}
    result = best_of_n(pipeline, "a b", reward, num_candidates=3, batch_size=3, num_images=3, **inputs)
    for place in range(3):
        seed = torch.Generator().manual_seed(result.lineage(place)[0].seed)
        plain = pipeline("a b", generator=seed, **inputs).frames[0]
        torch.testing.assert_close(torch.as_tensor(result.images[place]), torch.as_tensor(plain), rtol=0, atol=1e-6)
    calls = []
    pipeline.transformer.register_forward_pre_hook(lambda module, args, kwargs: calls.append(
        len(kwargs.get("hidden_states", args[0] if args else None))), with_kwargs=True)  # fmt: skip
    best_of_n_references(
        pipeline, None, ["a b"], method="random", num_candidates=2, top_k=2, show_progress=False, clean_caption=False,
        **settings,
    )  # fmt: skip
    assert calls == [1] * len(calls)


def marigold():
    """Prepares latents of its input image first, and those that it denoises second."""
    pipeline, _ = stable_diffusion()
    torch.manual_seed(0)
    marigold = diffusers.MarigoldNormalsPipeline(
        unet=diffusers.UNet2DConditionModel.from_config(pipeline.unet.config, in_channels=8),
        vae=pipeline.vae,
        scheduler=diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False),
        text_encoder=None,
        tokenizer=None,
        prediction_type="normals",
        default_denoising_steps=3,
        default_processing_resolution=0,
    )
    marigold.empty_text_embedding = torch.randn(1, 2, pipeline.unet.config.cross_attention_dim)
    return ready(marigold)


def test_pipelines_that_prepare_other_latents():
    """Searches that stop in between would go on with the wrong latents; the gradient is that of finite differences."""
    pipeline = marigold()
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with pytest.raises(NotImplementedError, match="does not denoise what `prepare_latents` gives first"):
        best_of_n(pipeline, "a", reward, num_candidates=2, preview_step=2, image=image, output_type="pt")
    pipeline.unet.requires_grad_(True)

    def run():
        return pipeline(image, output_type="pt", generator=torch.Generator().manual_seed(0)).prediction

    with RewardGradientCallback("draft", num_gradient_steps=3).attach(pipeline):
        value = reward(run()).sum()
    value.backward()
    weights = pipeline.unet.conv_out.weight
    direction = weights.grad / weights.grad.norm()
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            weights += sign * 1e-3 * direction
            values.append(reward(torch.as_tensor(run())).sum())
            weights -= sign * 1e-3 * direction
    torch.testing.assert_close((values[0] - values[1]) / 2e-3, weights.grad.norm(), rtol=2e-2, atol=0)


def controlled(several: bool):
    torch.manual_seed(0)
    pipeline, inputs = stable_diffusion()
    net = {
        "block_out_channels": (4, 8),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "cross_attention_dim": 8,
        "norm_num_groups": 2,
        "attention_head_dim": 2,
        "conditioning_embedding_out_channels": (4, 8),
    }
    nets = [diffusers.ControlNetModel(**net) for _ in range(2)]
    for controlnet in nets:
        for parameter in controlnet.parameters():
            if not parameter.abs().max() > 1e-6:
                parameter.data.normal_(0, 0.1)
    parts = pipeline.components | {"controlnet": nets if several else nets[0]}
    pipeline = ready(diffusers.StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False))
    inputs = {name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    return pipeline, inputs | {"num_inference_steps": 2}


@pytest.mark.parametrize("several", [False, True])
def test_images_of_controlnets(several):
    """Several ControlNets have a list with one image for each, which is not one image for each prompt."""
    pipeline, inputs = controlled(several)
    images = [Image.effect_noise((16, 16), 60 * (i + 1)).convert("RGB") for i in range(2)]
    del inputs["height"], inputs["width"]
    image = images if several else images[0]
    result = best_of_n(pipeline, "a", reward, num_candidates=2, image=image, output_type="pt", **inputs)
    generator = torch.Generator().manual_seed(result.lineage()[0].seed)
    plain = pipeline(**inputs, image=image, generator=generator, output_type="pt").images[0]
    torch.testing.assert_close(result.images[0], plain, rtol=0, atol=1e-5)
    pipeline.unet.requires_grad_(True)
    with RewardGradientCallback(method="draft").attach(pipeline):
        plain = pipeline(**inputs, image=image, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert any(gradient.any() for gradient in torch.autograd.grad(plain.sum(), list(pipeline.unet.parameters())))


def test_arrays_of_t2i_adapters_are_refused():
    torch.manual_seed(0)
    pipeline, inputs = stable_diffusion()
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    unet = diffusers.UNet2DConditionModel.from_config(pipeline.unet.config | blocks)
    adapter = diffusers.T2IAdapter(
        in_channels=3, channels=[4, 8], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter"
    )
    parts = pipeline.components | {"adapter": adapter, "unet": unet}
    parts.pop("image_encoder")
    pipeline = ready(diffusers.StableDiffusionAdapterPipeline(**parts, requires_safety_checker=False))
    pipeline.unet.requires_grad_(True)
    inputs = {name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    inputs |= {"image": Image.effect_noise((16, 16), 60).convert("RGB"), "num_inference_steps": 2}
    with (
        pytest.raises(NotImplementedError, match="`StableDiffusionAdapterPipeline` makes arrays of its images"),
        RewardGradientCallback(method="draft").attach(pipeline),
    ):
        pipeline(**inputs, output_type="pt")
    result = best_of_n(pipeline, "a", reward, num_candidates=2, **inputs)
    assert result.denoiser_evaluations == 4
