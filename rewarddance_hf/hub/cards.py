"""Cards of models, datasets and metrics: the templates of `hub_cards/`, filled from what was measured."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import DatasetCardData, ModelCard, ModelCardData

from ..cards import render_card
from ..models import RewardDanceConfig
from .licenses import TrainingData
from .measurements import Measurement, model_index, table_rows


# Metadata of a card that tells what was released by this package from what was not.
RELEASE_KEY = "rewarddance_release"

LIMITS = (
    "A reward that a generator is tuned on can be gamed. Watch the samples, and a second judge that is not tuned on.",
    "Verdicts about other kinds of images, prompts or criteria than those measured above are not known to be right.",
    "The judge has the taste and the biases of its training data and its base model. It says nothing about whether content "
    "is true, safe or lawful.",
)


@dataclass(frozen=True)
class ModelFacts:
    """
    What a model card says.

    Args:
        repo_id (`str`):
            Repository that the model will be in.
        revision (`str`):
            Tag of the release.
        config ([`RewardDanceConfig`]):
            Configuration of the judge.
        num_parameters (`int`):
            Number of weights.
        dtype (`str`):
            Type of the weights.
        license (`str`):
            License of the model.
        base_model (`str`, *optional*):
            Repository ID or name of the model that it was fine-tuned from.
        training_data (`Sequence[TrainingData]`, *optional*):
            All data that it was trained on.
        non_commercial (`Sequence[str]`, *optional*):
            Names of those that forbid commercial use.
        measurements (`Sequence[Measurement]`, *optional*):
            What was measured.
        training (`Mapping[str, Any]`, *optional*):
            What the trainer recorded of its run.
        limits (`Sequence[str]`, *optional*):
            Limits to name before those of every judge.
        media (`str`, *optional*, defaults to `"images"`):
            What is judged.
    """

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
    training: Mapping[str, Any] | None = None
    limits: Sequence[str] = ()
    media: str = "images"


@dataclass(frozen=True)
class DatasetFacts:
    """
    What a dataset card says.

    Args:
        repo_id (`str`):
            Repository that the dataset will be in.
        revision (`str`):
            Tag of the release.
        description (`str`):
            What the rows are.
        source (`str`):
            How they were made.
        license (`str`):
            License of the rows.
        configurations (`Sequence[Mapping]`):
            `name`, and `splits` with `name`, `num_rows` and `num_bytes` each.
        columns (`Mapping[str, str]`):
            Meaning of each column.
        limits (`Sequence[str]`, *optional*):
            Limits.
        tags (`Sequence[str]`, *optional*):
            Further tags of the repository.
    """

    repo_id: str
    revision: str
    description: str
    source: str
    license: str
    configurations: Sequence[Mapping[str, Any]]
    columns: Mapping[str, str]
    limits: Sequence[str] = ()
    tags: Sequence[str] = field(default_factory=tuple)


@dataclass(frozen=True)
class PipelineFacts:
    """
    What the card of a diffusers pipeline, or of LoRA weights for one, says.

    Args:
        repo_id (`str`):
            Repository that it will be in.
        revision (`str`):
            Tag of the release.
        description (`str`):
            What it is.
        source (`str`):
            How it was made.
        license (`str`):
            License.
        prompt (`str`):
            Prompt of the snippet.
        sampling (`Mapping[str, Any]`):
            Arguments that it is called with.
        loading (`Mapping[str, Any]`):
            Arguments that it is loaded with.
        limits (`Sequence[str]`, *optional*):
            Limits.
        base_repo_id (`str`, *optional*):
            Pipeline that LoRA weights are for.
    """

    repo_id: str
    revision: str
    description: str
    source: str
    license: str
    prompt: str
    sampling: Mapping[str, Any]
    loading: Mapping[str, Any]
    limits: Sequence[str] = ()
    base_repo_id: str | None = None


def model_card(facts: ModelFacts) -> str:
    """
    Write the card of a judge.

    Args:
        facts ([`ModelFacts`]):
            What it says.

    Returns:
        `str`: Markdown with metadata, among it a model-index that names split and tie rule beside every number.
    """
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
    """
    Write the card of a dataset in parquet files, `<configuration>/<split>-*.parquet`.

    Args:
        facts ([`DatasetFacts`]):
            What it says.

    Returns:
        `str`: Markdown with metadata.
    """
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
    """
    Write the card of a diffusers pipeline, or of LoRA weights for one.

    Args:
        facts ([`PipelineFacts`]):
            What it says.

    Returns:
        `str`: Markdown with metadata.
    """
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
    """
    Read from a card whether a repository was released by this package.

    Args:
        card (`str`):
            Text of its `README.md`.

    Returns:
        `dict` or `None`: `kind` of the release and `tool`, None for repositories of others.
    """
    try:
        marker = ModelCard(card, ignore_metadata_errors=True).data.to_dict().get(RELEASE_KEY)
    except (ValueError, yaml.YAMLError):  # metadata that cannot be read is not ours
        return None
    return marker if isinstance(marker, dict) and "kind" in marker else None


def release_marker_of(kind: str) -> dict[str, Any]:
    """
    Metadata by which [`release_marker`] knows a release.

    Args:
        kind (`str`):
            Kind of release.

    Returns:
        `dict[str, Any]`
    """
    return {RELEASE_KEY: {"kind": kind, "tool": "rewarddance_hf"}}


def code_blocks(card: str) -> list[str]:
    """
    Find the Python snippets of a card.

    Args:
        card (`str`):
            Markdown.

    Returns:
        `list[str]`
    """
    return re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)


def _is_repo_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def _rounded(count: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)
