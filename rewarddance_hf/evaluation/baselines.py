"""Other judges of images, through the same rows and statistics: CLIPScore, PickScore, any reward function."""

import importlib
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from ..data.preference import check_row
from ..models.processing_rewarddance import load_frames, load_image
from ..models.video_rewarddance import open_clip
from .evaluator import EvaluationResults, RewardDanceEvaluator, _make_results


CLIPSCORE_MODEL = "openai/clip-vit-large-patch14"
# PickScore was published without a processor: it uses that of the model it was tuned from.
PICKSCORE_MODEL = "yuvalkirstain/PickScore_v1"
PICKSCORE_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

# Frames of a clip at equal distances, as a judge sees by default.
MAX_FRAMES = 16


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
            `ValueError`: If it is no complete CLIP model.
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
        """
        Score samples.

        Args:
            images (`list`):
                Images, or lists of images as frames of clips.
            prompts (`list[str]`):
                One prompt for each.
            context (`Any`):
                Task, criteria and first frames, which CLIP does not look at.

        Returns:
            `torch.Tensor` of shape `(n,)`: Scores.
        """
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


class FunctionEvaluator(RewardDanceEvaluator):
    r"""
    Measure a reward function on preference rows as [`RewardDanceEvaluator`] measures a judge. Each sample has one score,
    whose difference is read as the log-odds of a preference: `accuracy` needs its sign only, `accuracy_with_ties` and
    calibration its scale too.

    Inputs:
        A function `reward(images, prompts, conditions=..., task=..., criteria=...) -> torch.Tensor (n,)`. `images` are PIL
        images or lists of them, and all other arguments have one entry for each.

    Raises:
        `TypeError`: If the function takes no such arguments.
        `ValueError`: If it does not give one finite score for each sample.
    """

    def _ask(self, model: Any, processor: Any = None) -> EvaluationResults:
        scores: list[np.ndarray] = []
        ties: list[bool] = []
        categories: list[str | None] = []
        try:
            with tqdm(
                total=len(self.dataset), desc="Evaluating", unit="row", disable=not self.show_progress
            ) as progress:
                for rows in self._batches(self.batch_size or 8):
                    scores.extend(_ask_function(model, rows, len(ties)))
                    ties += [bool(row.get("tie")) for row in rows]
                    categories += [row.get("category") for row in rows]
                    progress.update(len(rows))
        finally:
            self.results = _make_results(scores, scores, ties, categories, is_pairwise=False)
        return self.results


def _ask_function(function: Callable[..., Any], rows: list[Any], start: int) -> np.ndarray:
    """Scores of shape `(rows, 2)`: chosen, rejected."""
    samples: list[Image.Image | list[Image.Image]] = []
    conditions: list[Image.Image | None] = []
    for i, row in enumerate(rows, start):
        name = f"row {i}"
        check_row(row, name)
        for column in ("chosen", "rejected"):
            samples.append(_load_sample(row[column], f"{column} of {name}"))
        condition = row.get("condition")
        conditions += [None if condition is None else load_image(condition, f"condition of {name}")] * 2
    twice = [row for row in rows for _ in range(2)]
    with torch.no_grad():
        scores = function(
            samples,
            [row["prompt"] for row in twice],
            conditions=conditions,
            task=[row.get("task") or "text-to-image" for row in twice],
            criteria=[row.get("criteria") for row in twice],
        )
    scores = torch.as_tensor(scores).detach().double().cpu()
    if scores.shape != (len(samples),):
        raise ValueError(
            f"The reward function gave scores of shape {tuple(scores.shape)} for {len(samples)} samples, but must give one "
            "for each, of shape `(n,)`."
        )
    if not scores.isfinite().all():
        bad = sorted({start + i // 2 for i in (~scores.isfinite()).nonzero()[:, 0].tolist()})
        raise ValueError(
            f"Scores of the rows {bad} by the reward function are NaN or infinite, but must be finite. Check its weights."
        )
    return scores.numpy().reshape(-1, 2)


def _load_sample(media: Any, name: str) -> Image.Image | list[Image.Image]:
    reader = open_clip(media, name)
    if reader is None:
        return load_image(media, name)
    return load_frames(reader.sample(max_frames=MAX_FRAMES), name)


def load_baseline(name: str, device: str | torch.device = "cpu", dtype: Any = "auto") -> Callable[..., Any] | None:
    """
    Load another judge by its name on the command line.

    Args:
        name (`str`):
            `"clipscore"`, `"pickscore"`, either with `":<repository ID or folder>"` of other weights, or
            `"<module>:<function>"` of a reward function, whose module may lie in the working folder.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`):
            Device of CLIP models.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
            Type of the weights of CLIP models.

    Returns:
        `Callable` or None: Reward function, or None for anything else, such as the repository ID of a judge.

    Raises:
        `ValueError`: If the module has no such function.
        `ImportError`: If there is no such module.
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
