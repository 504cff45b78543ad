"""Processor of a judge that is to be trained."""

import os
from typing import Any

from ..models import RewardDanceProcessor


def load_processor(name: str | os.PathLike, **kwargs: Any) -> RewardDanceProcessor:
    """
    Processor of a judge, or one for a judge that is new: it sees an image as a whole, unless `kwargs` or the checkpoint of a
    judge say otherwise. Tiles make up to 13 times the tokens (InternVL: 3,328 instead of 256).
    """
    processor = RewardDanceProcessor.from_pretrained(name, **kwargs)
    settings = {key: value for key, value in kwargs.items() if key in ("cache_dir", "revision", "token", "subfolder")}
    saved, _ = RewardDanceProcessor.get_processor_dict(name, **settings)
    is_new = "vlm_processor_class" not in saved and "vlm_images_kwargs" not in kwargs
    if is_new and hasattr(processor.image_processor, "crop_to_patches"):
        processor.vlm_images_kwargs = {"crop_to_patches": False}
    return processor
