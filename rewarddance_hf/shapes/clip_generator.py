"""
The tiny generator of clips of shapes: a stock LTX pipeline at 1/2000 of the size, text-to-video and image-to-video with one denoiser.
"""

import string
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from ..import_utils import require_extra
from .clip_scenes import clip_caption_words
from .clips import NUM_FRAMES
from .generator import require_pipeline
from .models import IMAGE_SIZE
from .scenes import require_member


require_extra("diffusers", "diffusers")

from diffusers import (  # noqa: E402
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)


PIPELINES = {"text-to-video": LTXPipeline, "image-to-video": LTXImageToVideoPipeline}

PROMPT_TOKENS = 16  # the longest caption has 13, and the end
FRAME_RATE = 25  # the default of the pipelines
CLIP_SAMPLING: dict[str, Any] = {
    "num_inference_steps": 8,
    "guidance_scale": 3.0,
    "max_sequence_length": PROMPT_TOKENS,
    "height": IMAGE_SIZE,
    "width": IMAGE_SIZE,
    "num_frames": NUM_FRAMES,
}

LATENT_CHANNELS = 16
LOG_VARIANCE = -20.0
VAE_CHANNELS = (48,)
TEXT_WIDTH = 48
WIDTH = 96


def build_clip_generator(seed: int = 0) -> LTXPipeline:
    """The text-to-video pipeline with random weights, 1.8M of them, for clips of 4 frames of 32 x 32 pixels."""
    tokenizer = build_clip_tokenizer()
    torch.manual_seed(seed)
    pipeline: Any = LTXPipeline(
        transformer=_build_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_build_vae(),
        text_encoder=_build_text_encoder(tokenizer),
        tokenizer=tokenizer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_clip_generator(path: str | Path, task: str = "text-to-video") -> LTXPipeline | LTXImageToVideoPipeline:
    """Load a pipeline that draws clips of shapes for a task, `"text-to-video"` or `"image-to-video"`, without progress bar."""
    require_member("task", task, PIPELINES)
    require_pipeline(path)
    pipeline = PIPELINES[task].from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_clip_tokenizer() -> T5Tokenizer:
    """T5 tokenizer in which every word of captions of clips is one token."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"\N{LOWER ONE EIGHTH BLOCK}{word}", -1.0) for word in sorted(clip_caption_words())]
    pieces += [(letter, -10.0) for letter in ("\N{LOWER ONE EIGHTH BLOCK}", *string.printable.strip())]
    return T5Tokenizer(pieces, extra_ids=0, model_max_length=PROMPT_TOKENS)


def _build_text_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_WIDTH,
        d_kv=TEXT_WIDTH // 4,
        d_ff=2 * TEXT_WIDTH,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config).eval()


def _build_transformer() -> LTXVideoTransformer3DModel:
    transformer: Any = LTXVideoTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=4,
        attention_head_dim=WIDTH // 4,
        cross_attention_dim=WIDTH,
        num_layers=4,
        caption_channels=TEXT_WIDTH,
    )
    # As in DiT: every block starts as the identity and the prediction at zero.
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    return transformer.eval()


def _build_vae() -> AutoencoderKLLTXVideo:
    """An autoencoder that makes 4 x 4 latents of each frame, and the first frame's without the others."""
    layers, no = (1,) * (len(VAE_CHANNELS) + 1), (False,) * len(VAE_CHANNELS)
    vae: Any = AutoencoderKLLTXVideo(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=VAE_CHANNELS,
        decoder_block_out_channels=VAE_CHANNELS,
        down_block_types=("LTXVideoDownBlock3D",) * len(VAE_CHANNELS),
        layers_per_block=layers,
        decoder_layers_per_block=layers,
        spatio_temporal_scaling=no,
        decoder_spatio_temporal_scaling=no,
        decoder_inject_noise=(*no, False),
        downsample_type=("conv",) * len(VAE_CHANNELS),
        upsample_residual=no,
        upsample_factor=(1,) * len(VAE_CHANNELS),
        patch_size=8,
        patch_size_t=1,
        spatial_compression_ratio=8,
        temporal_compression_ratio=1,
    )
    # Its last output is the log-variance of the latents, which are exact: the image-to-video pipeline draws them.
    last = vae.encoder.conv_out.conv
    nn.init.zeros_(last.weight[-1])
    nn.init.constant_(last.bias[-1], LOG_VARIANCE)
    return vae.eval()
