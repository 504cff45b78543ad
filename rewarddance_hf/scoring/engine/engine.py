"""
Engine behind the scorer: vision features once per image, key/value states once per shared prefix.

Questions of one call are a tree: those with the same first tokens and images share a branch, which is computed once,
and whose key/value states are expanded over all that follow. Nothing is approximated: in a causal language model the
states of a token depend only on what goes before it. Models in which this is not known to hold are scored plainly.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache
from transformers.utils import logging

from ...models import RewardDanceForYesScoring, RewardDanceProcessor
from ...models.modeling_rewarddance import CACHE_NAME
from ...models.question_rewarddance import Question
from ..loading import is_sharded
from .attention import GROUPED, grouped_attention
from .checkpointing import layers_computed_again
from .last_position import last_position_only
from .media_desk import ImageDesk, PreparedImage, needs_graph
from .memory import BatchLimit, keep_freed_memory
from .products import products_by_onednn
from .proof import difference_from_plain_path
from .session import EngineSession
from .states import PrefixesNotShareableError, expand_states, take_states
from .tree import Node, QuestionWriter, TokenizedQuestion, build_tree
from .vision import VisionEncoder


logger = logging.get_logger(__name__)

# Model types whose scores the tests find equal to those of the plain path, with images, clips, and gradient. Others are tried out.
EXACT_MODEL_TYPES = tuple("gemma3 glm4v idefics3 internvl llava_onevision qwen2_5_vl qwen3_vl smolvlm".split())
EXACT_TEXT_TYPES = tuple("gemma3_text glm4v_text llama qwen2 qwen2_5_vl_text qwen3 qwen3_vl_text".split())
# Attention functions that take a mask over cached and new tokens as it is.
EXACT_ATTENTION = ("eager", "sdpa", GROUPED)

WINDOW = 256  # questions that are planned together, while the images of the next ones are prepared
MIN_SAVING = 64  # tokens that a shared part must save to be computed apart


class ScoringEngine:
    """Answers questions with less work and the same scores. Arguments are those of [`RewardDanceScorer`]."""

    def __init__(
        self,
        model: RewardDanceForYesScoring,
        processor: RewardDanceProcessor,
        batch_size: int,
        max_batch_tokens: int,
        num_workers: int,
        share_prefixes: bool,
        pad_to_multiple_of: int | None,
        compile_model: bool | dict[str, Any],
        gradient_checkpointing: bool = False,
    ) -> None:
        self.model = model
        self.processor = processor
        self.batch_size = batch_size
        self.max_batch_tokens = max_batch_tokens
        self.num_workers = num_workers
        self.share_prefixes = share_prefixes
        self.min_saving: int | None = None
        self.is_compiled = compile_model is not False
        self.pad_to_multiple_of = 64 if self.is_compiled and pad_to_multiple_of is None else pad_to_multiple_of
        if self.is_compiled:
            arguments = {"dynamic": False, **(compile_model if isinstance(compile_model, dict) else {})}
            self._text_model.compile(**arguments)
        self._limit = BatchLimit(batch_size)
        self._kept_layers = layers_computed_again if gradient_checkpointing else nullcontext
        self._products = nullcontext if self.is_compiled else products_by_onednn
        self._attention = nullcontext if self.is_compiled else grouped_attention
        keep_freed_memory()
        self.vision = VisionEncoder(model, self._limit, self._kept_layers)
        text_config = model.config.get_text_config()
        # A sliding window would count padding between prefix and rest as if it were text.
        self._has_window = getattr(text_config, "sliding_window", None) is not None
        self._takes_token_types = "token_type_ids" in inspect.signature(model.vlm.forward).parameters
        self._answers = [model.config.yes_token_id, model.config.no_token_id]

    @staticmethod
    def unsupported_reason(model: RewardDanceForYesScoring, processor: RewardDanceProcessor) -> str | None:
        """Why a model cannot be scored by the engine, or None if the scores are known to be those of the plain path."""
        adapters = getattr(model, "peft_config", None) or {}
        if any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters.values()):
            return "an adapter adds virtual tokens to the prompt"
        if is_sharded(model):
            return "its weights are sharded over devices"
        model_type, text_type = model.config.vlm_config.model_type, model.config.get_text_config().model_type
        is_known = model_type in EXACT_MODEL_TYPES and text_type in EXACT_TEXT_TYPES
        difference = None if is_known else difference_from_plain_path(ScoringEngine, model, processor)
        return difference and f"model type {model_type!r} is not known to be scored equally: {difference}"

    @contextmanager
    def session(self) -> Iterator[EngineSession]:
        """Open a session, in which images are prepared and seen once. Weights must not change until its end."""
        executor = ThreadPoolExecutor(self.num_workers) if self.num_workers else None
        try:
            yield EngineSession(ImageDesk(self.processor, executor), QuestionWriter(self.model, self.processor))
        finally:
            if executor is not None:
                executor.shutdown(wait=True, cancel_futures=True)

    def with_batch_size(self, batch_size: int) -> "ScoringEngine":
        """The same engine with another largest number of questions per forward pass."""
        engine = copy(self)
        engine.batch_size, engine._limit = batch_size, BatchLimit(batch_size)
        engine.vision = VisionEncoder(self.model, engine._limit, self._kept_layers)
        return engine

    def answer(
        self,
        windows: Iterator[list[Question]],
        session: EngineSession,
        on_progress: Callable[[int], Any] = lambda count: None,
        apart: bool = False,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Log-odds and scores of the questions of each window. Windows that are `apart` share no images."""

        def begin() -> tuple[list[Question], EngineSession, list[list[Future[PreparedImage]]]]:
            of_window = session.apart() if apart else session
            questions = of_window.desk.open(next(windows, []))
            return questions, of_window, of_window.desk.take(questions)

        questions, of_window, futures = begin()
        while questions:
            with self._products(self.model), self._attention(self.model):
                images = self.vision.encode(futures, of_window)
                self.vision.forget(of_window, images)
                following = begin()  # its images are prepared while the language model works
                tokenized = [of_window.writer.write(*pair) for pair in zip(questions, images, strict=True)]
                answers = self._answer(tokenized, of_window, on_progress)
            of_window.statistics.num_questions += len(questions)
            of_window.statistics.num_images = of_window.desk.num_preprocessed
            yield answers
            questions, of_window, futures = following

    def _answer(
        self, questions: list[TokenizedQuestion], session: EngineSession, on_progress: Callable[[int], Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        attention = self.model.config.get_text_config()._attn_implementation
        may_share = self.share_prefixes and attention in EXACT_ATTENTION
        min_saving = MIN_SAVING if self.min_saving is None else self.min_saving
        roots, minimum = build_tree(questions, min_saving if may_share else 1 << 62)
        if may_share and not needs_graph(self.model, is_sample=False):
            for root in roots:
                root.split_before_gradient(min_saving // 2)  # a backward pass costs twice a forward pass
        session.statistics.minimum_tokens += minimum
        session.statistics.plain_tokens += sum(len(question.token_ids) for question in questions)
        rows: list[int] = []
        answers: list[tuple[torch.Tensor, torch.Tensor]] = []

        def collect(leaves: list[Node], logits: torch.Tensor, scores: torch.Tensor) -> None:
            rows.extend(row for leaf in leaves for row in leaf.rows)
            index = torch.tensor([i for i, leaf in enumerate(leaves) for _ in leaf.rows], device=logits.device)
            answers.append((logits[index], scores[index]))
            on_progress(len(index))

        try:
            self._descend(roots, session, collect)
        except PrefixesNotShareableError as error:
            logger.warning(f"Prefixes are not shared: {error}. Scores are the same, but take longer.")
            self.share_prefixes = False
            rows.clear()
            answers.clear()
            self._descend(build_tree(questions, 1 << 62)[0], session, collect)
        logits, scores = (torch.cat(parts) for parts in zip(*answers, strict=True))
        order = torch.tensor(rows).argsort().to(logits.device)
        return logits[order], scores[order]

    def _descend(self, nodes: list[Node], session: EngineSession, collect: Callable[..., None]) -> None:
        """Compute parts whose parents have been computed, and all below them."""
        for batch in self._batches([node for node in nodes if not node.children]):
            self._limit.run_in_halves(batch, lambda part: collect(part, *self._answer_leaves(part, session)))
        for chunk in self._chunks([node for node in nodes if node.children]):
            missing = [node for node in chunk if not session.recall(node) and self._is_needed(node, session)]
            for batch in self._batches(missing):
                self._limit.run_in_halves(batch, lambda part: self._compute_states(part, session))
            for node in missing:
                session.keep(node)
            self._descend([child for node in chunk for child in node.children], session, collect)
            for node in chunk:
                node.states = None

    @staticmethod
    def _is_needed(node: Node, session: EngineSession) -> bool:
        """Whether a part that follows is still to be computed."""
        return any(not child.children or not session.recall(child) for child in node.children)

    def _chunks(self, nodes: list[Node]) -> Iterator[list[Node]]:
        """Groups of parts whose states are in memory at the same time."""
        chunk: list[Node] = []
        tokens = 0
        for node in nodes:
            if chunk and tokens + node.end > 2 * self.max_batch_tokens:
                yield chunk
                chunk, tokens = [], 0
            chunk.append(node)
            tokens += node.end
        if chunk:
            yield chunk

    def _batches(self, nodes: list[Node]) -> Iterator[list[Node]]:
        """Batches of parts of like length. Padding between prefix and rest is kept below an eighth of the batch."""
        is_trained = needs_graph(self.model, is_sample=False)

        def key(node: Node) -> tuple[bool, int, int]:
            return is_trained or node.requires_grad, node.length, node.start

        batch: list[Node] = []
        for node in sorted(nodes, key=key, reverse=True):
            wider = [*batch, node]
            longest, past = wider[0].length, max(other.start for other in wider)  # the first is the longest
            if batch and (
                key(node)[0] != key(batch[0])[0]
                or len(wider) > self._limit.max_rows
                or len(wider) * (past + longest) > self.max_batch_tokens
                or 8 * sum(longest - other.length for other in wider) > longest * len(wider)
                or (self._has_window and node.length != longest)
            ):
                yield batch
                wider = [node]
            batch = wider
        if batch:
            yield batch

    def _answer_leaves(self, nodes: list[Node], session: EngineSession) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-odds and scores of the questions that end in some parts, each `(len(nodes),)`."""
        inputs = self._inputs(nodes, session)
        with self._grad_mode(nodes), self._kept_layers(self.model), self._answers_only():
            head = self._answer_head()
            if head is None:
                output = self.model(**inputs)
                return output.logits[: len(nodes), 0].float(), output.scores[: len(nodes)].float()
            hidden = self.model.vlm.base_model(**inputs).last_hidden_state[: len(nodes), -1]
            # In float32: differences of logits in bfloat16 would be rounded to steps of up to an eighth.
            answers = nn.functional.linear(hidden.float(), *head) / self.model.config.score_temperature
            logits = answers[:, 0] - answers[:, 1]
            return logits, logits.sigmoid()

    @property
    def _text_model(self) -> Any:
        base_model: Any = self.model.vlm.base_model
        return getattr(base_model, "language_model", None) or base_model.text_model

    def _answers_only(self) -> AbstractContextManager[None]:
        """Where the last layer need not compute what nobody reads, as states are those before it: without a graph, in known models."""
        is_known = self.model.config.get_text_config().model_type in EXACT_TEXT_TYPES
        if torch.is_grad_enabled() or self.is_compiled or not is_known:
            return nullcontext()
        return last_position_only(self._text_model)

    def _answer_head(self) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Weights of the two answers alone, if the scores need no other logits and the head is a plain product."""
        config = self.model.config
        if config.has_scalar_head or config.score_normalization != "yes_no":
            return None
        head = self.model.get_output_embeddings()
        is_capped = getattr(config.get_text_config(), "final_logit_softcapping", None)
        if type(head) is not nn.Linear or head.weight.device.type == "meta" or is_capped:
            return None
        bias = None if head.bias is None else head.bias[self._answers].float()
        return head.weight[self._answers].float(), bias

    def _compute_states(self, nodes: list[Node], session: EngineSession) -> None:
        """Key/value states at the ends of some parts."""
        inputs = self._inputs(nodes, session)
        inputs.setdefault(CACHE_NAME, DynamicCache())
        inputs["use_cache"] = True
        with self._grad_mode(nodes), self._answers_only():
            cache = self.model.vlm.base_model(**inputs)[CACHE_NAME]
        longest = inputs["input_ids"].shape[1]
        past = inputs["attention_mask"].shape[1] - longest
        parts = [(node.start, node.end) for node in nodes]
        # A CUDA graph writes its next results to the same place.
        states = take_states(cache, parts, past, longest, copy=self.is_compiled)
        for node, of_node in zip(nodes, states, strict=True):
            node.states = of_node

    def _grad_mode(self, nodes: list[Node]) -> torch.set_grad_enabled:
        return torch.set_grad_enabled(needs_graph(self.model, any(node.requires_grad for node in nodes)))

    def _inputs(self, nodes: list[Node], session: EngineSession) -> dict[str, Any]:
        """Inputs of the model for a batch of parts: `[padding, prefix, padding, part]` in each row."""
        multiple = self.pad_to_multiple_of
        past = _round_up(max(node.start for node in nodes), multiple)
        longest = max(node.length for node in nodes)
        if not (past and self._has_window):
            longest = _round_up(longest, multiple)
        num_rows = len(nodes) if multiple is None else min(1 << (len(nodes) - 1).bit_length(), self.batch_size)
        padded = [*nodes, *[nodes[0]] * (num_rows - len(nodes))]
        dimensions = nodes[0].question.positions.shape[0]
        ids = np.full((num_rows, longest), self.processor.tokenizer.pad_token_id)
        mask = np.zeros((num_rows, past + longest), dtype=np.int64)
        positions = np.zeros((dimensions, num_rows, longest), dtype=np.int64)
        is_image = np.zeros((num_rows, past + longest), dtype=np.int64)
        for row, node in enumerate(padded):
            question, own, prefix = node.question, slice(node.start, node.end), slice(past - node.start, past)
            ids[row, longest - node.length :] = question.token_ids[own]
            positions[:, row, longest - node.length :] = question.positions[:, own]
            mask[row, prefix] = mask[row, past + longest - node.length :] = 1
            kinds = question.token_ids == session.writer.image_token_id
            is_image[row, prefix] = kinds[: node.start]
            is_image[row, past + longest - node.length :] = kinds[own]
        device = self.model.device
        position_ids = torch.from_numpy(positions).to(device)
        inputs: dict[str, Any] = {
            "input_ids": torch.from_numpy(ids).to(device),
            "attention_mask": torch.from_numpy(mask).to(device),
            "position_ids": position_ids[0] if dimensions == 1 else position_ids,
            "use_cache": past > 0,
        }
        if self._takes_token_types:  # tokens of an image see each other both ways
            inputs["token_type_ids"] = torch.from_numpy(is_image).to(device)
        images = [image for node in padded for image in node.images]
        if images:
            features = [session.features[image.number] for image in images]
            inputs["mm_encoder_outputs"] = {"image": self.vision.output_of(features)}
        if past:
            inputs[CACHE_NAME] = expand_states([node.parent.states for node in padded], past)  # type: ignore[union-attr]
        session.statistics.num_forward_passes += 1
        session.statistics.tokens += ids.size
        return inputs


def windows_of(questions: Iterable[Question], size: int | None = None) -> Iterator[list[Question]]:
    """Questions in lists of some size, which are planned together."""
    rest = iter(questions)
    return iter(lambda: list(islice(rest, size or WINDOW)), [])


def _round_up(count: int, multiple: int | None) -> int:
    return count if multiple is None else -(-count // multiple) * multiple
