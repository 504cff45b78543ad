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
    return hf.GemmaTokenizer(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[])


def qwen_tokenizer():
    tokenizer = hf.Qwen2Tokenizer(vocab=byte_vocabulary(**QWEN_TOKENS), merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": list(QWEN_TOKENS)})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def qwen_processor():
    images = hf.Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56})
    return hf.Qwen2VLProcessor(
        images, qwen_tokenizer(), hf.Qwen2VLVideoProcessor() if hasattr(hf, "Qwen2VLVideoProcessor") else None,
        chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


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
    "hf-internal-testing/tiny-random-Qwen2VLForConditionalGeneration": [qwen_tokenizer, qwen_processor],
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
                failed[name] = f"{make.__name__}: {error!r}"
    return failed
