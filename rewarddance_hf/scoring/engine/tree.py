"""Questions as sequences of tokens, and the tree of what they share."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ...models import RewardDanceForYesScoring, RewardDanceProcessor
from ...models.question_rewarddance import Question
from .media_desk import PreparedImage


# Symbols of image tokens begin above all token IDs; each image has room for so many tokens.
FIRST_SYMBOL = 1 << 32
TOKENS_OF_IMAGE = 1 << 24
MAX_TEXTS = 4096  # questions whose tokens are kept for the next ones


@dataclass(eq=False)
class TokenizedQuestion:
    """Question as tokens. Two have the same states up to where their symbols and positions differ first."""

    token_ids: np.ndarray  # (length,)
    symbols: np.ndarray  # (length,), token IDs in which each token of an image has a number of its own
    positions: np.ndarray  # (1, length), or (3, length) of models with multimodal rotary embeddings
    images: list[PreparedImage]
    starts: list[int]  # index of the first token of each image

    def images_between(self, start: int, end: int) -> list[PreparedImage]:
        """Images whose tokens are in a part of the question."""
        return [image for image, first in zip(self.images, self.starts, strict=True) if start <= first < end]


@dataclass(eq=False)
class Node:
    """Part of one or more questions that is computed once."""

    question: TokenizedQuestion  # one of them
    start: int  # index of its first token; all before are parts of `parent` and its parents
    end: int
    parent: "Node | None" = None
    children: list["Node"] = field(default_factory=list)  # parts that follow; none if the questions end here
    rows: list[int] = field(default_factory=list)  # indices of questions that end here
    states: Any = None  # key/value states up to `end`, while they are needed

    @property
    def length(self) -> int:
        """Number of tokens of this part."""
        return self.end - self.start

    @property
    def images(self) -> list[PreparedImage]:
        """Images of this part."""
        return self.question.images_between(self.start, self.end)

    @property
    def requires_grad(self) -> bool:
        """Whether this part or one before carries a gradient."""
        return any(image.requires_grad for image in self.question.images_between(0, self.end))

    @property
    def key(self) -> tuple[bytes, bytes]:
        """What the states up to `end` follow from, in one session."""
        question = self.question
        return question.symbols[: self.end].tobytes(), question.positions[:, : self.end].tobytes()

    def split_before_gradient(self, min_saving: int) -> None:
        """
        Let all that goes before the first image with gradient be a part of its own, here and below: it needs no graph. It must
        have `min_saving` tokens.
        """
        question = self.question
        pairs = zip(question.images, question.starts, strict=True)
        first = next((start for image, start in pairs if image.requires_grad), self.end)
        if self.start + min_saving <= first < self.end:
            rest = Node(question, first, self.end, self, self.children, self.rows)
            for child in self.children:
                child.parent = rest
            self.end, self.children, self.rows = first, [rest], []
        for child in self.children:
            child.split_before_gradient(min_saving)


class QuestionWriter:
    """Turns questions into sequences of tokens without running the image processor: it has seen each image before."""

    def __init__(self, model: RewardDanceForYesScoring, processor: RewardDanceProcessor) -> None:
        self.model = model
        self.processor = processor
        self.image_token_id: int = model.config.vlm_config.image_token_id
        vlm_processor: Any = processor.vlm_processor
        self._placeholder = str(vlm_processor.image_token)
        self._tokens: dict[Any, tuple[np.ndarray, np.ndarray]] = {}
        self._counts: dict[str, int] = {}

    def write(self, question: Question, images: list[PreparedImage]) -> TokenizedQuestion:
        """Tokens of a question with opened clips, and its images in their order."""
        if len(self._tokens) > MAX_TEXTS:
            self._tokens = {}
        shapes = tuple((image.expansion, image.grid) for image in images)
        key = (question.asked, shapes)
        if key not in self._tokens:
            self._tokens[key] = self._tokenize(self.processor.write_question(question), shapes)
        token_ids, positions = self._tokens[key]

        symbols = token_ids.astype(np.int64)
        (where,) = np.nonzero(token_ids == self.image_token_id)
        counts = [self.num_tokens(image) for image in images]
        if sum(counts) != len(where):
            raise RuntimeError(
                f'A question has {len(where)} image tokens, but its images need {counts}. Use `engine="plain"`, and '
                "report this model."
            )
        starts, used = [], 0
        for image, count in zip(images, counts, strict=True):
            own = where[used : used + count]
            symbols[own] = FIRST_SYMBOL + image.number * TOKENS_OF_IMAGE + np.arange(count)
            starts.append(int(own[0]))
            used += count
        return TokenizedQuestion(token_ids, symbols, positions, images, starts)

    def num_tokens(self, image: PreparedImage) -> int:
        """Number of tokens that stand for an image."""
        text = image.expansion
        if text not in self._counts:
            ids = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
            self._counts[text] = ids.count(self.image_token_id)
        return self._counts[text]

    def _tokenize(self, text: str, shapes: tuple[tuple[str, Any], ...]) -> tuple[np.ndarray, np.ndarray]:
        """Token IDs and positions of a question whose images have these expansions and grids."""
        first, *rest = text.split(self._placeholder)
        if len(rest) != len(shapes):
            raise RuntimeError(
                f'A question has {len(rest)} placeholders for {len(shapes)} images. Use `engine="plain"`, and report this '
                "model."
            )
        expanded = first + "".join(shape[0] + after for shape, after in zip(shapes, rest, strict=True))
        special = self.processor.vlm_arguments(text).get("add_special_tokens", True)
        token_ids = np.array(self.processor.tokenizer(expanded, add_special_tokens=special)["input_ids"])
        base_model = self.model.vlm.base_model
        if not hasattr(base_model, "get_rope_index"):
            return token_ids, np.arange(len(token_ids))[None]
        ids = torch.from_numpy(token_ids)[None]
        positions, _ = base_model.get_rope_index(
            input_ids=ids,
            mm_token_type_ids=(ids == self.image_token_id).int(),
            image_grid_thw=torch.tensor([grid for _, grid in shapes]),
            attention_mask=torch.ones_like(ids),
        )
        return token_ids, positions[:, 0].numpy()


def build_tree(questions: Sequence[TokenizedQuestion], min_saving: int) -> tuple[list[Node], int]:
    """
    Find what questions share; equal ones become one. A part costs a forward pass, so it must save `min_saving` tokens to be
    computed apart. Returns the roots of the tree, and the least number of tokens with which all questions can be computed.
    """
    rows: dict[tuple[bytes, bytes], list[int]] = {}
    for row, question in enumerate(questions):
        key = (question.symbols.astype(">i8").tobytes(), question.positions.tobytes())
        rows.setdefault(key, []).append(row)
    same = sorted(rows.items())  # those that share more stand closer
    ordered = [questions[members[0]] for _, members in same]
    shared = [_num_shared(*pair) for pair in zip(ordered, ordered[1:], strict=False)]  # by each with the next one
    minimum = sum(len(question.token_ids) for question in ordered) - sum(shared)
    roots: list[Node] = []
    # Groups of neighbors that share all tokens before `start`, which are parts of `parent`.
    stack: list[tuple[int, int, int, Node | None]] = [(0, len(ordered), 0, None)]
    while stack:
        first, last, start, parent = stack.pop()
        if last - first == 1:
            node = Node(ordered[first], start, len(ordered[first].token_ids), parent, rows=same[first][1])
            (roots if parent is None else parent.children).append(node)
            continue
        end = min(shared[first : last - 1])
        cuts = [i + 1 for i in range(first, last - 1) if shared[i] == end]
        if (end - start) * len(cuts) >= min_saving:
            node = Node(ordered[first], start, end, parent)
            (roots if parent is None else parent.children).append(node)
            start, parent = end, node
        stack += [(*group, start, parent) for group in zip([first, *cuts], [*cuts, last], strict=True)]
    return roots, minimum


def _num_shared(a: TokenizedQuestion, b: TokenizedQuestion) -> int:
    """Number of first tokens that two questions share. The last one of each is its own: its output is the answer."""
    length = min(len(a.token_ids), len(b.token_ids)) - 1
    differs = (a.symbols[:length] != b.symbols[:length]) | (a.positions[:, :length] != b.positions[:, :length]).any(0)
    return int(differs.argmax()) if differs.any() else length
