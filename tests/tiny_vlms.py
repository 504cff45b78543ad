"""Tiny random vision-language models of real classes, with real processors and chat templates like the released ones."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers as hf
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from rewarddance_hf.models.vlm_processor_rewarddance import image_only_processor


CORPUS = [
    "You judge the output of image and video generators. Is image 2 better than image 1 by these criteria? yes no Yes No",
    "Generation prompt: a red circle left of a blue square. Criteria: two green triangles. Answer yes or no.",
    "system\nuser\nassistant\nmodel\nUser: Assistant: yes no",
]

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}

PARTS = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}PLACEHOLDER{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n" + PARTS + "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# LLaVA-OneVision writes all images of a turn before its text.
IMAGES_BEFORE_TEXT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} "
    "{% for part in message['content'] if part['type'] == 'image' %}<image>{% endfor %}\n"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n" + PARTS + "<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# Idefics3 and SmolVLM end the opening of a turn in a colon, so that the answer is the token " yes".
IDEFICS = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{{ ':' if message['content'][0]['type'] == 'image' else ': ' }}" + PARTS + "<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
GLM = (
    "[gMASK]<sop>{% for message in messages %}<|{{ message['role'] }}|>\n" + PARTS + "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def tiny_tokenizer(specials: list[str], pad: str, eos: str, bos: str | None = None, **named: str):
    """Byte-level BPE tokenizer in which "yes" and " yes" are single tokens, and `specials` are special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS * 4, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, eos_token=eos, bos_token=bos, extra_special_tokens=named
    )


def image_only(name: str) -> type:
    return image_only_processor(getattr(hf, name))


def internvl():
    tokenizer = tiny_tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"],
        pad="<|endoftext|>",
        eos="<|im_end|>",
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    image_processor = hf.GotOcr2ImageProcessorPil(
        size={"height": 28, "width": 28}, crop_to_patches=False, min_patches=1, max_patches=4
    )
    processor = image_only("InternVLProcessor")(
        image_processor, tokenizer, image_seq_length=4, chat_template=CHATML.replace("PLACEHOLDER", "<IMG_CONTEXT>\n")
    )
    config = hf.InternVLConfig(
        text_config={"model_type": "qwen2", **_text_ids(tokenizer), **TEXT},
        vision_config={"model_type": "internvl_vision", "image_size": 28, "patch_size": 7, **VISION},
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    return config, processor


def _text_ids(tokenizer) -> dict[str, int]:
    return {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }


def _qwen(processor_name: str, patch_size: int):
    tokenizer = tiny_tokenizer(
        "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>".split(),
        pad="<|endoftext|>",
        eos="<|im_end|>",
    )
    side = 2 * patch_size
    image_processor = hf.Qwen2VLImageProcessorPil(
        patch_size=patch_size, size={"shortest_edge": side**2, "longest_edge": 16 * side**2}
    )
    processor = image_only(processor_name)(
        image_processor,
        tokenizer,
        chat_template=CHATML.replace("PLACEHOLDER", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in {
            "image": "image_pad",
            "video": "video_pad",
            "vision_start": "vision_start",
            "vision_end": "vision_end",
        }.items()
    }
    return tokenizer, processor, ids


def qwen2_5_vl():
    tokenizer, processor, ids = _qwen("Qwen2_5_VLProcessor", patch_size=7)
    config = hf.Qwen2_5_VLConfig(
        text_config={
            **_text_ids(tokenizer),
            **TEXT,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "patch_size": 7,
            "window_size": 28,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
        },
        **ids,
    )
    return config, processor


def qwen3_vl():
    tokenizer, processor, ids = _qwen("Qwen3VLProcessor", patch_size=8)
    config = hf.Qwen3VLConfig(
        text_config={
            **_text_ids(tokenizer),
            **TEXT,
            "num_hidden_layers": 3,  # what vision layers add after the last layer reaches no answer
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [2, 3, 3],
                "mrope_interleaved": True,
                "rope_theta": 5e6,
            },
        },
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "patch_size": 8,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        **ids,
    )
    return config, processor


def llava_onevision():
    tokenizer = tiny_tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"], pad="<|endoftext|>", eos="<|im_end|>"
    )
    grid = [[28, 28], [28, 56], [56, 28], [56, 56]]
    image_processor = hf.LlavaOnevisionImageProcessorPil(size={"height": 28, "width": 28}, image_grid_pinpoints=grid)
    processor = image_only("LlavaOnevisionProcessor")(
        image_processor,
        tokenizer,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=IMAGES_BEFORE_TEXT,
        vision_aspect_ratio="anyres_max_9",
    )
    config = hf.LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **_text_ids(tokenizer), **TEXT},
        vision_config={
            "model_type": "siglip_vision_model",
            "image_size": 28,
            "patch_size": 7,
            "vision_use_head": False,
            **VISION,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=grid,
        vision_feature_layer=-1,
    )
    return config, processor


def gemma3():
    tokenizer = tiny_tokenizer(
        [
            *("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
            *("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
        ],
        pad="<pad>",
        eos="<eos>",
        bos="<bos>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
        image_token="<image_soft_token>",
    )
    processor = hf.Gemma3Processor(
        hf.Gemma3ImageProcessorPil(size={"height": 28, "width": 28}),
        tokenizer,
        chat_template=GEMMA.replace("PLACEHOLDER", "<start_of_image>"),
        image_seq_length=4,
    )
    config = hf.Gemma3Config(
        text_config={
            **_text_ids(tokenizer),
            **TEXT,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 16,
            "sliding_window_pattern": 2,
        },
        vision_config={
            "model_type": "siglip_vision_model",
            "image_size": 28,
            "patch_size": 7,
            "vision_use_head": False,
            **VISION,
        },
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )
    return config, processor


def glm4v():
    tokenizer = tiny_tokenizer(
        [
            *("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"),
            *("<|begin_of_image|>", "<|end_of_image|>", "<|image|>"),
            *("<|begin_of_video|>", "<|end_of_video|>", "<|video|>"),
        ],
        pad="<|endoftext|>",
        eos="<|endoftext|>",
    )
    image_processor = hf.Glm4vImageProcessorPil(
        patch_size=7, size={"shortest_edge": 2 * 14**2, "longest_edge": 2 * 14**2 * 16}
    )
    processor = image_only("Glm4vProcessor")(
        image_processor,
        tokenizer,
        chat_template=GLM.replace("PLACEHOLDER", "<|begin_of_image|><|image|><|end_of_image|>"),
    )
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in {
            "image": "image",
            "video": "video",
            "image_start": "begin_of_image",
            "image_end": "end_of_image",
            "video_start": "begin_of_video",
            "video_end": "end_of_video",
        }.items()
    }
    config = hf.Glm4vConfig(
        text_config={
            **_text_ids(tokenizer),
            **TEXT,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [2, 3, 3],
                "rope_theta": 1e4,
                "partial_rotary_factor": 1.0,
            },
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "patch_size": 7,
            "image_size": 28,
            "out_hidden_size": 64,
        },
        **ids,
    )
    return config, processor


def _idefics(processor_name: str, image_processor_name: str, config_name: str):
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    tokenizer = tiny_tokenizer(
        [
            *("<pad>", "<|im_start|>", "<end_of_utterance>", "<image>", "<fake_token_around_image>", "<global-img>"),
            *tiles,
        ],
        pad="<pad>",
        eos="<end_of_utterance>",
        bos="<|im_start|>",
    )
    image_processor = getattr(hf, image_processor_name)(
        size={"longest_edge": 56}, max_image_size={"longest_edge": 28}, do_image_splitting=True
    )
    processor = image_only(processor_name)(
        image_processor, tokenizer, image_seq_len=4, chat_template=IDEFICS.replace("PLACEHOLDER", "<image>")
    )
    config = getattr(hf, config_name)(
        text_config={"model_type": "llama", **_text_ids(tokenizer), **TEXT},
        vision_config={"image_size": 28, "patch_size": 7, **VISION},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    return config, processor


def idefics3():
    return _idefics("Idefics3Processor", "Idefics3ImageProcessorPil", "Idefics3Config")


def smolvlm():
    return _idefics("SmolVLMProcessor", "SmolVLMImageProcessorPil", "SmolVLMConfig")


FAMILIES: dict[str, Callable] = {
    family.__name__: family
    for family in (internvl, qwen2_5_vl, qwen3_vl, llava_onevision, smolvlm, gemma3, glm4v, idefics3)
}


def save_tiny_vlm(family: str, folder: Path, seed: int = 0) -> Path:
    """Save the checkpoint of a tiny plain model, as its authors would release it."""
    config, processor = FAMILIES[family]()
    torch.manual_seed(seed)
    model = hf.AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():  # at the default initialization all scores are nearly equal
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "embed" not in name:
                parameter.mul_(3.0)
            if parameter.ndim >= 2 and parameter.abs().max() == 0:  # zero at initialization in Gemma 3
                parameter.normal_(0, 0.1)
            if "position_embedding" in name or "pos_embed" in name:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def random_image(seed: int, width: int = 40, height: int = 40) -> Image.Image:
    """A smooth random image."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
