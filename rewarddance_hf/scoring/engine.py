"""
Engine behind the scorer: vision features once per picture, key/value states once per shared prefix.

Judgements of one call are a tree: those with the same first tokens and pictures share a branch, which is computed once,
and whose key/value states are expanded over all that follow. Nothing is approximated: in a causal language model the
states of a token depend on what goes before it only. Models in which this is not known to hold are scored plainly.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.utils import logging

from ..models import RewardDanceForYesScoring, RewardDanceProcessor
from .judgements import Judgement
from .pictures import PictureDesk, PreparedPicture
from .questions import Node, Question, QuestionWriter, build_tree


logger = logging.get_logger(__name__)

# Model types whose scores were found equal to those of the plain path, with images, clips, and gradient.
EXACT_MODEL_TYPES = (
    "gemma3",
    "glm4v",
    "idefics3",
    "internvl",
    "llava_onevision",
    "qwen2_5_vl",
    "qwen3_vl",
    "smolvlm",
)
# Attention functions that take a mask over cached and new tokens as it is.
EXACT_ATTENTION = ("eager", "sdpa")

WINDOW = 256  # judgements that are planned together, while the pictures of the next ones are prepared
MIN_SAVING = 64  # tokens that a shared part must save to be computed apart
MAX_FEATURE_TOKENS = 1 << 17  # picture tokens whose features are kept from window to window


@dataclass
class ScoringStatistics:
    """
    What the engine computed in one call of a scorer.

    Args:
        num_judgements (`int`):
            Number of judgements.
        num_pictures (`int`):
            Number of pictures that were preprocessed: distinct ones.
        num_encoded (`int`):
            Number of pictures that the vision encoder saw.
        num_forward_passes (`int`):
            Number of forward passes of the language model.
        tokens (`int`):
            Number of tokens that the language model computed, with padding.
        minimum_tokens (`int`):
            Least number with which the same states can be computed: each distinct beginning of a question once, among
            judgements that are planned together.
        plain_tokens (`int`):
            Number of tokens of all questions, which is what the plain path computes, without its padding.
    """

    num_judgements: int = 0
    num_pictures: int = 0
    num_encoded: int = 0
    num_forward_passes: int = 0
    tokens: int = 0
    minimum_tokens: int = 0
    plain_tokens: int = 0


@dataclass(eq=False)
class PrefixStates:
    """Key/value states of one row of a batch, whose first ones may be padding."""

    layers: list[tuple[torch.Tensor, ...]]
    row: int


@dataclass(eq=False)
class Features:
    """Vision features of one picture: `(tokens, hidden_size)`, and those for inner layers of the language model."""

    pooled: torch.Tensor
    deepstack: list[torch.Tensor]


@dataclass(eq=False)
class EngineSession:
    """
    What is kept between the calls of an engine that belong together, while the weights stay as they are.

    Args:
        desk ([`PictureDesk`]):
            Pictures.
        writer ([`QuestionWriter`]):
            Questions.
        statistics ([`ScoringStatistics`]):
            Sums over all calls.
        features (`dict[int, Features]`):
            Vision features by number of the picture.
        num_pictures (`int`):
            Number of pictures so far.
    """

    desk: PictureDesk
    writer: QuestionWriter
    statistics: ScoringStatistics = field(default_factory=ScoringStatistics)
    features: dict[int, Features] = field(default_factory=dict)
    num_pictures: int = 0


class PrefixesNotShareableError(RuntimeError):
    """A model keeps other states than keys and values of all tokens."""


class ScoringEngine:
    r"""
    Compute judgements with as little work as gives the same scores.

    Args:
        model ([`RewardDanceForYesScoring`]):
            Judge in evaluation mode.
        processor ([`RewardDanceProcessor`]):
            Processor of the judge.
        batch_size (`int`, *optional*, defaults to `8`):
            Largest number of judgements per forward pass.
        max_batch_tokens (`int`, *optional*, defaults to `32768`):
            Largest number of tokens per forward pass, cached ones and padding included. Halved whenever memory runs out.
        num_workers (`int`, *optional*, defaults to `2`):
            Number of threads that decode and preprocess pictures beside the model. With 0 this is done in turn.
        share_prefixes (`bool`, *optional*, defaults to `True`):
            Whether to compute shared prefixes once. Without it only vision features are.
        pad_to_multiple_of (`int`, *optional*):
            Multiple that lengths are padded to, with numbers of rows padded to powers of 2, so that few shapes occur: for
            compiled models and CUDA graphs. Defaults to 64 with `compile_model`, else to no padding.
        compile_model (`bool` or `dict`, *optional*, defaults to `False`):
            Whether to compile the language model in place, or arguments of `torch.compile` to do it with.
    """

    def __init__(
        self,
        model: RewardDanceForYesScoring,
        processor: RewardDanceProcessor,
        batch_size: int = 8,
        max_batch_tokens: int = 32768,
        num_workers: int = 2,
        share_prefixes: bool = True,
        pad_to_multiple_of: int | None = None,
        compile_model: bool | dict[str, Any] = False,
    ) -> None:
        self.model = model
        self.processor = processor
        self.batch_size = batch_size
        self.max_batch_tokens = max_batch_tokens
        self.num_workers = num_workers
        self.share_prefixes = share_prefixes
        self.is_compiled = compile_model is not False
        self.pad_to_multiple_of = 64 if self.is_compiled and pad_to_multiple_of is None else pad_to_multiple_of
        if self.is_compiled:
            arguments = {"dynamic": False, **(compile_model if isinstance(compile_model, dict) else {})}
            base_model: Any = model.vlm.base_model
            text_model = getattr(base_model, "language_model", None) or base_model.text_model
            text_model.compile(**arguments)
        self.max_rows = batch_size  # fewer than `batch_size` after memory ran out
        text_config = model.config.get_text_config()
        # A sliding window would count padding between prefix and rest as if it were text.
        self._has_window = getattr(text_config, "sliding_window", None) is not None
        self._takes_token_types = "token_type_ids" in inspect.signature(model.vlm.forward).parameters
        self._answers = [model.config.yes_token_id, model.config.no_token_id]

    @staticmethod
    def unsupported_reason(model: RewardDanceForYesScoring) -> str | None:
        """
        Say why a model cannot be scored by the engine.

        Args:
            model ([`RewardDanceForYesScoring`]):
                Judge.

        Returns:
            `str`: Reason, or None if the scores are known to be those of the plain path.
        """
        model_type = model.config.vlm_config.model_type
        if model_type not in EXACT_MODEL_TYPES:
            return f"model type {model_type!r} is not among {EXACT_MODEL_TYPES}"
        adapters = getattr(model, "peft_config", None) or {}
        if any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters.values()):
            return "an adapter adds virtual tokens to the prompt"
        if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
            return "its weights are sharded over devices"
        return None

    @contextmanager
    def session(self) -> Iterator[EngineSession]:
        """Open a session, in which pictures are prepared and seen once. Weights must not change until its end."""
        executor = ThreadPoolExecutor(self.num_workers) if self.num_workers else None
        try:
            desk = PictureDesk(self.processor, executor)
            yield EngineSession(desk, QuestionWriter(self.model, self.processor))
        finally:
            if executor is not None:
                executor.shutdown(wait=True, cancel_futures=True)

    def judge(
        self,
        judgements: Iterable[Judgement],
        session: EngineSession,
        on_progress: Callable[[int], Any] = lambda count: None,
        window: int | None = None,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """
        Compute log-odds and scores of judgements.

        Args:
            judgements (`Iterable[Judgement]`):
                What is asked. Taken a window at a time.
            session ([`EngineSession`]):
                Session that the call belongs to.
            on_progress (`Callable`, *optional*):
                Function that is told how many more judgements are done.
            window (`int`, *optional*, defaults to `256`):
                Number of judgements that are planned together, and given back together.

        Yields:
            `tuple`: `logits` and `scores` of the model for the next judgements, each of shape `(n,)`, as float32.
        """
        rest = iter(judgements)
        size = window or WINDOW
        start, planned = 0, list(islice(rest, size))
        futures = session.desk.take(planned)
        while planned:
            pictures = self._encode(futures, session)
            self._forget(session, pictures)
            following = list(islice(rest, size))
            # Prepared while the language model works.
            futures = session.desk.take(following, start + len(planned))
            questions = [session.writer.write(*pair) for pair in zip(planned, pictures, strict=True)]
            answers = self._answer(questions, session, on_progress)
            session.statistics.num_judgements += len(planned)
            session.statistics.num_pictures = session.desk.num_preprocessed
            yield answers
            start, planned = start + len(planned), following

    def drop_gradients(self, session: EngineSession) -> None:
        """Forget pictures that carry a gradient, and with them the graph of their features."""
        numbers = {number for number, features in session.features.items() if features.pooled.requires_grad}
        for number in numbers:
            del session.features[number]
        session.desk.forget(numbers)

    # ---- vision ----

    def _encode(self, futures: list[list[Any]], session: EngineSession) -> list[list[PreparedPicture]]:
        """Features of pictures that have none yet, in batches of those that are ready first."""
        rows, batch = [], {}
        for row in futures:
            rows.append([future.result() for future in row])
            for picture in rows[-1]:
                if picture.number < 0:
                    picture.number = session.num_pictures
                    session.num_pictures += 1
                if picture.number not in session.features and picture.number not in batch:
                    batch[picture.number] = picture
            if len(batch) >= self.max_rows:
                self._encode_batch(list(batch.values()), session)
                batch = {}
        if batch:
            self._encode_batch(list(batch.values()), session)
        return rows

    def _encode_batch(self, pictures: list[PreparedPicture], session: EngineSession) -> None:
        groups: dict[Any, list[PreparedPicture]] = {}
        for picture in pictures:
            shapes = tuple((name, tuple(value.shape[1:])) for name, value in sorted(picture.inputs.items()))
            groups.setdefault((picture.requires_grad, shapes), []).append(picture)
        for group in groups.values():
            for start in range(0, len(group), self.max_rows):
                self._in_halves(group[start : start + self.max_rows], lambda part: self._see(part, session))

    def _see(self, pictures: list[PreparedPicture], session: EngineSession) -> None:
        inputs = {
            name: torch.cat([torch.as_tensor(picture.inputs[name]) for picture in pictures]).to(self.model.device)
            for name in pictures[0].inputs
        }
        with torch.set_grad_enabled(self._needs_graph(pictures[0].requires_grad)):
            output = self.model.vlm.get_image_features(**inputs, return_dict=True)
        counts = [session.writer.num_tokens(picture) for picture in pictures]
        self._template = output.pooler_output
        pooled = _flatten(output.pooler_output).split(counts)
        deepstack = [_flatten(layer).split(counts) for layer in getattr(output, "deepstack_features", None) or []]
        for i, picture in enumerate(pictures):
            session.features[picture.number] = Features(pooled[i], [layer[i] for layer in deepstack])
            picture.inputs = {}
        session.statistics.num_encoded += len(pictures)
        self._feature_class = type(output)

    def _forget(self, session: EngineSession, pictures: list[list[PreparedPicture]]) -> None:
        """Drop the oldest features beyond what may be kept, but none of the window that is scored next."""
        recent = {picture.number for row in pictures for picture in row}
        count = sum(len(features.pooled) for features in session.features.values())
        dropped = set()
        for number in list(session.features):
            if count <= MAX_FEATURE_TOKENS:
                break
            if number not in recent:
                count -= len(session.features.pop(number).pooled)
                dropped.add(number)
        session.desk.forget(dropped)

    # ---- language ----

    def _answer(
        self, questions: list[Question], session: EngineSession, on_progress: Callable[[int], Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        roots, minimum = build_tree(questions, MIN_SAVING if self._may_share() else 1 << 62)
        session.statistics.minimum_tokens += minimum
        session.statistics.plain_tokens += sum(len(question.token_ids) for question in questions)
        rows: list[int] = []
        answers: list[tuple[torch.Tensor, torch.Tensor]] = []

        def collect(leaves: list[Node], logits: torch.Tensor, scores: torch.Tensor) -> None:
            counts = [len(leaf.rows) for leaf in leaves]
            rows.extend(row for leaf in leaves for row in leaf.rows)
            index = torch.arange(len(leaves)).repeat_interleave(torch.tensor(counts)).to(logits.device)
            answers.append((logits[index], scores[index]))
            on_progress(sum(counts))

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

    def _may_share(self) -> bool:
        implementation = self.model.config.get_text_config()._attn_implementation
        return self.share_prefixes and implementation in EXACT_ATTENTION

    def _descend(self, nodes: list[Node], session: EngineSession, collect: Callable[..., None]) -> None:
        """Compute parts whose parents have been computed, and all below them."""
        leaves = [node for node in nodes if not node.children]
        for batch in self._batches(leaves):
            self._in_halves(batch, lambda part: collect(part, *self._judge_leaves(part, session)))
        # The states of so many branches are in memory at a time.
        inner = [node for node in nodes if node.children]
        for chunk in self._chunks(inner):
            for batch in self._batches(chunk):
                self._in_halves(batch, lambda part: self._compute_states(part, session))
            self._descend([child for node in chunk for child in node.children], session, collect)
            for node in chunk:
                node.states = None

    def _chunks(self, nodes: list[Node]) -> Iterator[list[Node]]:
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
        if not nodes:
            return
        flagged = [(self._needs_graph(node.requires_grad), node) for node in nodes]
        flagged.sort(key=lambda item: (item[0], item[1].end - item[1].start, item[1].start), reverse=True)
        batch: list[Node] = []
        flag, longest, past = flagged[0][0], 0, 0
        for needs_graph, node in flagged:
            length = node.end - node.start
            count = len(batch) + 1
            total = max(past, node.start) + max(longest, length)
            padding = max(longest, length) * count - sum(other.end - other.start for other in [*batch, node])
            if batch and (
                needs_graph != flag
                or count > self.max_rows
                or count * total > self.max_batch_tokens
                or padding * 8 > max(longest, length) * count
                or (self._has_window and length != longest)
            ):
                yield batch
                batch, longest, past = [], 0, 0
            flag = needs_graph
            batch.append(node)
            longest, past = max(longest, length), max(past, node.start)
        yield batch

    def _needs_graph(self, is_sample: bool) -> bool:
        """Whether something is to carry a gradient: below pictures that do, and everywhere in a judge that is trained."""
        if not torch.is_grad_enabled():
            return False
        return is_sample or any(parameter.requires_grad for parameter in self.model.parameters())

    def _judge_leaves(self, nodes: list[Node], session: EngineSession) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-odds and scores of the questions that end in some parts, each `(len(nodes),)`."""
        inputs = self._inputs(nodes, session)
        config = self.model.config
        with torch.set_grad_enabled(self._needs_graph(any(node.requires_grad for node in nodes))):
            head = self._answer_head()
            if head is None:
                output = self.model(**inputs)
                return output.logits[: len(nodes), 0].float(), output.scores[: len(nodes)].float()
            hidden = self.model.vlm.base_model(**inputs).last_hidden_state[: len(nodes), -1]
            answers = nn.functional.linear(hidden, *head).float() / config.score_temperature
            logits = answers[:, 0] - answers[:, 1]
            return logits, logits.sigmoid()

    def _answer_head(self) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Weights of the two answers alone, if the scores need no other logits and the head is a plain product."""
        if self.model.config.paradigm == "regressive" or self.model.config.score_normalization != "yes_no":
            return None
        head = self.model.get_output_embeddings()
        changes = (getattr(self.model.config.get_text_config(), name, None) for name in ("final_logit_softcapping",))
        if type(head) is not nn.Linear or head.weight.device.type == "meta" or any(changes):
            return None
        return head.weight[self._answers], None if head.bias is None else head.bias[self._answers]

    def _compute_states(self, nodes: list[Node], session: EngineSession) -> None:
        """Key/value states at the ends of some parts."""
        inputs = self._inputs(nodes, session)
        inputs.setdefault("past_key_values", DynamicCache())
        inputs["use_cache"] = True
        with torch.set_grad_enabled(self._needs_graph(any(node.requires_grad for node in nodes))):
            cache: Any = self.model.vlm.base_model(**inputs).past_key_values
        length = inputs["attention_mask"].shape[1]
        layers: list[tuple[torch.Tensor, ...]] = []
        for layer in cache.layers:
            states = (layer.keys, layer.values)
            if type(layer) is not DynamicLayer or any(part.ndim != 4 or part.shape[2] != length for part in states):
                raise PrefixesNotShareableError(f"a cache layer is of type `{type(layer).__name__}`")
            # A CUDA graph writes its next results to the same place.
            layers.append(tuple(part.clone() for part in states) if self.is_compiled else states)
        longest = inputs["input_ids"].shape[1]
        for row, node in enumerate(nodes):
            part = node.end - node.start
            if 0 < node.start and part < longest:  # take the padding between prefix and part out
                past = length - longest
                pieces = ((past - node.start, past), (length - part, length))
                own = [
                    tuple(torch.cat([states[row : row + 1, :, a:b] for a, b in pieces], dim=2) for states in layer)
                    for layer in layers
                ]
                node.states = PrefixStates(own, 0)
            else:
                node.states = PrefixStates(layers, row)

    def _inputs(self, nodes: list[Node], session: EngineSession) -> dict[str, Any]:
        """Inputs of the model for a batch of parts: `[padding, prefix, padding, part]` in each row."""
        multiple = self.pad_to_multiple_of
        past = _round_up(max(node.start for node in nodes), multiple)
        longest = max(node.end - node.start for node in nodes)
        if not (past and self._has_window):
            longest = _round_up(longest, multiple)
        num_rows = len(nodes) if multiple is None else min(_power_of_2(len(nodes)), self.batch_size)
        padded = [*nodes, *[nodes[0]] * (num_rows - len(nodes))]
        dimensions = nodes[0].question.positions.shape[0]
        ids = np.full((num_rows, longest), self.processor.tokenizer.pad_token_id)
        mask = np.zeros((num_rows, past + longest), dtype=np.int64)
        positions = np.zeros((dimensions, num_rows, longest), dtype=np.int64)
        is_image = np.zeros((num_rows, past + longest), dtype=np.int64)
        for row, node in enumerate(padded):
            question, length = node.question, node.end - node.start
            ids[row, longest - length :] = question.token_ids[node.start : node.end]
            positions[:, row, longest - length :] = question.positions[:, node.start : node.end]
            mask[row, past - node.start : past] = 1
            mask[row, past + longest - length :] = 1
            kinds = question.token_ids == session.writer.image_token_id
            is_image[row, past - node.start : past] = kinds[: node.start]
            is_image[row, past + longest - length :] = kinds[node.start : node.end]
        device = self.model.device
        position_ids = torch.from_numpy(positions).to(device)
        inputs: dict[str, Any] = {
            "input_ids": torch.from_numpy(ids).to(device),
            "attention_mask": torch.from_numpy(mask).to(device),
            "position_ids": position_ids[0] if dimensions == 1 else position_ids,
            "use_cache": past > 0,
        }
        if self._takes_token_types:  # tokens of a picture see each other both ways
            inputs["token_type_ids"] = torch.from_numpy(is_image).to(device)
        pictures = [picture for node in padded for picture in node.pictures]
        if pictures:
            features = [session.features[picture.number] for picture in pictures]
            inputs["mm_encoder_outputs"] = {"image": self._feature_output(features)}
        if past:
            inputs["past_key_values"] = _expand([node.parent.states for node in padded], past)  # type: ignore[union-attr]
        session.statistics.num_forward_passes += 1
        session.statistics.tokens += ids.size
        return inputs

    def _feature_output(self, features: list[Features]) -> Any:
        """Features of several pictures in the form in which the vision encoder gives them."""
        pooled = torch.cat([item.pooled for item in features])
        is_list = isinstance(self._template, (list, tuple))
        arguments: dict[str, Any] = {
            "pooler_output": [pooled] if is_list else pooled.view(-1, *self._template.shape[1:])
        }
        if features[0].deepstack:
            layers = zip(*(item.deepstack for item in features), strict=True)
            arguments["deepstack_features"] = [[torch.cat(layer)] for layer in layers]
        return self._feature_class(**arguments)

    def _in_halves(self, items: list[Any], run: Callable[[list[Any]], None]) -> None:
        """Run a batch; if memory runs out, run its halves, and smaller batches from then on."""
        try:
            return run(items)
        except RuntimeError as error:
            if len(items) == 1 or not is_out_of_memory(error):
                raise
        # Out of the handler, so that the failed pass is freed.
        half = (len(items) + 1) // 2
        if half < self.max_rows:
            self.max_rows = half
            logger.warning(f"Memory ran out with {len(items)} rows in a batch. Going on with at most {half}.")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._in_halves(items[:half], run)
        self._in_halves(items[half:], run)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory of a device or of the machine is used up."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def _expand(prefixes: list[PrefixStates], past: int) -> DynamicCache:
    """Cache whose rows are the key/value states of prefixes, padded on the left."""
    cache = DynamicCache()
    first = prefixes[0]
    is_one = all(prefix.layers is first.layers and prefix.row == first.row for prefix in prefixes)
    for i in range(len(first.layers)):
        states = []
        for kind in range(2):
            if is_one:
                rows = first.layers[i][kind][first.row : first.row + 1]
                states.append(_fit(rows, past).expand(len(prefixes), -1, -1, -1))
            else:
                states.append(torch.cat([_fit(p.layers[i][kind][p.row : p.row + 1], past) for p in prefixes]))
        layer = DynamicLayer()
        layer.lazy_initialization(*states)
        layer.keys, layer.values = states
        cache.layers.append(layer)
    return cache


def _fit(states: torch.Tensor, past: int) -> torch.Tensor:
    """The last `past` states, after padding where there are fewer. Padding is masked out by whoever uses them."""
    length = states.shape[2]
    if length >= past:
        return states[:, :, length - past :]
    return nn.functional.pad(states, (0, 0, past - length, 0))


def _flatten(features: Any) -> torch.Tensor:
    """Features `(tokens, hidden_size)` of all pictures in a row."""
    if isinstance(features, (list, tuple)):
        return torch.cat([_flatten(part) for part in features])
    return features.reshape(-1, features.shape[-1])


def _round_up(count: int, multiple: int | None) -> int:
    return count if multiple is None else -(-count // multiple) * multiple


def _power_of_2(count: int) -> int:
    return 1 << (count - 1).bit_length()
