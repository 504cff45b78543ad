"""Generative reward models for images and video: the reward is the probability of the token "yes"."""

from importlib import import_module


__version__ = "0.1.0"

# Public name -> module that defines it. Names are imported on first use, so that `import rewarddance_hf` loads neither
# torch nor transformers.
_PUBLIC_NAMES = {
    "DataCollatorForRewardDance": "data.collator",
    "RewardDanceConfig": "models",
    "RewardDanceEvaluator": "evaluation.evaluator",
    "RewardDanceForYesScoring": "models",
    "RewardDanceOutput": "models",
    "RewardDanceProcessor": "models",
    "RewardDanceScorer": "scoring.scorer",
    "RewardDanceTrainer": "trainer.rewarddance_trainer",
    "RewardDanceTrainingArguments": "trainer.training_args",
    "RewardGradientCallback": "alignment.gradient",
}

__all__ = [
    "DataCollatorForRewardDance",
    "RewardDanceConfig",
    "RewardDanceEvaluator",
    "RewardDanceForYesScoring",
    "RewardDanceOutput",
    "RewardDanceProcessor",
    "RewardDanceScorer",
    "RewardDanceTrainer",
    "RewardDanceTrainingArguments",
    "RewardGradientCallback",
]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC_NAMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
