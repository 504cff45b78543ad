"""Tiny judges that vLLM serves on a CPU: their heads have 32 dimensions."""

from pathlib import Path

import tiny_vlms
import torch

from rewarddance_hf import RewardDanceForYesScoring, RewardDanceProcessor, RewardDanceScorer


FAMILIES = ("internvl", "qwen2_5_vl", "qwen3_vl")
WIDTH = 128  # of four heads
SECTIONS = [4, 6, 6]  # of rotary positions, half a head


def save_wide_judge(family: str, folder: Path, backend: str = "pil") -> Path:
    """A pairwise judge of a family, with the image processor that the engine uses if `backend` is torchvision."""
    build = tiny_vlms.FAMILIES[family]

    def wide():
        config, processor = build()
        if hasattr(config.vision_config, "out_hidden_size"):
            config.vision_config.out_hidden_size = WIDTH
        rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
        if "mrope_section" in rope:
            rope["mrope_section"] = SECTIONS
        if hasattr(config.get_text_config(), "head_dim"):
            config.get_text_config().head_dim = 32
        return config, processor

    kept = dict(tiny_vlms.TEXT), tiny_vlms.FAMILIES[family]
    tiny_vlms.TEXT.update(hidden_size=WIDTH, intermediate_size=2 * WIDTH)
    tiny_vlms.FAMILIES[family] = wide
    try:
        plain = tiny_vlms.save_tiny_vlm(family, folder / "plain")
    finally:
        tiny_vlms.TEXT.clear()
        tiny_vlms.TEXT.update(kept[0])
        tiny_vlms.FAMILIES[family] = kept[1]
    settings = {"vlm_images_kwargs": {"crop_to_patches": False}} if family == "internvl" else {}
    processor = RewardDanceProcessor.from_pretrained(plain, backend=backend, **settings)
    model = RewardDanceForYesScoring.from_pretrained(plain, dtype=torch.float32)
    RewardDanceScorer(model, processor).save_pretrained(folder / "judge")
    return folder / "judge"
