"""What the engine keeps while it works on one call of a scorer, and what it counts."""

from dataclasses import dataclass, field

import torch

from .media_desk import ImageDesk
from .tree import QuestionWriter


@dataclass
class ScoringStatistics:
    """
    What the engine computed in one call of a scorer.

    Args:
        num_questions (`int`):
            Number of questions.
        num_images (`int`):
            Number of images that were preprocessed: distinct ones.
        num_encoded (`int`):
            Number of images that the vision encoder saw.
        num_forward_passes (`int`):
            Number of forward passes of the language model.
        tokens (`int`):
            Number of tokens that the language model computed, with padding.
        minimum_tokens (`int`):
            Least number with which the same states can be computed: each distinct beginning of a question once, among
            those that are planned together.
        plain_tokens (`int`):
            Number of tokens of all questions, which is what the plain path computes, without its padding.
    """

    num_questions: int = 0
    num_images: int = 0
    num_encoded: int = 0
    num_forward_passes: int = 0
    tokens: int = 0
    minimum_tokens: int = 0
    plain_tokens: int = 0


@dataclass(eq=False)
class Features:
    """Vision features of one image: `(tokens, hidden_size)`, and those for inner layers of the language model."""

    pooled: torch.Tensor
    deepstack: list[torch.Tensor]


@dataclass(eq=False)
class EngineSession:
    """What is kept between the calls of an engine that belong together, while the weights stay as they are."""

    desk: ImageDesk
    writer: QuestionWriter
    statistics: ScoringStatistics = field(default_factory=ScoringStatistics)
    features: dict[int, Features] = field(default_factory=dict)
    num_images: int = 0
