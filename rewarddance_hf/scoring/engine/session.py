"""What the engine keeps while it works on one call of a scorer, and what it counts."""

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field

import torch

from .media_desk import ImageDesk
from .states import PrefixStates
from .tree import Node, QuestionWriter


MAX_STATE_BYTES = 1 << 30  # key/value states that are kept from call to call


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
    keeps_states: bool = False  # of prefixes, for further calls
    states: "OrderedDict[tuple[bytes, bytes], PrefixStates]" = field(default_factory=OrderedDict)

    def drop(self, numbers: Collection[int]) -> None:
        """Forget images; they are prepared again when they return."""
        for number in numbers:
            del self.features[number]
        self.desk.forget(set(numbers))

    def drop_gradients(self) -> None:
        """Forget images that carry a gradient, and with them the graph of their features."""
        self.drop([number for number, features in self.features.items() if features.pooled.requires_grad])

    def recall(self, node: Node) -> bool:
        """Give a part the states that were kept of it; whether there are some."""
        if not self.keeps_states or node.key not in self.states:
            return False
        self.states.move_to_end(node.key)
        node.states = self.states[node.key]
        return True

    def keep(self, node: Node) -> None:
        """Keep the states of a part that has no graph, in place of those that were not used for longest."""
        if not self.keeps_states or node.requires_grad:
            return
        self.states[node.key] = node.states.alone(node.end)
        while sum(states.num_bytes for states in self.states.values()) > MAX_STATE_BYTES:
            self.states.popitem(last=False)
