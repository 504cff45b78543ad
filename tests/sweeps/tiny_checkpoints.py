"""Tiny random checkpoints under the names that diffusers' tests load from the Hub, for a working folder without network."""

from pathlib import Path

import diffusers
import transformers as hf
from tokenizers import pre_tokenizers


QWEN_TOKENS = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|vision_pad|>": 151654,
    "<|image_pad|>": 151655,
    "<|video_pad|>": 151656,
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LETTERS = [chr(code) for code in range(33, 127)]


def byte_vocabulary(**specials: int) -> dict[str, int]:
    return {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | specials


def clip_tokenizer():
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols += [f"{symbol}</w>" for symbol in symbols] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    return hf.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def t5_tokenizer():
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((letter, -3.0) for letter in LETTERS)]
    return hf.T5Tokenizer(vocab=pieces, extra_ids=0)


def gemma_tokenizer():
    symbols = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", *LETTERS]
    return hf.GemmaTokenizer(
        vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[], add_bos_token=True
    )


def qwen_tokenizer():
    tokenizer = hf.Qwen2Tokenizer(vocab=byte_vocabulary(**QWEN_TOKENS), merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": list(QWEN_TOKENS)})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def llama_tokenizer():
    symbols = ["<unk>", "<s>", "</s>", "\u2581", *LETTERS]
    tokenizer = hf.LlamaTokenizer(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[])
    tokenizer.pad_token = "</s>"
    return tokenizer


def bert_tokenizer():
    symbols = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    return hf.BertTokenizer(vocab={symbol: index for index, symbol in enumerate(symbols)}, model_max_length=77)


def glm_tokenizer():
    tokenizer = hf.Qwen2Tokenizer(
        vocab=byte_vocabulary(**{"<|endoftext|>": 300}), merges=[]
    )  # within a smaller vocabulary
    tokenizer.padding_side = "left"
    return tokenizer


def qwen2_vl_processor():
    pixels = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    return hf.Qwen2VLProcessor(
        hf.Qwen2VLImageProcessor(size=pixels),
        qwen_tokenizer(),
        hf.Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )


def qwen3_vl_processor():
    images = hf.Qwen2VLImageProcessor(patch_size=16, size={"shortest_edge": 32 * 32, "longest_edge": 64 * 64})
    return hf.Qwen3VLProcessor(images, qwen_tokenizer(), hf.Qwen3VLVideoProcessor(), chat_template=CHAT_TEMPLATE)


def glm_image_processor():
    named = {
        "image_token": "<|image|>",
        "grid_bos_token": "<sop>",
        "grid_eos_token": "<eop>",
        "bos_token": "<|dit_token_16384|>",
    }
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=qwen_tokenizer().backend_tokenizer, pad_token="<|endoftext|>", **named
    )
    images = hf.GlmImageImageProcessorPil(patch_size=8, merge_size=1, min_pixels=32 * 32, max_pixels=64 * 64)
    template = CHAT_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<|image|>")
    return hf.GlmImageProcessor(images, tokenizer, chat_template=template)


def mistral_processor():
    named = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
    tokens = {name: 300 + place for place, name in enumerate(named.values())}
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=hf.Qwen2Tokenizer(vocab=byte_vocabulary(**tokens), merges=[]).backend_tokenizer,
        pad_token=sorted(byte_vocabulary())[0], extra_special_tokens=named,
    )  # fmt: skip
    images = hf.PixtralImageProcessorPil(size={"longest_edge": 32}, patch_size={"height": 6, "width": 6})
    return hf.PixtralProcessor(images, tokenizer, patch_size=6, chat_template=CHAT_TEMPLATE, **named)


def siglip_images():
    return hf.SiglipImageProcessorPil(size={"height": 30, "width": 30})


def depth_images():
    return hf.DPTImageProcessorPil(size={"height": 32, "width": 32})


TEXT = {
    "hidden_size": 16,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def qwen2_vl():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    vision = {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": 32,
        "num_heads": 4,
        "patch_size": 14,
        "spatial_merge_size": 2,
    }
    config = hf.Qwen2VLConfig(
        text_config=TEXT | {"hidden_size": 32, "vocab_size": 152064, "rope_parameters": rope}, vision_config=vision
    )
    return hf.Qwen2VLForConditionalGeneration(config)


def qwen3_vl():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6, "mrope_interleaved": True}
    text = TEXT | {"vocab_size": 152064, "head_dim": 8, "rope_parameters": rope}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 4,
        "out_hidden_size": 16,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "deepstack_visual_indexes": [0, 1],
        "num_position_embeddings": 64,
    }
    return hf.Qwen3VLForConditionalGeneration(hf.Qwen3VLConfig(text_config=text, vision_config=vision))


def gemma3():
    text = TEXT | {"hidden_size": 32, "vocab_size": 128, "head_dim": 8, "sliding_window": 16}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    }
    return hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    )


def llama():
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=32000, **TEXT))


def bert():
    config = {name: value for name, value in TEXT.items() if name != "num_key_value_heads"}
    return hf.BertModel(hf.BertConfig(vocab_size=1124, **config | {"hidden_size": 32}))


def umt5():
    return hf.UMT5EncoderModel(
        hf.UMT5Config(vocab_size=1103, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, pad_token_id=0)
    )


def siglip():
    return hf.SiglipVisionModel(
        hf.SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=30,
            patch_size=2,
        )
    )


def t5():
    return hf.T5EncoderModel(
        hf.T5Config(vocab_size=1103, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, pad_token_id=0)
    )


def controlnet():
    return diffusers.ControlNetModel(
        block_out_channels=(4, 8),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=2,
        conditioning_embedding_out_channels=(2, 4),
    )


# Makers of what is in each repository
CHECKPOINTS = {
    "hf-internal-testing/tiny-random-clip": [clip_tokenizer],
    "hf-internal-testing/tiny-random-t5": [t5_tokenizer, t5],
    "hf-internal-testing/dummy-gemma": [gemma_tokenizer],
    "hf-internal-testing/tiny-gemma3": [gemma_tokenizer, gemma3],
    "hf-internal-testing/tiny-random-Qwen2VLForConditionalGeneration": [qwen_tokenizer, qwen2_vl_processor, qwen2_vl],
    "huangfeice/tiny-random-Qwen3VLForConditionalGeneration": [qwen_tokenizer, qwen3_vl_processor, qwen3_vl],
    "hf-internal-testing/tiny-random-LlamaForCausalLM": [llama_tokenizer, llama],
    "hf-internal-testing/llama-tokenizer": [llama_tokenizer],
    "finetrainers/dummy-hunyaunvideo/tokenizer": [llama_tokenizer],
    "hf-internal-testing/tiny-random-BertModel": [bert_tokenizer, bert],
    "hf-internal-testing/tiny-random-umt5": [umt5],
    "hf-internal-testing/tiny-random-SiglipVisionModel": [siglip_images, siglip],
    "hf-internal-testing/tiny-random-DPTForDepthEstimation": [depth_images],
    "hf-internal-testing/tiny-cosmos3-modular-pipe/text_tokenizer": [qwen_tokenizer],
    "zai-org/GLM-Image/processor": [glm_image_processor],
    "hf-internal-testing/Mistral-Small-3.1-24B-Instruct-2503-only-processor": [mistral_processor],
    "THUDM/glm-4-9b-chat": [glm_tokenizer],
    "hf-internal-testing/tiny-controlnet": [controlnet],
}


def save_checkpoints(folder: Path) -> dict[str, str]:
    """Save all checkpoints under a folder; returns the names of those that could not be made, with the reason."""
    failed = {}
    for name, makers in CHECKPOINTS.items():
        for make in makers:
            try:
                make().save_pretrained(folder / name)
            except Exception as error:
                failed[f"{name}: {make.__name__}"] = repr(error)
    return failed
