"""Diffusers pipelines as they are released, but without weights: configurations by the published values, tokenizers of few words."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import tiny_refl
import torch
import transformers


VAE_16_CHANNELS = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def tokenizer(length: int) -> Any:
    words = tiny_refl.tokenizer()
    words.model_max_length = length
    return words


def clip(model_class: type, large: bool = False) -> Any:
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    if large:
        sizes = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
    return model_class(transformers.CLIPTextConfig(projection_dim=sizes["hidden_size"], eos_token_id=2, **sizes))


def t5() -> Any:
    sizes = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    return transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **sizes)
    )


def stable_diffusion_35_medium() -> Any:
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=128,
            num_layers=24,
            attention_head_dim=64,
            num_attention_heads=24,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pooled_projection_dim=2048,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=diffusers.AutoencoderKL(**VAE_16_CHANNELS, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=clip(transformers.CLIPTextModelWithProjection),
        tokenizer=tokenizer(77),
        text_encoder_2=clip(transformers.CLIPTextModelWithProjection, large=True),
        tokenizer_2=tokenizer(77),
        text_encoder_3=t5(),
        tokenizer_3=tokenizer(512),
    )


def flux_dev() -> Any:
    return diffusers.FluxPipeline(
        transformer=diffusers.FluxTransformer2DModel(guidance_embeds=True),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=diffusers.AutoencoderKL(**VAE_16_CHANNELS, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=clip(transformers.CLIPTextModel),
        tokenizer=tokenizer(77),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(512),
    )


def flux_kontext_dev() -> Any:
    return diffusers.FluxKontextPipeline(**flux_dev().components)


def qwen_image() -> Any:
    text = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    vision = {"hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
    return diffusers.QwenImagePipeline(
        transformer=diffusers.QwenImageTransformer2DModel(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=diffusers.AutoencoderKLQwenImage(),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizer(1024),
    )


def wan_1_3b() -> Any:
    with torch.device("cpu"):  # for its values are looked at
        scheduler = diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
    sizes = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 256384}
    return diffusers.WanPipeline(
        transformer=diffusers.WanTransformer3DModel(
            num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=30
        ),
        scheduler=scheduler,
        vae=diffusers.AutoencoderKLWan(),
        text_encoder=transformers.UMT5EncoderModel(transformers.UMT5Config(feed_forward_proj="gated-gelu", **sizes)),
        tokenizer=tokenizer(512),
    )


def save_pipeline(make: Callable[[], Any], folder: Path) -> Path:
    """Configurations of a pipeline and of its components."""
    with torch.device("meta"):
        pipeline = make()
    pipeline.save_config(folder)
    for name, component in pipeline.components.items():
        if isinstance(component, transformers.PreTrainedModel):
            component.config.save_pretrained(folder / name)
        elif hasattr(component, "save_config"):
            component.save_config(folder / name)
        elif component is not None:
            component.save_pretrained(folder / name)
    return folder


# By the names on the Hub
PIPELINES: dict[str, Callable[[Path], Path]] = {
    "stabilityai/stable-diffusion-3.5-medium": partial(save_pipeline, stable_diffusion_35_medium),
    "black-forest-labs/FLUX.1-dev": partial(save_pipeline, flux_dev),
    "black-forest-labs/FLUX.1-Kontext-dev": partial(save_pipeline, flux_kontext_dev),
    "Qwen/Qwen-Image": partial(save_pipeline, qwen_image),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": partial(save_pipeline, wan_1_3b),
}
