"""What the engine keeps while it works on one call of a scorer, and what it counts."""

from collections.abc import Collection
from dataclasses import dataclass, field

import torch

from .media_desk import ImageDesk
from .tree import QuestionWriter


@dataclass
class ScoringStatistics:
    """What the engine computed in one call of a scorer."""

    num_questions: int = 0
    num_images: int = 0  # that were preprocessed: distinct ones
    num_encoded: int = 0  # images that the vision encoder saw
    num_forward_passes: int = 0  # of the language model
    tokens: int = 0  # that the language model computed, with padding
    minimum_tokens: int = 0  # each distinct beginning of a question once, among those that are planned together
    plain_tokens: int = 0  # of all questions, which the plain path computes, without its padding


@dataclass(eq=False)
class Features:
    """Vision features of one image: `(tokens, hidden_size)`, and those for inner layers of the language model."""

    pooled: torch.Tensor
    deepstack: list[torch.Tensor]


@dataclass(eq=False)
class EngineSession:
    """What calls of an engine that belong together share, while the weights stay as they are."""

    desk: ImageDesk
    writer: QuestionWriter
    statistics: ScoringStatistics = field(default_factory=ScoringStatistics)
    features: dict[int, Features] = field(default_factory=dict)  # by the number of the image
    num_images: int = 0  # that have a number

    def drop(self, numbers: Collection[int]) -> None:
        """Forget images; they are prepared anew when they come again."""
        for number in numbers:
            del self.features[number]
        self.desk.forget(set(numbers))

    def drop_gradients(self) -> None:
        """Forget images that carry a gradient, and with them the graph of their features."""
        self.drop([number for number, features in self.features.items() if features.pooled.requires_grad])
