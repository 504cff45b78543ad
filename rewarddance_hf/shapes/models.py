"""The tiny vision-language model of the shapes world: a real InternVL class at 1/1000 of the size."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    PreTrainedTokenizerFast,
)

from ..models import RewardDanceProcessor
from ..models.vlm_processor_rewarddance import image_only_processor
from .captions import caption_words
from .preferences import DEGRADATIONS, QUALITY_CRITERIA, SHARP


RATIONALE_WORDS = [*DEGRADATIONS, SHARP, QUALITY_CRITERIA, ","]


# Plain checkpoint of the tiny model, trained on captioning by `base.py`.
BASE_VLM = Path(__file__).parent / "base_vlm"
# Those of `ladder.py`, in folders named by their size, and where they were taught to read the prompt.
LADDER_VLMS = Path(__file__).parent / "ladder_vlms"
LADDER_LAYOUT = "text_after_each"
# The one that judges of drawings start from; those of clips and edits start from `BASE_VLM`.
JUDGE_BASE = LADDER_VLMS / "0.7m"


@dataclass(frozen=True)
class VlmSize:
    """Widths, layers and attention heads of a tiny model."""

    text_width: int
    text_layers: int
    text_heads: int
    vision_width: int
    vision_layers: int
    vision_heads: int


SHIPPED_SIZE = VlmSize(96, 3, 4, 64, 2, 4)

IMAGE_SIZE = 32
PATCH_SIZE = 8
IMAGE_SEQ_LENGTH = (IMAGE_SIZE // PATCH_SIZE // 2) ** 2  # pixels are shuffled 2x2 into one token

# Short wording and criteria: at this size every token counts.
PROMPT_TEXTS = {
    "system": "",
    "prompt": "Prompt: {prompt}.",
    "criteria": "Criteria: {criteria}.",
    "pairwise_question": "Is {noun} 2 better than {noun} 1?",
    "pointwise_question": "Is this {noun} right?",
    # Clips are told in the words that the base model knows.
    "video": "image",
    "condition": "Image: ",
    "first_frame": "{name}: ",
    "frame": "",
}
CRITERIA = {"text-to-image": "what the picture shows"}

SPECIAL_TOKENS = ["<pad>", "<|user|>", "<|assistant|>", "<|end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<IMG_CONTEXT>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer(words: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """
    Byte-level tokenizer with the special tokens of InternVL, in which every word of captions, rationales and questions of judges
    is one token, and further `words` are.
    """
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    # Merging goes on until each word is one token, at the start of a text as well as after a space.
    corpus = [f"{space}{word}" for word in sorted({*_words(), *words}) for space in ("", " ")]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=10_000, min_frequency=1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|end|>",
        padding_side="left",
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )


def _words() -> set[str]:
    """Words and signs of captions, rationales and questions."""
    wording = " ".join([*PROMPT_TEXTS.values(), *CRITERIA.values(), *RATIONALE_WORDS, "Image 3 Describe it. yes no"])
    wording = re.sub(r"\{\w+\}", "image", wording)
    return {*caption_words(), *re.findall(r"[A-Za-z]+|[^\sA-Za-z]", wording), '."', '".', ":", '"'}


def build_vlm(
    tokenizer: PreTrainedTokenizerFast, seed: int = 0, size: VlmSize = SHIPPED_SIZE
) -> InternVLForConditionalGeneration:
    """A tiny model with random weights, which sees an image as 4 tokens; by default of the size of `BASE_VLM`."""
    # At this size the usual 0.02 is too small to learn from.
    initializer_range = 0.05
    config = InternVLConfig(
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "hidden_size": size.text_width,
            "intermediate_size": 2 * size.text_width,
            "num_hidden_layers": size.text_layers,
            "num_attention_heads": size.text_heads,
            "num_key_value_heads": size.text_heads,
            "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            "initializer_range": initializer_range,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
        },
        vision_config={
            "model_type": "internvl_vision",
            "image_size": [IMAGE_SIZE, IMAGE_SIZE],
            "patch_size": [PATCH_SIZE, PATCH_SIZE],
            "hidden_size": size.vision_width,
            "intermediate_size": 2 * size.vision_width,
            "num_hidden_layers": size.vision_layers,
            "num_attention_heads": size.vision_heads,
            "layer_scale_init_value": 1.0,
            "initializer_range": initializer_range,
        },
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=IMAGE_SEQ_LENGTH,
        tie_word_embeddings=False,
        initializer_range=initializer_range,
    )
    torch.manual_seed(seed)
    model = InternVLForConditionalGeneration(config)
    with torch.no_grad():  # zero at initialization, which costs hundreds of steps at this size
        model.model.vision_tower.embeddings.position_embeddings.normal_(0, 0.1)
    return model


def build_vlm_processor(tokenizer: PreTrainedTokenizerFast) -> InternVLProcessor:
    """Stock processor of the tiny model, without its video part, which needs torchvision."""
    image_processor = GotOcr2ImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, crop_to_patches=False, min_patches=1, max_patches=1
    )
    return image_only_processor(InternVLProcessor)(
        image_processor, tokenizer, image_seq_length=IMAGE_SEQ_LENGTH, chat_template=CHAT_TEMPLATE
    )


def judge_processor(vlm: str | Path = BASE_VLM, **kwargs: Any) -> RewardDanceProcessor:
    """
    Processor of a judge of shapes: of a saved one as it was saved, of a base model with the short wording of this world and, if it is one of
    the ladder that ships, the layout that it was taught. `kwargs` are further arguments of it, in place of those.
    """
    saved, _ = RewardDanceProcessor.get_processor_dict(vlm)
    of_base_model = {
        "prompt_texts": PROMPT_TEXTS,
        "criteria": CRITERIA,
        "vlm_images_kwargs": {"crop_to_patches": False},
        "prompt_layout": LADDER_LAYOUT if Path(vlm).parent == LADDER_VLMS else "text_first",
    }
    settings = {} if "vlm_processor_class" in saved else of_base_model
    return RewardDanceProcessor.from_pretrained(vlm, **{**settings, **kwargs})
