"""
Tokens that each family makes of an image of 512 x 512 and of 1024 x 1024 pixels, with the settings of a released checkpoint:
`python tests/sweeps/image_tokens.py`. Settings are written down here, so that nothing is downloaded.
"""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import transformers as hf


sys.path.insert(0, str(Path(__file__).parents[1]))  # the tiny models of the tests

import tiny_vlms


SIDES = (512, 1024)
# Checkpoint -> family, image processor, arguments of it at the call, and attributes of the processor
Settings = tuple[str, Any, dict[str, Any], dict[str, Any]]
CHECKPOINTS: dict[str, Settings] = {
    "InternVL3.5 (without tiles)": (
        "internvl",
        lambda: hf.GotOcr2ImageProcessorPil(size={"height": 448, "width": 448}),
        {"crop_to_patches": False},
        {"image_seq_length": 256},
    ),
    "InternVL3.5 (up to 12 tiles)": (
        "internvl",
        lambda: hf.GotOcr2ImageProcessorPil(size={"height": 448, "width": 448}),
        {"crop_to_patches": True, "min_patches": 1, "max_patches": 12},
        {"image_seq_length": 256},
    ),
    "Qwen2.5-VL": (
        "qwen2_5_vl",
        lambda: hf.Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": 12845056}),
        {},
        {},
    ),
    "Qwen3-VL": (
        "qwen3_vl",
        lambda: hf.Qwen2VLImageProcessorPil(patch_size=16, size={"shortest_edge": 65536, "longest_edge": 16777216}),
        {},
        {},
    ),
    "LLaVA-OneVision": (
        "llava_onevision",
        lambda: hf.LlavaOnevisionImageProcessorPil(),
        {},
        {"num_image_tokens": 729},
    ),
    "SmolVLM2-2.2B": (
        "smolvlm",
        lambda: hf.SmolVLMImageProcessorPil(size={"longest_edge": 1536}, max_image_size={"longest_edge": 384}),
        {},
        {"image_seq_len": 81},
    ),
    "Gemma 3": ("gemma3", lambda: hf.Gemma3ImageProcessorPil(), {}, {"image_seq_length": 256}),
    "GLM-4.1V": ("glm4v", lambda: hf.Glm4vImageProcessorPil(), {}, {}),
    "Idefics3-8B": (
        "idefics3",
        lambda: hf.Idefics3ImageProcessorPil(size={"longest_edge": 1456}, max_image_size={"longest_edge": 364}),
        {},
        {"image_seq_len": 169},
    ),
}


def count(checkpoint: str, side: int) -> int:
    """Tokens of one square image."""
    family, make_image_processor, arguments, attributes = CHECKPOINTS[checkpoint]
    _, processor = getattr(tiny_vlms, family)()
    processor.image_processor = make_image_processor()
    for name, value in attributes.items():
        getattr(processor, name)  # an attribute that the processor does not have would change nothing
        setattr(processor, name, value)
    if family == "gemma3":  # it writes its text once
        processor = hf.Gemma3Processor(processor.image_processor, processor.tokenizer, **attributes)
    image = tiny_vlms.random_image(0, side, side)
    ids = processor(text=[processor.image_token], images=[[image]], **arguments)["input_ids"][0]
    return Counter(ids).most_common(1)[0][1]


def main() -> None:
    sys.stdout.write(f"| checkpoint | {' | '.join(f'{side} x {side}' for side in SIDES)} |\n|---|---|---|\n")
    for checkpoint in CHECKPOINTS:
        sys.stdout.write(f"| {checkpoint} | {' | '.join(f'{count(checkpoint, side):,}' for side in SIDES)} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
