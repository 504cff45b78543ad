"""
Vision-language models as they are released, but without weights: configurations by the published values, and tokenizers of few
words. For counting memory, which needs no weights.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import tiny_vlms
import torch
import transformers


QWEN3 = {"model_type": "qwen3", "vocab_size": 151_936, "num_key_value_heads": 8, "head_dim": 128}
INTERNVIT_300M = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "attention_bias": True,
}
INTERNVIT_6B = {
    "hidden_size": 3200,
    "intermediate_size": 12800,
    "num_attention_heads": 25,
    "num_hidden_layers": 45,
    "use_qk_norm": True,
    "norm_type": "rms_norm",
}


def _qwen3(width: int, hidden: int, layers: int, heads: int) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": hidden}
    return {**QWEN3, **sizes, "num_hidden_layers": layers, "num_attention_heads": heads}


INTERNVL: dict[str, dict[str, dict[str, Any]]] = {
    "1B": {"text_config": _qwen3(1024, 3072, 28, 16), "vision_config": INTERNVIT_300M},
    "2B": {"text_config": _qwen3(2048, 6144, 28, 16), "vision_config": INTERNVIT_300M},
    "4B": {"text_config": _qwen3(2560, 9728, 36, 32), "vision_config": INTERNVIT_300M},
    "8B": {"text_config": _qwen3(4096, 12288, 36, 32), "vision_config": INTERNVIT_300M},
    "14B": {"text_config": _qwen3(5120, 17408, 40, 40), "vision_config": INTERNVIT_300M},
    "38B": {"text_config": _qwen3(5120, 25600, 64, 64), "vision_config": INTERNVIT_6B},
}
_ROPE = {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True, "rope_theta": 5e6}
_VISION = {"num_heads": 16, "patch_size": 16, "num_position_embeddings": 2304}
QWEN3_VL: dict[str, dict[str, dict[str, Any]]] = {
    "2B": {
        "text_config": {**INTERNVL["2B"]["text_config"], "model_type": "qwen3_vl_text", "rope_parameters": _ROPE},
        "vision_config": {
            **_VISION,
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "out_hidden_size": 2048,
            "deepstack_visual_indexes": [5, 11, 17],
        },
    },
    "8B": {
        "text_config": {**INTERNVL["8B"]["text_config"], "model_type": "qwen3_vl_text", "rope_parameters": _ROPE},
        "vision_config": {
            **_VISION,
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "out_hidden_size": 4096,
            "deepstack_visual_indexes": [8, 16, 24],
        },
    },
}


def save_internvl(size: str, folder: Path) -> Path:
    """InternVL3.5 with images of 448 x 448 pixels, which are 256 tokens."""
    _, processor = tiny_vlms.internvl()
    tokenizer = processor.tokenizer
    config = transformers.InternVLConfig(
        text_config={**tiny_vlms._text_ids(tokenizer), **INTERNVL[size]["text_config"], "tie_word_embeddings": False},
        vision_config={
            "model_type": "internvl_vision",
            "image_size": 448,
            "patch_size": 14,
            **INTERNVL[size]["vision_config"],
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
    """Qwen3-VL, of whose images 32 x 32 pixels are a token; that of 2B has one matrix for embeddings and head."""
    tiny, processor = tiny_vlms.qwen3_vl()
    ids = {name: value for name, value in tiny.to_dict().items() if name.endswith("_token_id")}
    text = {**tiny_vlms._text_ids(processor.tokenizer), **QWEN3_VL[size]["text_config"]}
    is_tied = size == "2B"
    config = transformers.Qwen3VLConfig(
        text_config={**text, "tie_word_embeddings": is_tied},
        vision_config=QWEN3_VL[size]["vision_config"],
        tie_word_embeddings=is_tied,
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


# By the names on the Hub
VLMS: dict[str, Callable[[Path], Path]] = {
    **{f"OpenGVLab/InternVL3_5-{size}-HF": partial(save_internvl, size) for size in INTERNVL},
    **{f"Qwen/Qwen3-VL-{size}-Instruct": partial(save_qwen3_vl, size) for size in QWEN3_VL},
}
