"""
Export of a judge for engines that serve vision-language models, e.g. vLLM: the wrapped model under its own architecture with its
adapters merged, a stock processor, a chat template that ends where the answer begins, and `score.json`, which says how the
probability of an answer becomes a reward.
"""

import json
import os
from pathlib import Path
from typing import Any

from ..models import RewardDanceForYesScoring, RewardDanceProcessor
from ..resumable import write_atomically
from ..scoring.loading import load_judge, merge_adapters
from ..scoring.scorer import RewardDanceScorer


SCORE_FILE = "score.json"
JUDGE_FOLDER = "judge"  # inside an export: our processor, which renders questions and knows the answer tokens
FORMATS = ("vllm",)
# Families whose log-odds by vLLM were compared with ours (README.md beside this file), with the video processor that vLLM loads.
VIDEO_PROCESSORS = {
    "InternVLProcessor": "InternVLVideoProcessor",
    "Qwen2_5_VLProcessor": "Qwen2VLVideoProcessor",
    "Qwen3VLProcessor": "Qwen3VLVideoProcessor",
    "Glm4vProcessor": "Glm4vVideoProcessor",
    "SmolVLMProcessor": "SmolVLMVideoProcessor",
    "Idefics3Processor": None,
}
# Settings that image and video processors of a family share
SHARED_SETTINGS = (
    "size",
    "patch_size",
    "merge_size",
    "temporal_patch_size",
    "image_mean",
    "image_std",
    "do_resize",
    "resample",
)


def export_judge(
    name_or_path: str | os.PathLike, folder: str | os.PathLike, dtype: Any = "auto", **kwargs: Any
) -> Path:
    """
    Write a judge as engines load it.

    Args:
        name_or_path (`str` or `os.PathLike`):
            Judge: repository ID or folder, of a checkpoint or an adapter.
        folder (`str` or `os.PathLike`):
            Folder to write, which must be empty or missing.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
            Type of the weights.
        kwargs:
            Arguments of the Hub: `revision`, `token`, ...

    Returns:
        `Path`: The folder.

    Raises:
        `ValueError`: If the folder is not empty, or engines cannot serve such a judge: a scalar head, or a family whose parity
            is not known.
    """
    place = Path(folder)
    if place.exists() and any(place.iterdir()):
        raise ValueError(
            f"`output_dir` {os.fspath(folder)!r} is not empty. Choose another folder, or remove what is there."
        )
    model, processor = load_judge(name_or_path, dtype=dtype, **kwargs)
    _check(model, processor)
    fingerprint = RewardDanceScorer(model, processor).fingerprint()
    model = merge_adapters(model)
    place.mkdir(parents=True, exist_ok=True)
    config = model.config
    model.vlm.config.architectures = [type(model.vlm).__name__]
    model.vlm.save_pretrained(place)
    _save_stock_processor(processor, place)
    processor.save_pretrained(place / JUDGE_FOLDER)
    score = {
        "format": 1,
        "fingerprint": fingerprint,
        "paradigm": config.paradigm,
        "yes_token_id": config.yes_token_id,
        "no_token_id": config.no_token_id,
        "score_normalization": config.score_normalization,
        "score_temperature": config.score_temperature,
        "prompt_layout": processor.prompt_layout,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    write_atomically(place / SCORE_FILE, (json.dumps(score, indent=2) + "\n").encode())
    return place


def _check(model: RewardDanceForYesScoring, processor: RewardDanceProcessor) -> None:
    if model.config.has_scalar_head:
        raise ValueError(
            "The judge is regressive, and engines give probabilities of tokens, not its scalar head. Serve it with "
            "`rewarddance serve`."
        )
    if processor.vlm_processor_class not in VIDEO_PROCESSORS:
        raise ValueError(
            f"The judge has a `{processor.vlm_processor_class}`, but engines were found equal only for {sorted(VIDEO_PROCESSORS)}. "
            "Serve it with `rewarddance serve`."
        )


def _save_stock_processor(processor: RewardDanceProcessor, place: Path) -> None:
    """What `AutoProcessor` of an engine finds, with our settings of each call and the end of our questions in it."""
    vlm_processor: Any = processor.vlm_processor
    vlm_processor.save_pretrained(place)
    image_settings = {**processor.vlm_images_kwargs}
    if processor.vlm_processor_class == "InternVLProcessor" and image_settings.get("crop_to_patches") is False:
        image_settings |= {"min_patches": 1, "max_patches": 1}  # the class asks for tiles, whatever the file says
    path = place / "processor_config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    saved.pop("auto_map", None)
    saved["processor_class"] = processor.vlm_processor_class
    image_processor = {**saved.get("image_processor", processor.image_processor.to_dict()), **image_settings}
    image_processor.pop("auto_map", None)
    saved["image_processor"] = image_processor
    # Not its class: where torchvision is missing, transformers has none.
    video = VIDEO_PROCESSORS[str(processor.vlm_processor_class)]
    if video is not None:
        shared = {name: image_processor[name] for name in SHARED_SETTINGS if name in image_processor}
        saved["video_processor"] = {**shared, "video_processor_type": video}
    path.write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")
    template = str(processor.chat_template)
    if processor._answer_lead:
        template += "{% if add_generation_prompt %}{{ " + json.dumps(processor._answer_lead) + " }}{% endif %}"
    (place / "chat_template.jinja").write_text(template, encoding="utf-8")
