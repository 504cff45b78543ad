"""
Folders of released models as they are on the Hub, but without weights: configurations by the published values, real classes,
tokenizers of few words. For counting memory, which needs no weights.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import tiny_refl
import tiny_vlms
import torch
import transformers


# The language models of InternVL3.5 (Qwen3 with a head of its own)
QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
INTERNVL: dict[str, dict[str, int]] = {
    "1B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "2B": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "4B": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    "8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
    "14B": {"hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 40, "num_attention_heads": 40},
    "38B": {"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64},
}
INTERN_VIT_300M = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "attention_bias": True,
}
INTERN_VIT_6B = {
    "hidden_size": 3200,
    "intermediate_size": 12800,
    "num_attention_heads": 25,
    "num_hidden_layers": 45,
    "attention_bias": False,
    "use_qk_norm": True,
    "norm_type": "rms_norm",
}
# Text and vision of Qwen3-VL
QWEN3_VL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "2B": (
        {**INTERNVL["2B"], "tie_word_embeddings": True},
        {"hidden_size": 1024, "intermediate_size": 4096, "depth": 24, "deepstack_visual_indexes": [5, 11, 17]},
    ),
    "8B": (
        {**INTERNVL["8B"], "tie_word_embeddings": False},
        {"hidden_size": 1152, "intermediate_size": 4304, "depth": 27, "deepstack_visual_indexes": [8, 16, 24]},
    ),
}


def save_internvl(size: str, folder: Path) -> Path:
    """InternVL3.5 with images of 448 x 448 pixels, which are 256 tokens."""
    _, processor = tiny_vlms.internvl()
    tokenizer = processor.tokenizer
    config = transformers.InternVLConfig(
        text_config={**tiny_vlms._text_ids(tokenizer), **QWEN3, **INTERNVL[size]},
        vision_config={
            "model_type": "internvl_vision",
            "image_size": 448,
            "patch_size": 14,
            **(INTERN_VIT_6B if size == "38B" else INTERN_VIT_300M),
        },
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=256,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    processor.image_processor.size = {"height": 448, "width": 448}
    processor.image_seq_length = 256
    return _save(config, processor, folder)


def save_qwen3_vl(size: str, folder: Path) -> Path:
    """Qwen3-VL, of whose images 32 x 32 pixels are a token."""
    tiny, processor = tiny_vlms.qwen3_vl()
    text, vision = QWEN3_VL[size]
    ids = {name: value for name, value in tiny.to_dict().items() if name.endswith("_token_id")}
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    config = transformers.Qwen3VLConfig(
        text_config={
            **tiny_vlms._text_ids(processor.tokenizer),
            **{key: value for key, value in QWEN3.items() if key != "model_type"},
            **text,
            "rope_parameters": rope,
        },
        vision_config={
            "num_heads": 16,
            "patch_size": 16,
            "out_hidden_size": text["hidden_size"],
            "num_position_embeddings": 2304,
            **vision,
        },
        tie_word_embeddings=text["tie_word_embeddings"],
        dtype=torch.bfloat16,
        **ids,
    )
    images = processor.image_processor
    images.patch_size, images.merge_size, images.temporal_patch_size = 16, 2, 2
    images.size = {"shortest_edge": 65536, "longest_edge": 16777216}
    return _save(config, processor, folder)


def _save(config: Any, processor: Any, folder: Path) -> Path:
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


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
VLMS: dict[str, Callable[[Path], Path]] = {
    **{f"OpenGVLab/InternVL3_5-{size}-HF": partial(save_internvl, size) for size in INTERNVL},
    **{f"Qwen/Qwen3-VL-{size}-Instruct": partial(save_qwen3_vl, size) for size in QWEN3_VL},
}
PIPELINES: dict[str, Callable[[Path], Path]] = {
    "stabilityai/stable-diffusion-3.5-medium": partial(save_pipeline, stable_diffusion_35_medium),
    "black-forest-labs/FLUX.1-dev": partial(save_pipeline, flux_dev),
    "Qwen/Qwen-Image": partial(save_pipeline, qwen_image),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": partial(save_pipeline, wan_1_3b),
}


def save(name: str, root: Path) -> Path:
    """Folder `root/name` with the configurations of a released model; made once."""
    folder = root / name
    return folder if folder.exists() else {**VLMS, **PIPELINES}[name](folder)
