"""Draft of a model card, written by the trainer from what it knows about its run; a release turns it into the full
card."""

import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch.utils.data import ConcatDataset, Subset

from .. import __version__
from ..cards import render_card
from ..data.rows import PreferenceRows, StreamedRows
from .training_args import RewardDanceTrainingArguments


# Key of the card's metadata under which a release finds what the trainer knows.
FACTS_KEY = "rewarddance_training"
# What a dataset is called that was made of files: by their format.
FORMATS = ("arrow", "csv", "imagefolder", "json", "parquet", "text", "videofolder", "webdataset")
LOCAL_FILES = "local files"
DATASET_URL = "https://huggingface.co/datasets/"


def training_card(
    model: Any,
    args: RewardDanceTrainingArguments,
    state: Any,
    model_name: str,
    tags: list[str],
    train_dataset: Any = None,
) -> str:
    """Fill the draft of a model card."""
    metrics = _last_eval_metrics(state.log_history)
    base_model = public_name(model.config._name_or_path) or "unknown"
    facts: dict[str, Any] = {
        "paradigm": args.paradigm,
        "steps": state.global_step,
        "batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "learning_rate": args.learning_rate,
        "hardware": f"{args.world_size} x {_device_name(args.device)}",
        "versions": {
            "rewarddance_hf": __version__,
            "transformers": transformers.__version__,
            "torch": str(torch.__version__),
        },
        "data": recorded_data(train_dataset),
    }
    card_data = ModelCardData(
        base_model=base_model,
        library_name="transformers",
        tags=[*tags, "generated_from_trainer"],
        model_name=model_name,
        eval_results=[
            EvalResult("visual-preference", name, name, "accuracy", value, metric_name="accuracy, ties left out")
            for name, value in metrics.items()
        ],
        **{FACTS_KEY: facts},  # type: ignore[arg-type]
    )
    return render_card(
        "training_card.md",
        card_data,
        name=model_name,
        paradigm=args.paradigm,
        base_model=base_model,
        metrics=metrics,
    )


def public_name(source: str) -> str:
    """What a model is called in public: folders by the base model that their own card names, else without where they are."""
    if not os.path.isdir(source):
        return source
    card = Path(source) / "README.md"
    named = ModelCard.load(card, ignore_metadata_errors=True).data.get("base_model") if card.is_file() else None
    return named if isinstance(named, str) and not os.path.isabs(named) else Path(source).resolve().name


def recorded_data(dataset: Any) -> list[dict[str, str]]:
    """Read where training rows come from, as far as the dataset records it. Files do not record their names."""
    if isinstance(dataset, ConcatDataset):
        return [source for part in dataset.datasets for source in recorded_data(part)]
    if isinstance(dataset, PreferenceRows | StreamedRows | Subset):
        return recorded_data(dataset.dataset)
    info = getattr(dataset, "info", None)
    homepage = getattr(info, "homepage", None) or ""
    name = homepage.removeprefix(DATASET_URL).strip("/") if homepage.startswith(DATASET_URL) else ""
    name = name or getattr(info, "dataset_name", None) or ""
    name = LOCAL_FILES if name in FORMATS else name
    return [{"name": name, "license": getattr(info, "license", None) or "unknown"}] if name else []


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"


def _last_eval_metrics(log_history: list[dict[str, Any]]) -> dict[str, float]:
    """Accuracy of each evaluation set at its last evaluation."""
    metrics = {}
    for logs in log_history:
        for key, value in logs.items():
            if key.startswith("eval_") and key.endswith("accuracy"):
                metrics[key.removeprefix("eval_").removesuffix("accuracy").strip("_") or "eval"] = value
    return metrics
