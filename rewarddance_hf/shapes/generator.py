"""
The tiny text-to-image model of the shapes world: a stock Stable Diffusion 3 pipeline at 1/2000 of the size.

It draws crisp shapes, and gets numbers, colors and relations wrong often enough for a judge to have something to mend.
"""

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from ..import_utils import require_extra
from .captions import caption_words


require_extra("diffusers", "diffusers")

from diffusers import (  # noqa: E402
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)


# Pipeline trained from scratch by `generator_base.py`.
BASE_GENERATOR = Path(__file__).parent / "base_generator"

NUM_INFERENCE_STEPS = 8
GUIDANCE_SCALE = 3.0
# Without a T5 encoder the pipeline puts this many zero vectors after the prompt. Its default of 256 gives much the same
# images in many times the time.
MAX_SEQUENCE_LENGTH = 1
SAMPLING = {
    "num_inference_steps": NUM_INFERENCE_STEPS,
    "guidance_scale": GUIDANCE_SCALE,
    "max_sequence_length": MAX_SEQUENCE_LENGTH,
}

IMAGE_SIZE = 32
LATENT_CHANNELS = 4
VAE_CHANNELS = (8, 24, 48)
PATCH_SIZE = 2
PROMPT_TOKENS = 16  # the longest caption has 13 words, and a token at each end
TEXT_WIDTH = 48
WIDTH = 64
WORD_END = "</w>"


def load_generator(path: str | Path = BASE_GENERATOR) -> StableDiffusion3Pipeline:
    """Load a pipeline that draws shapes, without progress bar."""
    require_pipeline(path)
    # diffusers loads Stable Diffusion 3 without its T5 encoder only when told so.
    pipeline = StableDiffusion3Pipeline.from_pretrained(path, text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def require_pipeline(path: str | Path) -> None:
    """Check that a folder holds a pipeline."""
    if not (Path(path) / "model_index.json").is_file():
        raise FileNotFoundError(
            f"`path` is {str(path)!r}, but {str(path)!r} holds no pipeline. Pass a folder with a `model_index.json`."
        )


def build_generator(seed: int = 0, width: int = WIDTH) -> StableDiffusion3Pipeline:
    """
    The pipeline with random weights, for images of 32 x 32 pixels: 1.2M parameters with the `width` of the denoiser that ships; other
    widths are multiples of 16.
    """
    tokenizer = build_prompt_tokenizer()
    torch.manual_seed(seed)
    text_encoders = [_build_text_encoder(tokenizer) for _ in range(2)]
    pipeline = StableDiffusion3Pipeline(
        transformer=_build_transformer(width),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_build_vae(),
        text_encoder=text_encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=text_encoders[1],
        tokenizer_2=build_prompt_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_prompt_tokenizer() -> CLIPTokenizer:
    """CLIP tokenizer in which every word of the shapes world is one token."""
    merges = _learn_merges(caption_words())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + WORD_END for letter in alphabet), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocabulary, merges, model_max_length=PROMPT_TOKENS)


def _learn_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair merges until each word is one token. The trainer of tokenizers breaks ties at random."""
    splits = [[*word[:-1], word[-1] + WORD_END] for word in words]
    merges: list[tuple[str, str]] = []
    while True:
        counts = Counter(pair for split in splits for pair in pairwise(split))
        if not counts:
            return merges
        merges.append(max(counts, key=lambda pair: (counts[pair], pair)))
        for split in splits:
            for index in reversed(range(len(split) - 1)):
                if tuple(split[index : index + 2]) == merges[-1]:
                    split[index : index + 2] = ["".join(merges[-1])]


def _build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=PROMPT_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config).eval()


def _build_transformer(width: int) -> SD3Transformer2DModel:
    side = IMAGE_SIZE // 2 ** (len(VAE_CHANNELS) - 1)
    transformer = SD3Transformer2DModel(
        sample_size=side,
        patch_size=PATCH_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        attention_head_dim=width // 4,
        num_attention_heads=4,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=width,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=side // PATCH_SIZE,
        qk_norm="rms_norm",
    )
    # As in DiT: every block starts as the identity and the prediction at zero.
    for name, module in transformer.named_modules():
        if name.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return transformer.eval()


def _build_vae() -> AutoencoderKL:
    vae = AutoencoderKL(
        block_out_channels=VAE_CHANNELS,
        down_block_types=["DownEncoderBlock2D"] * len(VAE_CHANNELS),
        up_block_types=["UpDecoderBlock2D"] * len(VAE_CHANNELS),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return vae.eval()
