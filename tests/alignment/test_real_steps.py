"""Pipelines that make fewer steps than their schedule has: steps are counted as they are made, by gradient and search alike."""

import diffusers
import pytest
import torch
from tiny_pipelines import kandinsky, noise, ready, reward, sana

from rewarddance_hf.alignment.gradient import RewardGradientCallback
from rewarddance_hf.alignment.search.search import best_of_n, search_over_paths, zero_order_search


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def deepfloyd():
    """From an image; says by the total of its progress bar how many steps are left."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        in_channels=3,
        out_channels=6,
        cross_attention_dim=8,
        encoder_hid_dim=8,
        attention_head_dim=4,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        resnet_time_scale_shift="scale_shift",
    )
    pipeline = diffusers.IFImg2ImgPipeline(
        None, None, unet, diffusers.DDPMScheduler(variance_type="learned_range"), None, None, None, False
    )
    return ready(pipeline), {
        "prompt_embeds": noise(1, 1, 4, 8),
        "negative_prompt_embeds": noise(2, 1, 4, 8),
        "image": torch.rand(1, 3, 8, 8, generator=seeded()),
    }


def kandinsky_img2img():
    """From an image; gives its progress bar the timesteps that are left, and tells no number of steps."""
    torch.manual_seed(0)
    pipeline, inputs = kandinsky()
    unet = diffusers.UNet2DConditionModel.from_config(
        {**pipeline.unet.config, "addition_embed_type": "image_hint", "in_channels": 8}
    )
    pipeline = diffusers.KandinskyV22ControlnetImg2ImgPipeline(unet, pipeline.scheduler, pipeline.movq)
    inputs = {name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    return ready(pipeline), {
        **inputs,
        "image": torch.rand(1, 3, 16, 16, generator=seeded()),
        "hint": torch.rand(1, 3, 64, 64, generator=seeded(1)),
    }


@pytest.mark.parametrize("make", [deepfloyd, kandinsky_img2img])
def test_steps_left_by_strength(make):
    """The last two of the four steps that are made, not of the eight of the schedule; pipelines were told to pass `strength=1.0`."""
    pipeline, inputs = make()
    arguments = {**inputs, "num_inference_steps": 8, "strength": 0.5, "output_type": "pt"}
    plain = pipeline(**arguments, generator=seeded()).images
    pipeline.unet.requires_grad_(True)
    callback = RewardGradientCallback("draft", num_gradient_steps=2)
    with callback.attach(pipeline):
        images = pipeline(**arguments, generator=seeded()).images
    assert callback.last_step == 2
    torch.testing.assert_close(images.detach(), plain, rtol=0, atol=1e-5)  # layers that train may have other kernels
    assert images.requires_grad
    with RewardGradientCallback("refl", step_ratio_range=(0.5, 0.75)).attach(pipeline) as callback:
        pipeline(**arguments, generator=seeded())
    assert callback.last_step == 2


def sana_sprint():
    """Its scheduler has the clean image as one more timestep."""
    torch.manual_seed(0)
    parts, inputs = sana()
    config = {name: value for name, value in parts.transformer.config.items() if not name.startswith("_")}
    transformer = diffusers.SanaTransformer2DModel(**{**config, "guidance_embeds": True})
    pipeline = diffusers.SanaSprintPipeline(None, None, parts.vae, transformer, diffusers.SCMScheduler())
    names = ("prompt_embeds", "prompt_attention_mask")
    return ready(pipeline), {
        **{name: inputs[name][:1] for name in names},
        "height": 32,
        "width": 32,
        "use_resolution_binning": False,
        "num_inference_steps": 2,
        "output_type": "pt",
    }


def test_budget_of_a_search_in_steps_that_are_made():
    """A budget of four evaluations is two images of two steps each; one of three steps was counted."""
    pipeline, inputs = sana_sprint()
    result = best_of_n(pipeline, "a", reward, max_denoiser_evaluations=4, num_images=2, **inputs)
    assert (result.denoiser_evaluations, len(result.images)) == (4, 2)
    for place in range(2):
        plain = pipeline(**inputs, generator=seeded(result.lineage(place)[0].seed)).images[0]
        torch.testing.assert_close(result.images[place], plain, rtol=0, atol=1e-5)
    result = zero_order_search(pipeline, "a", reward, num_neighbors=1, max_denoiser_evaluations=4, **inputs)
    assert result.denoiser_evaluations == 4


@pytest.mark.parametrize("make", [sana_sprint, kandinsky_img2img])
def test_parts_are_refused_before_anything_is_computed(make):
    pipeline, inputs = make()
    if "image" in inputs:
        inputs |= {"num_inference_steps": 8, "strength": 0.5}
    denoiser = getattr(pipeline, "transformer", None) or pipeline.unet
    calls = []
    denoiser.register_forward_pre_hook(lambda *args: calls.append(1))
    with pytest.raises(NotImplementedError, match=r"makes [24] of the [38] steps of its schedule"):
        best_of_n(pipeline, "a", reward, num_candidates=2, preview_step=1, **inputs)
    with pytest.raises(NotImplementedError, match="or use `best_of_n` without `preview_step`"):
        search_over_paths(pipeline, "a", reward, num_branches=2, **inputs)
    assert not calls
