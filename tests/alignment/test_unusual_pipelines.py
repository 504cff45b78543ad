"""Pipelines that read or step their scheduler in ways of their own, or give tensors that are not in [0, 1]."""

import diffusers
import pytest
import torch
from tiny_pipelines import noise, reward

from rewarddance_hf.alignment.gradient import RewardGradientCallback
from rewarddance_hf.alignment.pipelines.models import clone_inputs, save_copies
from rewarddance_hf.alignment.pipelines.output import check_count, scaled
from rewarddance_hf.alignment.search.search import best_of_n, search_over_paths


STEPS = 4


def judge(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return reward(torch.as_tensor(images))


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


def ready(pipeline):
    for model in pipeline.components.values():
        if isinstance(model, torch.nn.Module):
            model.eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


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
    result = best_of_n(pipeline, "a", judge, **arguments)
    plain = pipeline(**SETTINGS, **inputs, generator=[torch.Generator().manual_seed(result.lineage()[0].seed)]).frames
    torch.testing.assert_close(result.images[0], plain[0], rtol=0, atol=0)


def test_a_pipeline_that_makes_each_step_twice():
    pipeline, inputs = cosmos_1()
    arguments = SETTINGS | inputs
    result = best_of_n(pipeline, "a", judge, max_denoiser_evaluations=2 * STEPS, **arguments)
    assert result.denoiser_evaluations == 2 * STEPS
    assert len({node.seed for node in result.nodes}) == 2
    with pytest.raises(NotImplementedError, match="Use `best_of_n` without `preview_step`"):
        search_over_paths(pipeline, "a", judge, num_paths=1, num_branches=2, **arguments, guidance_scale=1.0)
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
    with pytest.raises(ValueError, match="`KandinskyV22Pipeline` made 1 samples of 2 prompts"):
        check_count(pipeline, images, 2)
