"""Generative reward models for images and video: the reward is the probability of the token "yes"."""

from importlib import import_module


__version__ = "0.1.0"

# Public name -> module that defines it. Names are imported on first use, so that `import rewarddance_hf` loads neither
# torch nor transformers.
_PUBLIC_NAMES = {
    "DataCollatorForRewardDance": "data.collator",
    "ReFLTrainer": "alignment.refl.trainer",
    "ReFLTrainingArguments": "alignment.refl.arguments",
    "RewardDanceConfig": "models",
    "RewardDanceEvaluator": "evaluation.evaluator",
    "RewardDanceForYesScoring": "models",
    "RewardDanceOutput": "models",
    "RewardDanceProcessor": "models",
    "RewardDanceScorer": "scoring.scorer",
    "RewardDanceTrainer": "trainer.rewarddance_trainer",
    "RewardDanceTrainingArguments": "trainer.training_args",
    "RewardDynamics": "alignment.monitor.dynamics",
    "RewardDynamicsCallback": "alignment.monitor.callback",
    "RewardGradientCallback": "alignment.gradient",
    "best_of_n": "alignment.search.search",
    "best_of_n_references": "alignment.refl.references",
    "search_over_paths": "alignment.search.search",
    "zero_order_search": "alignment.search.search",
}

__all__ = [
    "DataCollatorForRewardDance",
    "ReFLTrainer",
    "ReFLTrainingArguments",
    "RewardDanceConfig",
    "RewardDanceEvaluator",
    "RewardDanceForYesScoring",
    "RewardDanceOutput",
    "RewardDanceProcessor",
    "RewardDanceScorer",
    "RewardDanceTrainer",
    "RewardDanceTrainingArguments",
    "RewardDynamics",
    "RewardDynamicsCallback",
    "RewardGradientCallback",
    "best_of_n",
    "best_of_n_references",
    "search_over_paths",
    "zero_order_search",
]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC_NAMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
