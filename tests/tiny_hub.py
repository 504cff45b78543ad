"""
Tiny models under the names, in the layouts and in the weight types of the repositories that `examples/` names: real pipeline
and model classes with random weights, bfloat16 in several safetensors files, real tokenizer classes.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dataset_layouts
import diffusers
import tiny_vlms
import torch
import transformers as hf
from hub_server import LoopbackHub
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from rewarddance_hf import RewardDanceForYesScoring, RewardDanceProcessor


TEXTS = [
    "a knight in a red coat stands beside a blue door, anime style",
    "a wave breaks on the beach while two dogs run, slow motion, a cat and a bird fly over a green field",
]
SHARD = "100KB"
VAE_LEVELS = {  # four levels, so that images are 8 times as large as latents, as in the real ones
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (4,) * 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 2,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def byte_level(vocab_size: int = 400) -> tuple[dict[str, int], list[Any]]:
    """Vocabulary and merges of a small byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def clip_tokenizer() -> hf.CLIPTokenizer:
    letters = sorted({letter for text in TEXTS for letter in text if letter != " "})
    names = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return hf.CLIPTokenizer({name: index for index, name in enumerate(names)}, [], model_max_length=77)


def t5_tokenizer(length: int) -> hf.T5TokenizerFast:
    letters = sorted({letter for text in TEXTS for letter in text if letter != " "})
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in letters)]
    return hf.T5TokenizerFast(vocab, extra_ids=0, model_max_length=length)


def clip(model_class: type, width: int, tokenizer: hf.CLIPTokenizer) -> Any:
    config = hf.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model_class(config)


def t5(config_class: type, model_class: type, tokenizer: hf.T5TokenizerFast, width: int = 32) -> Any:
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    return model_class(config_class(vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", **sizes))


def stable_diffusion_35() -> diffusers.StableDiffusion3Pipeline:
    tokenizer, long_tokenizer = clip_tokenizer(), t5_tokenizer(512)
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            caption_projection_dim=32,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            pos_embed_max_size=16,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=diffusers.AutoencoderKL(**VAE_LEVELS, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=clip(hf.CLIPTextModelWithProjection, 16, tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=clip(hf.CLIPTextModelWithProjection, 16, tokenizer),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(hf.T5Config, hf.T5EncoderModel, long_tokenizer),
        tokenizer_3=long_tokenizer,
    )


def flux_dev() -> diffusers.FluxPipeline:
    tokenizer, long_tokenizer = clip_tokenizer(), t5_tokenizer(512)
    return diffusers.FluxPipeline(
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=diffusers.AutoencoderKL(**VAE_LEVELS, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=clip(hf.CLIPTextModel, 16, tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=t5(hf.T5Config, hf.T5EncoderModel, long_tokenizer),
        tokenizer_2=long_tokenizer,
    )


def flux_kontext_dev() -> diffusers.FluxKontextPipeline:
    return diffusers.FluxKontextPipeline(**flux_dev().components)


def qwen_image() -> diffusers.QwenImagePipeline:
    vocab, merges = byte_level()
    specials = (
        "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>".split()
    )
    tokenizer = hf.Qwen2Tokenizer(vocab, merges, model_max_length=1024)
    tokenizer.add_special_tokens({"additional_special_tokens": specials[1:]})
    config, _ = tiny_vlms.qwen2_5_vl()
    config.text_config.vocab_size = len(tokenizer)
    for name in ("bos", "eos", "pad"):
        setattr(config.text_config, f"{name}_token_id", tokenizer.pad_token_id)
    for name in ("image", "video"):
        setattr(config, f"{name}_token_id", tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>"))
    for name in ("start", "end"):
        setattr(config, f"vision_{name}_token_id", tokenizer.convert_tokens_to_ids(f"<|vision_{name}|>"))
    return diffusers.QwenImagePipeline(
        transformer=diffusers.QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=config.text_config.hidden_size,
            axes_dims_rope=(8, 4, 4),
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=diffusers.AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        text_encoder=hf.Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizer,
    )


def wan() -> diffusers.WanPipeline:
    tokenizer = t5_tokenizer(512)
    return diffusers.WanPipeline(
        transformer=diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=32,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        ),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        vae=diffusers.AutoencoderKLWan(
            base_dim=3,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        text_encoder=t5(hf.UMT5Config, hf.UMT5EncoderModel, tokenizer),
        tokenizer=tokenizer,
    )


def save_pipeline(make: Callable[[], Any], folder: Path) -> None:
    """Save a pipeline as it is released."""
    torch.manual_seed(0)
    pipeline = make()
    for name in ("proj_out", "norm_out"):  # zero at initialization in some, after which no gradient reaches anything
        for parameter in getattr(pipeline.transformer, name, torch.nn.Module()).parameters():
            torch.nn.init.normal_(parameter, 0.0, 0.2)
    pipeline.to(dtype=torch.bfloat16).save_pretrained(folder, max_shard_size=SHARD)


def save_vlm(family: str, folder: Path, image_processor: str) -> None:
    """
    Save a vision-language model as it is released: weights in bfloat16, configurations under the names of transformers 4, the
    image processor in a file of its own and of the torchvision class.
    """
    tiny_vlms.save_tiny_vlm(family, folder)
    model = hf.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size=SHARD)
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config))
    processor = json.loads((folder / "processor_config.json").read_text())
    images = processor.pop("image_processor")
    images |= {"image_processor_type": image_processor, "processor_class": processor["processor_class"]}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "processor_config.json").write_text(json.dumps(processor))


def save_judge(vlm: Path, folder: Path) -> None:
    """Save a trained judge, in bfloat16."""
    model = RewardDanceForYesScoring.from_pretrained(vlm)
    model.save_pretrained(folder)
    RewardDanceProcessor.from_pretrained(vlm).save_pretrained(folder)


PIPELINES = {
    "stabilityai/stable-diffusion-3.5-medium": stable_diffusion_35,
    "black-forest-labs/FLUX.1-dev": flux_dev,
    "black-forest-labs/FLUX.1-Kontext-dev": flux_kontext_dev,
    "Qwen/Qwen-Image": qwen_image,
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": wan,
}
VLMS = {
    "OpenGVLab/InternVL3_5-2B-HF": ("internvl", "GotOcr2ImageProcessorFast"),
    "Qwen/Qwen3-VL-2B-Instruct": ("qwen3_vl", "Qwen2VLImageProcessorFast"),
}
# Other sizes, which the same tiny models stand for
OF_OTHER_SIZES = {
    "Qwen/Qwen3-VL-8B-Instruct": "Qwen/Qwen3-VL-2B-Instruct",
    **{f"OpenGVLab/InternVL3_5-{size}-HF": "OpenGVLab/InternVL3_5-2B-HF" for size in ("1B", "4B", "8B", "38B")},
}
JUDGES = ("org/my-judge", "org/my-video-judge")
GATED = (
    "black-forest-labs/FLUX.1-dev",
    "black-forest-labs/FLUX.1-Kontext-dev",
    "stabilityai/stable-diffusion-3.5-medium",
)


def fill(hub: LoopbackHub, folder: Path) -> None:
    """Put all models and datasets that `examples/` names on a Hub. `folder` takes the files for a while."""
    for name, make in PIPELINES.items():
        save_pipeline(make, folder / name)
        hub.put(name, folder / name, gated=name in GATED)
    for name, (family, image_processor) in VLMS.items():
        save_vlm(family, folder / name, image_processor)
        hub.put(name, folder / name)
    for name, other in OF_OTHER_SIZES.items():
        hub.put(name, folder / other)
    for name in JUDGES:
        save_judge(folder / "OpenGVLab/InternVL3_5-2B-HF", folder / name)
        hub.put(name, folder / name)
    hub.put(
        "data-is-better-together/open-image-preferences-v1-binarized",
        dataset_layouts.open_image_preferences(count=10),
        kind="dataset",
    )
    hub.put("Rapidata/text-2-video-human-preferences", dataset_layouts.rapidata_videos(count=10), kind="dataset")
    hub.put("TIGER-Lab/EditReward-Data", dataset_layouts.editreward_data(), kind="dataset")
    hub.put("osunlp/MagicBrush", dataset_layouts.magic_brush(), kind="dataset")
