"""Random judges with the proportions of released models, for benchmarks: no weights are downloaded."""

from typing import Any
from unittest import mock

import torch
import transformers


PROMPT = "two green triangles left of a blue square, watercolor"

# Parameters of vision encoder to those of the language model's layers: 0.69 in InternVL3.5-1B, 0.22 in InternVL3.5-2B.
PROPORTIONS: dict[str, dict[str, Any]] = {
    "13m": {"hidden_size": 320, "intermediate_size": 960, "heads": 10, "vision": 256, "vision_layers": 6},
    "13m_2b": {"hidden_size": 320, "intermediate_size": 960, "heads": 10, "vision": 256, "vision_layers": 2},
    "3m": {"hidden_size": 160, "intermediate_size": 480, "heads": 10, "vision": 128, "vision_layers": 6},
}


def tiny_config(size: str) -> dict[str, dict[str, Any]]:
    """Configurations of language model and vision encoder of a small judge."""
    part = PROPORTIONS[size]
    text = {
        "model_type": "qwen3",
        "hidden_size": part["hidden_size"],
        "intermediate_size": part["intermediate_size"],
        "num_hidden_layers": 5,
        "num_attention_heads": part["heads"],
        "num_key_value_heads": part["heads"] // 2,
        "head_dim": part["hidden_size"] // 5,
    }
    vision = {
        "hidden_size": part["vision"],
        "intermediate_size": 4 * part["vision"],
        "num_attention_heads": 4,
        "num_hidden_layers": part["vision_layers"],
    }
    return {"text_config": text, "vision_config": vision}


def tiny_internvl() -> tuple[Any, Any]:
    """Configuration and processor of the tests' InternVL, whose tokenizer knows the words of the question."""
    return _with_words_of_the_question("internvl")


def _with_words_of_the_question(family: str) -> tuple[Any, Any]:
    import tiny_vlms

    from rewarddance_hf.models.prompting_rewarddance import CRITERIA, PROMPT_TEXTS

    words = [*CRITERIA.values(), *PROMPT_TEXTS.values(), PROMPT, *tiny_vlms.CORPUS, "yes", "no"]
    with mock.patch.object(tiny_vlms, "CORPUS", words):
        return tiny_vlms.FAMILIES[family]()


def make_judge(
    num_tokens: int,
    layout: str,
    text_config: dict[str, Any],
    vision_config: dict[str, Any],
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, Any]:
    """Random judge of InternVL's classes, whose images are squares of `num_tokens` tokens, and its processor."""
    import tiny_vlms

    from rewarddance_hf import RewardDanceProcessor

    _, tiny = tiny_internvl()
    tokenizer = tiny.tokenizer
    side = round(num_tokens**0.5) * 28
    vlm_config = transformers.InternVLConfig(
        text_config={"max_position_embeddings": 8192, **tiny_vlms._text_ids(tokenizer), **text_config},
        vision_config={"model_type": "internvl_vision", "image_size": side, "patch_size": 14, **vision_config},
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=num_tokens,
        tie_word_embeddings=False,
    )
    processor = RewardDanceProcessor(
        image_processor=transformers.GotOcr2ImageProcessorPil(
            size={"height": side, "width": side}, crop_to_patches=False
        ),
        tokenizer=tokenizer,
        chat_template=tiny.chat_template,
        vlm_processor_class="InternVLProcessor",
        vlm_processor_kwargs={"image_seq_length": num_tokens},
        vlm_images_kwargs={"crop_to_patches": False},
        prompt_layout=layout,
    )
    return random_judge(vlm_config, processor, device, dtype), processor


def make_qwen3_vl(
    num_tokens: int,
    layout: str,
    text_config: dict[str, Any],
    vision_config: dict[str, Any],
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, Any]:
    """The same of Qwen3-VL's classes, whose images have 32 pixels a token and side."""
    from rewarddance_hf import RewardDanceProcessor

    vlm_config, tiny = _with_words_of_the_question("qwen3_vl")
    vlm_config.tie_word_embeddings = False
    text = {**vlm_config.text_config.to_dict(), "max_position_embeddings": 8192, **text_config}
    vlm_config.text_config = type(vlm_config.text_config)(**text)
    vlm_config.vision_config = type(vlm_config.vision_config)(**vision_config)
    pixels = num_tokens * (2 * vision_config["patch_size"]) ** 2
    processor = RewardDanceProcessor(
        image_processor=transformers.Qwen2VLImageProcessorPil(
            patch_size=vision_config["patch_size"], size={"shortest_edge": pixels, "longest_edge": pixels}
        ),
        tokenizer=tiny.tokenizer,
        chat_template=tiny.chat_template,
        vlm_processor_class="Qwen3VLProcessor",
        prompt_layout=layout,
    )
    return random_judge(vlm_config, processor, device, dtype), processor


def random_judge(vlm_config: Any, processor: Any, device: str, dtype: torch.dtype) -> Any:
    """Judge without gradients, made on its device."""
    from rewarddance_hf import RewardDanceConfig, RewardDanceForYesScoring

    config = RewardDanceConfig(
        vlm_config=vlm_config,
        yes_token_id=processor.yes_token_id,
        no_token_id=processor.no_token_id,
        score_normalization="yes_no",
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = RewardDanceForYesScoring(config)
    finally:
        torch.set_default_dtype(before)
    return model.to(device, dtype).requires_grad_(False).eval()
