"""What the engine keeps while it works on one call of a scorer, and what it counts."""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

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
    key: Any  # of the image, at the desk


@dataclass(eq=False)
class EngineSession:
    """What calls of an engine that belong together share, while the weights stay as they are."""

    desk: ImageDesk
    writer: QuestionWriter
    statistics: ScoringStatistics = field(default_factory=ScoringStatistics)
    features: dict[int, Features] = field(default_factory=dict)  # by the number of the image, the oldest first
    num_tokens: int = 0  # of all features
    num_images: int = 0  # that have a number
    with_gradient: set[int] = field(default_factory=set)  # numbers of images
    keeps_states: bool = False  # of prefixes, for further calls
    states: "OrderedDict[tuple[bytes, bytes], PrefixStates]" = field(default_factory=OrderedDict)
    state_bytes: int = 0

    def apart(self) -> "EngineSession":
        """A session of its own, with the threads of this one."""
        return EngineSession(ImageDesk(self.desk.processor, self.desk.executor), self.writer)

    def add(self, number: int, features: Features) -> None:
        """Keep features of an image."""
        self.features[number] = features
        self.num_tokens += len(features.pooled)
        if features.pooled.requires_grad:
            self.with_gradient.add(number)

    def drop(self, number: int) -> None:
        """Forget an image; it is prepared again when it returns."""
        features = self.features.pop(number)
        self.num_tokens -= len(features.pooled)
        self.with_gradient.discard(number)
        self.desk.forget(features.key)

    def drop_gradients(self) -> None:
        """Forget images that carry a gradient, and with them the graph of their features."""
        for number in list(self.with_gradient):
            self.drop(number)

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
        states = self.states[node.key] = node.states.alone(node.end)
        self.state_bytes += states.num_bytes
        while self.state_bytes > MAX_STATE_BYTES:
            self.state_bytes -= self.states.popitem(last=False)[1].num_bytes
