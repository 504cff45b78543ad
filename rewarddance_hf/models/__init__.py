"""Configuration, model and processor: the files that travel with every checkpoint on the Hub."""

import sys
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel, AutoProcessor

from .configuration_rewarddance import RewardDanceConfig
from .modeling_rewarddance import RewardDanceForYesScoring, RewardDanceOutput, RewardDancePreTrainedModel
from .processing_rewarddance import RewardDanceProcessor


# With the package installed, the Auto classes load RewardDance checkpoints without `trust_remote_code`.
AutoConfig.register("rewarddance", RewardDanceConfig, exist_ok=True)
AutoModel.register(RewardDanceConfig, RewardDanceForYesScoring, exist_ok=True)
AutoProcessor.register(RewardDanceConfig, RewardDanceProcessor, exist_ok=True)

if TYPE_CHECKING:
    from .pipeline_rewarddance import VisualPreferencePipeline


def register_pipeline() -> None:
    """Let `transformers.pipeline` know the task. Apart, as the pipelines of transformers take seconds to import."""
    from transformers.pipelines import PIPELINE_REGISTRY

    from .pipeline_rewarddance import TASK, VisualPreferencePipeline

    if TASK not in PIPELINE_REGISTRY.supported_tasks:
        PIPELINE_REGISTRY.register_pipeline(TASK, VisualPreferencePipeline, pt_model=AutoModel, type="multimodal")


def __getattr__(name: str) -> Any:
    if name == "VisualPreferencePipeline":
        from .pipeline_rewarddance import VisualPreferencePipeline

        return VisualPreferencePipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if "transformers.pipelines" in sys.modules:
    register_pipeline()


class _CustomPipelines:
    """
    What `config.json` says about its own copy of the pipeline: kept and saved again, but not shown to
    `transformers.pipeline`, which would ask for `trust_remote_code` although the pipeline is installed.
    """

    def __get__(self, config: Any, config_class: type) -> dict[str, Any]:
        return {}

    def __set__(self, config: Any, value: dict[str, Any]) -> None:
        vars(config)["custom_pipelines"] = value


RewardDanceConfig.custom_pipelines = _CustomPipelines()

# Saved checkpoints carry the code, so that `trust_remote_code=True` loads them without the package.
RewardDanceConfig.register_for_auto_class()
RewardDanceForYesScoring.register_for_auto_class("AutoModel")
RewardDanceProcessor.register_for_auto_class()

__all__ = [
    "RewardDanceConfig",
    "RewardDanceForYesScoring",
    "RewardDanceOutput",
    "RewardDancePreTrainedModel",
    "RewardDanceProcessor",
    "VisualPreferencePipeline",
]
