"""Tiny pipelines of real diffusers classes with random weights. They take prompt embeddings, so text encoders are left out."""

import copy
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from peft import LoraConfig, inject_adapter_in_model


LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
STABLE_DIFFUSION_BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def image_vae(**config: Any) -> diffusers.AutoencoderKL:
    config = {"latent_channels": 4, "shift_factor": 0.06, "scaling_factor": 1.5, **config}
    return diffusers.AutoencoderKL(
        block_out_channels=(4,), norm_num_groups=1, use_quant_conv=False, use_post_quant_conv=False, **config
    )


def flux2_vae(**config: Any) -> diffusers.AutoencoderKLFlux2:
    return diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        **config,
    )


def unet_vae() -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=2,
    )


def stable_diffusion(scheduler=None):
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=2,
        attention_head_dim=2,
    )
    pipeline = diffusers.StableDiffusionPipeline(
        vae=unet_vae(),
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=scheduler or diffusers.DDIMScheduler(**STABLE_DIFFUSION_BETAS, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    inputs = {"prompt_embeds": noise(1, 2, 7, 8), "negative_prompt_embeds": noise(2, 2, 7, 8), "guidance_scale": 6.0}
    return pipeline, inputs | {"height": 16, "width": 16}


def stable_diffusion_euler():
    return stable_diffusion(diffusers.EulerDiscreteScheduler(**STABLE_DIFFUSION_BETAS))


def stable_diffusion_dpm():
    return stable_diffusion(diffusers.DPMSolverMultistepScheduler(**STABLE_DIFFUSION_BETAS))


def stable_diffusion_xl():
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 8,
        cross_attention_dim=8,
        norm_num_groups=2,
    )
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=unet_vae(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(**STABLE_DIFFUSION_BETAS, timestep_spacing="leading"),
        add_watermarker=False,
    )
    return pipeline, {
        "prompt_embeds": noise(1, 2, 7, 8),
        "negative_prompt_embeds": noise(2, 2, 7, 8),
        "pooled_prompt_embeds": noise(3, 2, 8),
        "negative_pooled_prompt_embeds": noise(4, 2, 8),
        "guidance_scale": 5.0,
        "height": 16,
        "width": 16,
    }


def stable_diffusion_3():
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=16,
        pooled_projection_dim=8,
    )
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=image_vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    return pipeline, {
        "prompt_embeds": noise(1, 2, 7, 16),
        "negative_prompt_embeds": noise(2, 2, 7, 16),
        "pooled_prompt_embeds": noise(3, 2, 8),
        "negative_pooled_prompt_embeds": noise(4, 2, 8),
        "guidance_scale": 5.0,
        "height": 8,
        "width": 8,
    }


def flux():
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=[4, 4, 8],
    )
    pipeline = diffusers.FluxPipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=image_vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    inputs = {"prompt_embeds": noise(1, 2, 7, 16), "pooled_prompt_embeds": noise(3, 2, 8), "guidance_scale": 3.5}
    return pipeline, inputs | {"height": 8, "width": 8}


def flux2():
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=[4, 4, 4, 4],
    )
    vae = flux2_vae(use_quant_conv=False, use_post_quant_conv=False)
    pipeline = diffusers.Flux2Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
    )
    return pipeline, {"prompt_embeds": noise(1, 2, 7, 16), "guidance_scale": 4.0, "height": 8, "width": 8}


def qwen_image():
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    pipeline = diffusers.QwenImagePipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
    )
    mask = torch.ones(2, 7, dtype=torch.long)
    return pipeline, {
        "prompt_embeds": noise(1, 2, 7, 16),
        "prompt_embeds_mask": mask,
        "negative_prompt_embeds": noise(2, 2, 7, 16),
        "negative_prompt_embeds_mask": mask,
        "true_cfg_scale": 3.0,
        "height": 16,
        "width": 16,
    }


def sana():
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=16,
    )
    vae = diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1],
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    pipeline = diffusers.SanaPipeline(
        transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
    )
    mask = torch.ones(2, 7, dtype=torch.long)
    return pipeline, {
        "negative_prompt": None,
        "prompt_embeds": noise(1, 2, 7, 8),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": noise(2, 2, 7, 8),
        "negative_prompt_attention_mask": mask,
        "guidance_scale": 4.5,
        "height": 32,
        "width": 32,
        "use_resolution_binning": False,
    }


def z_image():
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    with torch.no_grad():  # left uninitialized by the class
        transformer.x_pad_token.fill_(1.0)
        transformer.cap_pad_token.fill_(1.0)
    pipeline = diffusers.ZImagePipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=image_vae(),
        text_encoder=None,
        tokenizer=None,
    )
    return pipeline, {
        "prompt_embeds": list(noise(1, 2, 7, 16)),
        "negative_prompt_embeds": list(noise(2, 2, 7, 16)),
        "guidance_scale": 3.0,
        "height": 8,
        "width": 8,
    }


def pixart_sigma():
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=16,
        in_channels=4,
        cross_attention_dim=16,
        out_channels=8,
        norm_type="ada_norm_single",
    )
    pipeline = diffusers.PixArtSigmaPipeline(
        transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(),
        vae=image_vae(shift_factor=None),
        text_encoder=None,
        tokenizer=None,
    )
    mask = torch.ones(2, 7, dtype=torch.long)
    return pipeline, {
        "negative_prompt": None,
        "prompt_embeds": noise(1, 2, 7, 16),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": noise(2, 2, 7, 16),
        "negative_prompt_attention_mask": mask,
        "guidance_scale": 4.5,
        "height": 8,
        "width": 8,
        "use_resolution_binning": False,
    }


def aura_flow():
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=16,
        out_channels=4,
        pos_embed_max_size=64,
    )
    pipeline = diffusers.AuraFlowPipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73),
        vae=image_vae(shift_factor=None),
        text_encoder=None,
        tokenizer=None,
    )
    mask = torch.ones(2, 7, dtype=torch.long)
    return pipeline, {
        "prompt_embeds": noise(1, 2, 7, 16),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": noise(2, 2, 7, 16),
        "negative_prompt_attention_mask": mask,
        "guidance_scale": 3.5,
        "height": 8,
        "width": 8,
    }


def lumina2():
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=8,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=1,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=[4, 2, 2],
        axes_lens=[64, 32, 32],
        cap_feat_dim=8,
    )
    pipeline = diffusers.Lumina2Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=image_vae(),
        text_encoder=None,
        tokenizer=None,
    )
    mask = torch.ones(2, 7, dtype=torch.bool)
    return pipeline, {
        "prompt_embeds": noise(1, 2, 7, 8),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": noise(2, 2, 7, 8),
        "negative_prompt_attention_mask": mask,
        "guidance_scale": 4.0,
        "height": 64,  # the class takes the VAE for one that makes images 8 times as large
        "width": 64,
    }


def ltx():
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=16,
    )
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(4, 4, 4, 4),
        decoder_block_out_channels=(4, 4, 4, 4),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        patch_size=1,
        patch_size_t=1,
    )
    pipeline = diffusers.LTXPipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
    )
    mask = torch.ones(2, 7, dtype=torch.long)
    return pipeline, {
        "prompt_embeds": noise(1, 2, 7, 16),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": noise(2, 2, 7, 16),
        "negative_prompt_attention_mask": mask,
        "guidance_scale": 3.0,
        "height": 32,
        "width": 32,
        "num_frames": 5,
    }


def wan(scheduler=None):
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=16,
        num_layers=1,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    )
    vae = diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.1, 0.2, 0.0],
        latents_std=[1.0, 1.5, 2.0, 0.5],
    )
    pipeline = diffusers.WanPipeline(
        transformer=transformer,
        scheduler=scheduler
        or diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
    )
    return pipeline, {
        "prompt_embeds": noise(1, 2, 7, 16),
        "negative_prompt_embeds": noise(2, 2, 7, 16),
        "guidance_scale": 5.0,
        "height": 16,
        "width": 16,
        "num_frames": 5,
    }


def cogvideox():
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=16,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=5,
        max_text_seq_length=7,
    )
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    pipeline = diffusers.CogVideoXPipeline(
        transformer=transformer,
        scheduler=diffusers.CogVideoXDDIMScheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
        ),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
    )
    return pipeline, {
        "prompt_embeds": noise(1, 2, 7, 16),
        "negative_prompt_embeds": noise(2, 2, 7, 16),
        "guidance_scale": 6.0,
        "max_sequence_length": 7,
        "height": 16,
        "width": 16,
        "num_frames": 5,
    }


def hunyuan_video():
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
    )
    pipeline = diffusers.HunyuanVideoPipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    return pipeline, {
        "prompt_embeds": noise(1, 2, 7, 16),
        "prompt_attention_mask": torch.ones(2, 7),
        "pooled_prompt_embeds": noise(3, 2, 8),
        "guidance_scale": 6.0,
        "height": 16,
        "width": 16,
        "num_frames": 5,
    }


def ltx2():
    """It denoises clip and sound, the sound with a copy of its scheduler."""
    transformer = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=1,
        caption_channels=16,
        rope_type="split",
    )
    connectors = LTX2TextConnectors(
        caption_channels=16,
        text_proj_in_factor=2,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32,
        rope_type="split",
    )
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(4,),
        decoder_block_out_channels=(4,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=1,
    )
    audio_vae = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8
    )
    vocoder = LTX2Vocoder(
        in_channels=16,
        hidden_channels=8,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        output_sampling_rate=16000,
    )
    pipeline = diffusers.LTX2Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1),
        vae=vae,
        audio_vae=audio_vae,
        connectors=connectors,
        vocoder=vocoder,
        text_encoder=None,
        tokenizer=None,
    )
    mask = torch.ones(2, 7, dtype=torch.long)
    return pipeline, {
        "prompt_embeds": noise(1, 2, 7, 32),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": noise(2, 2, 7, 32),
        "negative_prompt_attention_mask": mask,
        "guidance_scale": 3.0,
        "height": 32,
        "width": 32,
        "num_frames": 5,
    }


def kandinsky():
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=8,
        addition_embed_type="image",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(4, 8),
        layers_per_block=1,
        encoder_hid_dim=8,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=2,
        resnet_time_scale_shift="scale_shift",
    )
    movq = diffusers.VQModel(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        num_vq_embeddings=8,
        vq_embed_dim=4,
        norm_type="spatial",
        norm_num_groups=8,
    )
    pipeline = diffusers.KandinskyV22Pipeline(
        unet=unet,
        movq=movq,
        scheduler=diffusers.DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="linear", clip_sample=False
        ),
    )
    pipeline.set_progress_bar_config(disable=True)
    embeds = {"image_embeds": noise(1, 2, 8), "negative_image_embeds": noise(2, 2, 8)}
    return pipeline, {**embeds, "guidance_scale": 4.0, "height": 16, "width": 16}


BUILDERS: dict[str, Callable[..., tuple[DiffusionPipeline, dict[str, Any]]]] = {
    "StableDiffusion": stable_diffusion,
    "StableDiffusion-Euler": stable_diffusion_euler,
    "StableDiffusion-DPM++": stable_diffusion_dpm,
    "StableDiffusionXL": stable_diffusion_xl,
    "StableDiffusion3": stable_diffusion_3,
    "Flux": flux,
    "Flux2": flux2,
    "QwenImage": qwen_image,
    "Sana": sana,
    "ZImage": z_image,
    "PixArtSigma": pixart_sigma,
    "AuraFlow": aura_flow,
    "Lumina2": lumina2,
    "LTX": ltx,
    "LTX2": ltx2,
    "Wan": wan,
    "CogVideoX": cogvideox,
    "HunyuanVideo": hunyuan_video,
}
VIDEO = {"LTX", "LTX2", "Wan", "CogVideoX", "HunyuanVideo"}


class TinyPipeline:
    """A tiny pipeline with a LoRA adapter on its denoiser, the only part that trains."""

    def __init__(self, name: str):
        torch.manual_seed(0)
        self.pipeline, self.inputs = BUILDERS[name]()
        self.pipeline.set_progress_bar_config(disable=True)
        for model in self.pipeline.components.values():
            if isinstance(model, torch.nn.Module):
                model.eval().requires_grad_(False)
        self.denoiser = getattr(self.pipeline, "transformer", None) or self.pipeline.unet
        # Both matrices of the adapter are random, so that both get gradient.
        lora_config = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=LORA_TARGETS)
        inject_adapter_in_model(lora_config, self.denoiser)
        for name, parameter in self.denoiser.named_parameters():
            if "audio" in name:  # LTX2: the sound of the last step does not change the clip
                parameter.requires_grad_(False)
        self.parameters = [parameter for parameter in self.denoiser.parameters() if parameter.requires_grad]

    def __call__(self, call: Callable[..., Any] | None = None, **kwargs: Any) -> torch.Tensor:
        """Images of the pipeline, or of another function with the same arguments."""
        torch.manual_seed(3)  # some pipelines let the scheduler draw its noise without their generator
        arguments = {"num_inference_steps": 4, "output_type": "pt", "generator": torch.Generator().manual_seed(7)}
        return (call or self.pipeline)(**arguments | copy.copy(self.inputs) | kwargs)[0]

    def gradients(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Gradient of the mean reward with respect to the adapter."""
        return list(torch.autograd.grad(reward(images).mean(), self.parameters))


def ready(pipeline):
    """The same pipeline, with nothing to train and without bars."""
    for model in pipeline.components.values():
        if isinstance(model, torch.nn.Module):
            model.eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def reward(images: torch.Tensor, prompts: list[str] | None = None) -> torch.Tensor:
    """A fixed differentiable function of pixels, one number for each image or clip."""
    images = torch.as_tensor(images)
    frames = images.flatten(0, -4)
    kernel = noise(11, 4, 3, 3, 3).to(frames.dtype)
    features = torch.nn.functional.conv2d(frames - 0.5, kernel).tanh().mean(dim=(1, 2, 3))
    return features.reshape(len(images), -1).mean(dim=1)


def relative_difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Distance of two lists of tensors, relative to the length of the second."""
    ours, theirs = (torch.cat([tensor.flatten() for tensor in tensors]).double() for tensors in (ours, theirs))
    return ((ours - theirs).norm() / theirs.norm()).item()
