"""Tiny configurations of every image-text-to-text architecture of transformers: the default ones, shrunk by names."""

import re
from typing import Any

from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PretrainedConfig


VOCABULARY = 300  # of which special tokens are the first, and words of a question the last
LAYERS = 4
# Sizes by name. What is not named here keeps its default.
SIZES = {
    r"(text_)?hidden_size|d_model|embed_dim|hidden_dim|encoder_hidden_size|out_hidden_size|text_hidden_size": 64,
    r"output_dim|vision_output_dim|projection_dim|word_embed_proj_dim|decoder_hidden_size|image_text_hidden_size": 64,
    r"projector_(input|output|hidden)_(dim|size)|projection_hidden_(size|dim)|adapter_out_dim|mm_hidden_size": 64,
    r"(vision_)?intermediate_size\w*|mlp_dim|d_ff|\w*ffn_dim|\w*intermediate_size|share_expert_dim": 64,
    r"num_hidden_layers|depth|n_layers|num_layers|(en|de)coder_layers|layers|num_decoder_layers": LAYERS,
    r"(swa_)?num_attention_heads|num_heads|(en|de)coder_attention_heads|attention_heads|num_sliding_attention_heads": 4,
    r"(swa_)?num_key_value_heads": 2,
    r"(swa_)?head_dim": 16,
    r"q_lora_rank|kv_lora_rank": 16,
    r"qk_nope_head_dim|qk_rope_head_dim|v_head_dim|linear_(key|value)_head_dim": 8,
    r"qk_head_dim": 16,
    r"linear_num_(key|value)_heads": 4,
    r"num_(local_)?experts|n_routed_experts|moe_num_experts": 4,
    r"num_experts_per_tok|moe_k|moe_topk": 2,
    r"n_group|topk_group": 1,
    r"vocab_size\w*|unpadded_vocab_size|mel_vocab_size|position_embedding_size": VOCABULARY,
    r"max_position_embeddings": 512,
    r"query_pre_attn_scalar|index_head_dim|linear_head_dim|mamba_head_dim|ssm_state_size|hidden_size_per_layer_input": 16,
    r"index_n_heads|linear_num_heads|mamba_num_heads": 4,
    r"base_channels": 32,
}


VISUAL_WORDS = {"<image>": 3, **{f"IMGIMG{word}Z": 250 + i for i, word in enumerate("ABCDEFGH")}}
GEMMA4_VISION = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "patch_size": 8,
    "pooling_kernel_size": 2,
    "position_embedding_size": 64,
}
# What names do not tell: settings that must fit each other, or have no default.
MROPE = {"text_config.rope_parameters.mrope_section": [2, 3, 3]}
OVERRIDES: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {16: 4}, "vision_config.patch_size": 8, "vision_config.image_size": 32},
    "blip-2": {"image_token_index": 3},
    "chameleon": {"vocabulary_map": VISUAL_WORDS, "vq_config.num_embeddings": 8},
    "cohere_compass": {"text_config.rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "cosmos3_edge": MROPE,
    "deepseek_ocr2": {
        "text_config.mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "text_config.num_experts_per_tok": 2,
        "vision_config.sam_config.downsample_channels": [32, 64],
    },
    "diffusion_gemma": {
        "vision_config": {"model_type": "gemma4_vision", **GEMMA4_VISION},
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 32,
    },
    "dots3_note": {
        "text_config.num_key_value_heads": 4,
        "vision_config.adapter_in_dim": 64,
        "audio_config.adapter_input_size": 64,
    },
    "emu3": {
        "vocabulary_map": VISUAL_WORDS,
        "vq_config.codebook_size": 8,
        "vq_config.embed_dim": 4,
        "vq_config.latent_channels": 4,
    },
    "ernie4_5_vl_moe": {
        "text_config.rope_parameters.mrope_section": [3, 3, 2],
        "text_config.moe_intermediate_size": [64, 32],
    },
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma4": {"vision_config": {"model_type": "gemma4_vision", **GEMMA4_VISION}},
    "gemma4_unified": {
        "vision_config": {
            "model_type": "gemma4_unified_vision",
            "patch_size": 8,
            "pooling_kernel_size": 1,
            "mm_embed_dim": 64,
            "output_proj_dims": 64,
            "mm_posemb_size": 64,
        }
    },
    "glm46v": MROPE,
    "glm4v": MROPE,
    "glm4v_moe": {"text_config.rope_parameters.mrope_section": [1, 1, 2]},
    "glm5_next": {"text_config.num_key_value_heads": 4},
    "glm_ocr": MROPE,
    "glmga": MROPE,
    "granite4_vision": {
        "deepstack_layer_map": [[-2, 0], [-1, 1]],
        "downsample_rate": "1/2",
        "image_grid_pinpoints": [[64, 64]],
        "vision_config.patch_size": 16,
        "vision_config.image_size": 64,
    },
    "granite_docling": {"vision_config.deepstack_visual_indexes": [1, 2]},
    "hunyuan_vl": {
        "text_config.head_dim": 16,
        "text_config.rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2, 2]},
    },
    "instructblip": {"image_token_index": 3},
    "instructblipvideo": {"video_token_index": 3},
    "janus": {"vq_config.num_embeddings": 64},
    "kimi_k25": {"text_config.head_dim": 8, "text_config.num_key_value_heads": 4},
    "llama4": {"vision_config.intermediate_size": 256},
    "llava_next": {"image_grid_pinpoints": [[56, 56]]},
    "llava_next_video": {"image_grid_pinpoints": [[56, 56]]},
    "llava_onevision": {"image_grid_pinpoints": [[56, 56]]},
    "minicpm_ocr": {"image_token_id": 3},
    "minicpmv4_6": {"image_token_id": 3, "insert_layer_id": 1, "vision_config.insert_layer_id": 1},
    "minicpmv4_7": {"image_token_id": 3, "insert_layer_id": 1, "vision_config.insert_layer_id": 1},
    "mistral_large4": {"text_config.head_dim": 8, "text_config.num_key_value_heads": 4},
    "mllama": {
        "text_config.cross_attention_layers": [1, 3],
        "vision_config.intermediate_layers_indices": [1, 3],
        "vision_config.vision_output_dim": 192,
    },
    "molmo2": {"adapter_config.vision_feature_layer": [3, 2], "vision_config.num_position_embeddings": 16},
    "muse_glimmer": {"out_hidden_size": 256},
    "muse_spark": {"out_hidden_size": 256},
    "nemotron_h_omni": {"vision_hidden_size": 64, "image_token_id": 3, "text_config.n_groups": 1},
    "paddleocr_vl": MROPE,
    "qwen2_5_omni_thinker": {"vision_start_token_id": 20, "vision_end_token_id": 21, **MROPE},
    "qwen2_5_vl": MROPE,
    "qwen2_vl": MROPE,
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 20, "vision_end_token_id": 21, **MROPE},
    "qwen4_exp": {
        "text_config.indexer_n_heads": 4,
        "text_config.indexer_kv_heads": 1,
        "text_config.indexer_head_dim": 16,
        "text_config.indexer_budget": 64,
        "text_config.indexer_compress_ratio": 4,
    },
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "step3p7": {"text_config.sliding_window": 16},
    "unlimited_ocr": {"vision_config.sam_config.downsample_channels": [32, 64]},
    "vipllava": {"vision_feature_layers": [-1, -2, -3]},
    "vision-encoder-decoder": {"encoder.image_size": 32, "encoder.patch_size": 8},
}


def architectures() -> dict[str, tuple[type, type]]:
    """Classes of configuration and model of each image-text-to-text architecture, by model type."""
    return {
        config_class.model_type: (config_class, model[0] if isinstance(model, tuple) else model)
        for config_class, model in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.items()
    }


def shrink(values: dict[str, Any], ids: dict[str, int]) -> dict[str, Any]:
    """The settings of a configuration, made small by their names, in sub-configurations alike."""
    layers = next((values[name] for name in ("num_hidden_layers", "depth") if isinstance(values.get(name), int)), None)
    small: dict[str, Any] = {}
    for name, value in values.items():
        if not isinstance(name, str) or name in ("per_layer_config", "id2label", "label2id"):
            continue
        if isinstance(value, dict):
            value = shrink(value, ids)
        elif match := re.fullmatch(r"(.*token|image_patch)_(id|index|ids)", name):
            if value is not None:
                value = (
                    ids.setdefault(match[1], len(ids))
                    if isinstance(value, int)
                    else [ids.setdefault(f"{match[1]} {i}", len(ids)) for i in range(len(value))]
                )
        elif name == "image_size" and isinstance(values.get("patch_size"), int):
            value = 4 * values["patch_size"] if isinstance(value, int) else [4 * values["patch_size"]] * 2
        elif isinstance(value, list) and layers and len(value) == layers:
            value = value[:LAYERS] if name != "layer_types" else one_of_each(value)
        elif isinstance(value, int) and not isinstance(value, bool) and value > 0:
            value = next((size for names, size in SIZES.items() if re.fullmatch(names, name)), value)
        small[name] = value
    return small


def one_of_each(kinds: list[str]) -> list[str]:
    """As many layers as are built, of every kind that there is."""
    distinct = list(dict.fromkeys(kinds))
    return (distinct * LAYERS)[:LAYERS] if len(distinct) <= LAYERS else distinct[:LAYERS]


def tiny_config(model_type: str) -> PretrainedConfig:
    """Tiny configuration of an architecture."""
    config_class, _ = architectures()[model_type]
    values = shrink(config_class().to_dict(), {"pad_token": 0, "bos_token": 1, "eos_token": 2})
    for path, value in OVERRIDES.get(model_type, {}).items():
        *parents, name = path.split(".")
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = value
    return config_class.from_dict(values)
