"""Other judges of images as reward functions: CLIPScore, PickScore, and functions named on the command line."""

import importlib
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from ..models.media_rewarddance import load_frames


CLIPSCORE_MODEL = "openai/clip-vit-large-patch14"
# PickScore was published without a processor: it uses that of the model it was tuned from.
PICKSCORE_MODEL = "yuvalkirstain/PickScore_v1"
PICKSCORE_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class CLIPJudge:
    r"""
    Similarity of prompt and image by a CLIP model, times its learned scale: CLIPScore
    ([paper](https://huggingface.co/papers/2104.08718)) without its prefix "A photo depicts" and without its clipping at 0,
    and PickScore ([paper](https://huggingface.co/papers/2305.01569)), which is a CLIP model that was tuned on preferences.
    A clip scores the mean of its frames. Prompts are cut after 77 tokens, images go through the PIL image processor.

    Args:
        model (`transformers.CLIPModel`):
            Model.
        image_processor (`BaseImageProcessor`):
            Image processor.
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer.

    Example:

    ```python
    judge = CLIPJudge.from_pretrained("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K")
    judge([image], ["a red circle"])  # tensor of shape (1,)
    ```
    """

    def __init__(self, model: CLIPModel, image_processor: Any, tokenizer: Any) -> None:
        self.model = model.eval()
        self.image_processor = image_processor
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        processor_name_or_path: str | os.PathLike | None = None,
        device: str | torch.device = "cpu",
        **kwargs: Any,
    ) -> "CLIPJudge":
        """
        Load a CLIP model.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                Repository ID on the Hub or local folder.
            processor_name_or_path (`str` or `os.PathLike`, *optional*):
                Where image processor and tokenizer are, if not there.
            device (`str` or `torch.device`, *optional*, defaults to `"cpu"`):
                Device.
            kwargs:
                Arguments of `CLIPModel.from_pretrained`, e.g. `dtype`, `revision`.

        Returns:
            [`CLIPJudge`]

        Raises:
            `ValueError`: If it is not a complete CLIP model.
        """
        model: Any
        info: Any
        model, info = CLIPModel.from_pretrained(  # type: ignore[misc]  # a pair, with `output_loading_info`
            pretrained_model_name_or_path, output_loading_info=True, use_safetensors=True, **kwargs
        )
        if info["missing_keys"]:
            raise ValueError(
                f"{str(pretrained_model_name_or_path)!r} lacks {len(info['missing_keys'])} weights of a CLIP model (first: "
                f"{sorted(info['missing_keys'])[:3]}), which would be random numbers. Choose a CLIP model of transformers."
            )
        processor = processor_name_or_path or pretrained_model_name_or_path
        return cls(
            model.to(device),
            AutoImageProcessor.from_pretrained(processor, backend="pil"),
            AutoTokenizer.from_pretrained(processor),
        )

    @torch.no_grad()
    def __call__(self, images: list[Any], prompts: list[str], **context: Any) -> torch.Tensor:
        """Scores `(n,)` of images, or of clips as lists of frames. CLIP ignores task, criteria and conditions."""
        frames = [load_frames(sample, f"images[{i}]") for i, sample in enumerate(images)]
        pixels = self.image_processor([f for clip in frames for f in clip], return_tensors="pt")["pixel_values"]
        text = self.tokenizer(
            prompts,
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        device = self.model.device
        outputs = self.model(
            input_ids=text["input_ids"].to(device),
            attention_mask=text["attention_mask"].to(device),
            pixel_values=pixels.to(device, self.model.dtype),
        )
        owners = torch.arange(len(frames)).repeat_interleave(torch.tensor([len(clip) for clip in frames]))
        similarities = outputs.logits_per_image.float().cpu()[torch.arange(len(owners)), owners]
        sums = torch.zeros(len(frames)).index_add_(0, owners, similarities)
        return sums / torch.bincount(owners)


def load_baseline(name: str, device: str | torch.device = "cpu", dtype: Any = "auto") -> Callable[..., Any] | None:
    """
    Another judge by its name on the command line: `"clipscore"`, `"pickscore"`, either with `":<repository ID or folder>"` of
    other weights, or `"<module>:<function>"`, whose module may lie in the working folder. None for anything else, such as
    the repository ID of a judge; a `ValueError` if the module has no such function.
    """
    kind, _, weights = name.partition(":")
    if kind == "clipscore":
        return CLIPJudge.from_pretrained(weights or CLIPSCORE_MODEL, device=device, dtype=dtype)
    if kind == "pickscore":
        processor = None if weights else PICKSCORE_PROCESSOR
        return CLIPJudge.from_pretrained(weights or PICKSCORE_MODEL, processor, device=device, dtype=dtype)
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        return None
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(kind)
    finally:
        sys.path.remove(os.getcwd())
    function = vars(module).get(weights)
    if not callable(function):
        raise ValueError(f"`{name}` names no function: {kind!r} has no callable {weights!r}. Check its spelling.")
    return function
