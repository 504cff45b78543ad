"""Cards of models, datasets and metrics: the templates of `hub_cards/`, filled from what was measured."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import DatasetCardData, ModelCard, ModelCardData

from ..cards import render_card
from ..models import RewardDanceConfig
from .licenses import TrainingData
from .measurements import Measurement, model_index, table_rows


# Metadata of a card that marks what was released by this package.
RELEASE_KEY = "rewarddance_release"

LIMITS = (
    "A reward that a generator is tuned on can be gamed. Watch the samples, and a second judge that is not tuned on.",
    "Verdicts about other kinds of images, prompts or criteria than those measured above are not known to be right.",
    "The judge has the taste and the biases of its training data and its base model. It says nothing about whether content "
    "is true, safe or lawful.",
)


@dataclass(frozen=True)
class ModelFacts:
    """What a model card says; `non_commercial` names the training data that forbids commercial use."""

    repo_id: str
    revision: str
    config: RewardDanceConfig
    num_parameters: int
    dtype: str
    license: str
    base_model: str | None = None
    training_data: Sequence[TrainingData] = ()
    non_commercial: Sequence[str] = ()
    measurements: Sequence[Measurement] = ()
    training: Mapping[str, Any] | None = None  # what the trainer recorded of its run
    limits: Sequence[str] = ()
    media: str = "images"


@dataclass(frozen=True)
class DatasetFacts:
    """
    What a dataset card says. Each of `configurations` has a `name`, and `splits` with `name`, `num_rows` and `num_bytes`;
    `columns` says what each column means.
    """

    repo_id: str
    revision: str
    description: str
    source: str
    license: str
    configurations: Sequence[Mapping[str, Any]]
    columns: Mapping[str, str]
    limits: Sequence[str] = ()
    tags: Sequence[str] = ()


@dataclass(frozen=True)
class PipelineFacts:
    """What the card of a diffusers pipeline says, or that of LoRA weights for the pipeline `base_repo_id`."""

    repo_id: str
    revision: str
    description: str
    source: str
    license: str
    prompt: str
    sampling: Mapping[str, Any]  # arguments of the call
    loading: Mapping[str, Any]  # arguments of `from_pretrained`
    limits: Sequence[str] = ()
    base_repo_id: str | None = None


def model_card(facts: ModelFacts) -> str:
    """Card of a judge. Its model-index names split and tie rule beside every number."""
    name = facts.repo_id.rpartition("/")[2]
    public_base = facts.base_model if facts.base_model and _is_repo_id(facts.base_model) else None
    card_data = ModelCardData(
        license=facts.license,
        base_model=public_base,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["rewarddance", "reward-model", "visual-preference"],
        datasets=[data.name for data in facts.training_data if _is_repo_id(data.name)] or None,
        model_name=name,
        eval_results=[result for measurement in facts.measurements for result in model_index(measurement)] or None,
        **release_marker_of("model"),
    )
    limits = [*facts.limits, *LIMITS]
    if facts.config.uses_reference and facts.measurements:
        worst = min(measurement.metrics.get("order_consistency", 1.0) for measurement in facts.measurements)
        limits.insert(
            0,
            f"In up to {100 * (1 - worst):.1f} % of the pairs above the verdict changes with the order of the samples.",
        )
    filled = {
        "name": name,
        "base_model_is_public": public_base is not None,
        "parameters": _rounded(facts.num_parameters),
        "table": [row for measurement in facts.measurements for row in table_rows(measurement)],
        "limits": limits,
    }
    return render_card("model_card.md", card_data, **vars(facts) | filled)


def dataset_card(facts: DatasetFacts) -> str:
    """Card of a dataset in parquet files, `<configuration>/<split>-*.parquet`."""
    name = facts.repo_id.rpartition("/")[2]
    configs = [
        {
            "config_name": configuration["name"],
            "data_files": [
                {"split": split["name"], "path": f"{configuration['name']}/{split['name']}-*.parquet"}
                for split in configuration["splits"]
            ],
        }
        for configuration in facts.configurations
    ]
    card_data = DatasetCardData(
        license=facts.license,
        pretty_name=name,
        tags=["rewarddance", "visual-preference", *facts.tags],
        configs=configs,
        **release_marker_of("dataset"),
    )
    return render_card("dataset_card.md", card_data, name=name, **vars(facts))


def pipeline_card(facts: PipelineFacts) -> str:
    """Card of a diffusers pipeline, or of LoRA weights for one."""
    card_data = ModelCardData(
        license=facts.license,
        base_model=facts.base_repo_id,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["rewarddance"],
        **release_marker_of("adapter" if facts.base_repo_id else "pipeline"),
    )
    return render_card("pipeline_card.md", card_data, name=facts.repo_id.rpartition("/")[2], **vars(facts))


def release_marker(card: str) -> dict[str, Any] | None:
    """Marker in the text of a card: `kind` of the release and `tool`, or None for repositories of others."""
    try:
        marker = ModelCard(card, ignore_metadata_errors=True).data.to_dict().get(RELEASE_KEY)
    except (ValueError, yaml.YAMLError):  # a card of somebody else's
        return None
    return marker if isinstance(marker, dict) and "kind" in marker else None


def release_marker_of(kind: str) -> dict[str, Any]:
    """Metadata by which [`release_marker`] recognizes a release."""
    return {RELEASE_KEY: {"kind": kind, "tool": "rewarddance_hf"}}


def _is_repo_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def _rounded(count: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)
