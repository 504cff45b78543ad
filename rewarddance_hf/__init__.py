"""Generative reward models for images and video: the reward is the probability of the token "yes"."""

from importlib import import_module
from typing import TYPE_CHECKING

from .registration import register_when_used as _register_when_used


__version__ = "0.1.0"

# Module -> public names that it defines. They are imported on first use, so that `import rewarddance_hf` loads neither
# torch nor transformers.
_PUBLIC_NAMES = {
    "alignment.gradient": ["RewardGradientCallback"],
    "alignment.monitor.callback": ["RewardDynamicsCallback"],
    "alignment.monitor.dynamics": ["RewardDynamics"],
    "alignment.refl.arguments": ["ReFLTrainingArguments"],
    "alignment.refl.callbacks": ["ReFLCallback"],
    "alignment.refl.references": ["best_of_n_references"],
    "alignment.refl.trainer": ["ReFLTrainer"],
    "alignment.search.replay": ["replay"],
    "alignment.search.result": ["SearchResult"],
    "alignment.search.saving": ["save_search"],
    "alignment.search.search": ["best_of_n", "search_over_paths", "zero_order_search"],
    "data.collator": ["DataCollatorForRewardDance"],
    "data.parquet": ["ParquetRows"],
    "data.resizing": ["resize_images"],
    "data.sources": ["load_preferences"],
    "evaluation.evaluator": ["EvaluationResults", "RewardDanceEvaluator"],
    "models": ["RewardDanceConfig", "RewardDanceForYesScoring", "RewardDanceOutput", "RewardDanceProcessor"],
    "models.clips_rewarddance": ["Clip"],
    "models.question_rewarddance": ["Example", "Question"],
    "models.video_rewarddance": ["ClipError"],
    "rewards": ["NonFiniteScoreError", "Reward", "as_reward"],
    "scoring.reasoning": ["NoAnswerError", "ReasonedScores"],
    "scoring.results": ["Comparison", "Ranking"],
    "scoring.scorer": ["RewardDanceScorer"],
    "scoring.shards": ["merge_shards", "score_shards"],
    "serving.errors": ["JudgeChangedError", "RemoteRewardError"],
    "serving.groups": ["GRPOReward"],
    "serving.remote": ["RemoteReward"],
    "serving.server": ["JudgeServer"],
    "trainer.rewarddance_trainer": ["RewardDanceTrainer"],
    "trainer.training_args": ["RewardDanceTrainingArguments"],
}
_MODULES = {name: module for module, names in _PUBLIC_NAMES.items() for name in names}

if TYPE_CHECKING:  # the same for type checkers and editors
    from .alignment.gradient import RewardGradientCallback
    from .alignment.monitor.callback import RewardDynamicsCallback
    from .alignment.monitor.dynamics import RewardDynamics
    from .alignment.refl.arguments import ReFLTrainingArguments
    from .alignment.refl.callbacks import ReFLCallback
    from .alignment.refl.references import best_of_n_references
    from .alignment.refl.trainer import ReFLTrainer
    from .alignment.search.replay import replay
    from .alignment.search.result import SearchResult
    from .alignment.search.saving import save_search
    from .alignment.search.search import best_of_n, search_over_paths, zero_order_search
    from .data.collator import DataCollatorForRewardDance
    from .data.parquet import ParquetRows
    from .data.resizing import resize_images
    from .data.sources import load_preferences
    from .evaluation.evaluator import EvaluationResults, RewardDanceEvaluator
    from .models import RewardDanceConfig, RewardDanceForYesScoring, RewardDanceOutput, RewardDanceProcessor
    from .models.clips_rewarddance import Clip
    from .models.question_rewarddance import Example, Question
    from .models.video_rewarddance import ClipError
    from .rewards import NonFiniteScoreError, Reward, as_reward
    from .scoring.reasoning import NoAnswerError, ReasonedScores
    from .scoring.results import Comparison, Ranking
    from .scoring.scorer import RewardDanceScorer
    from .scoring.shards import merge_shards, score_shards
    from .serving.errors import JudgeChangedError, RemoteRewardError
    from .serving.groups import GRPOReward
    from .serving.remote import RemoteReward
    from .serving.server import JudgeServer
    from .trainer.rewarddance_trainer import RewardDanceTrainer
    from .trainer.training_args import RewardDanceTrainingArguments

__all__ = [
    "Clip",
    "ClipError",
    "Comparison",
    "DataCollatorForRewardDance",
    "EvaluationResults",
    "Example",
    "GRPOReward",
    "JudgeChangedError",
    "JudgeServer",
    "NoAnswerError",
    "NonFiniteScoreError",
    "ParquetRows",
    "Question",
    "Ranking",
    "ReFLCallback",
    "ReFLTrainer",
    "ReFLTrainingArguments",
    "ReasonedScores",
    "RemoteReward",
    "RemoteRewardError",
    "Reward",
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
    "SearchResult",
    "as_reward",
    "best_of_n",
    "best_of_n_references",
    "load_preferences",
    "merge_shards",
    "replay",
    "resize_images",
    "save_search",
    "score_shards",
    "search_over_paths",
    "zero_order_search",
]


if not TYPE_CHECKING:  # which would take any name for defined

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


_register_when_used()
