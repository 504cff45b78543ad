"""Configuration, model and processor: the files that travel with every checkpoint on the Hub."""

from transformers import AutoConfig, AutoModel, AutoProcessor

from .configuration_rewarddance import RewardDanceConfig
from .modeling_rewarddance import RewardDanceForYesScoring, RewardDanceOutput, RewardDancePreTrainedModel
from .processing_rewarddance import RewardDanceProcessor


# With the package installed, the Auto classes load RewardDance checkpoints without `trust_remote_code`.
AutoConfig.register("rewarddance", RewardDanceConfig, exist_ok=True)
AutoModel.register(RewardDanceConfig, RewardDanceForYesScoring, exist_ok=True)
AutoProcessor.register(RewardDanceConfig, RewardDanceProcessor, exist_ok=True)

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
]
