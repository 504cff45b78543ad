"""Requests: header and media become a job for the judge."""

import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..rewards import as_reward
from ..scoring.questions import by_dimension, make_questions
from ..scoring.scorer import RewardDanceScorer
from .batching import Job
from .groups import reward_in_groups
from .limits import ServerLimits
from .media import MediaReader


COMMON = ("protocol", "rows", "requires_grad")
SCORE = ("images", "prompts", "references", "conditions", "task", "criteria", "dimensions", "examples")
FIELDS = {
    "score": SCORE,
    "gradient": SCORE,
    "compute": SCORE,
    "compare": (
        *("image_a", "image_b", "prompt", "swap", "explain", "condition", "task", "criteria"),
        *("max_new_tokens", "dimensions", "examples"),
    ),
    "rank": ("images", "prompt", "top_k", "condition", "task", "criteria", "ranking_method", "num_rounds", "examples"),
}
NEEDED = {
    "score": ("images", "prompts"),
    "gradient": ("images", "prompts", "requires_grad"),
    "compute": ("images", "prompts"),
    "compare": ("image_a", "image_b", "prompt"),
    "rank": ("images", "prompt"),
}
# Fields that hold one image or clip, and lists of those
MEDIA = ("image", "image_a", "image_b", "reference", "condition")
MEDIA_LISTS = ("images", "references", "conditions")
MAX_NEW_TOKENS = 1024
MAX_EXAMPLES = 64


@dataclass
class Asked:
    """A request whose media are described but not decoded: how much memory that takes, and how to go on."""

    num_samples: int
    num_bytes: int
    prompts: list[str]
    make_job: Callable[[], Job]


class RequestReader:
    """
    Reads requests, in several threads.

    Args:
        scorer ([`RewardDanceScorer`]):
            Judge, which is not asked here.
        limits ([`ServerLimits`]):
            Bounds.
    """

    def __init__(self, scorer: RewardDanceScorer, limits: ServerLimits) -> None:
        self.scorer = scorer
        self.limits = limits
        # These threads have a processor of their own: tokenizers are not shared while one of them pads.
        self.judge = copy(scorer)
        self.judge.processor = deepcopy(scorer.processor)
        self.is_counting = self.judge.processor.max_clip_tokens is not None  # with the wrapped processor, for clips
        self._loading: Any = threading.Lock() if self.is_counting else nullcontext()

    def read(self, path: str, header: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> Asked:
        """The request to a path. All that can be checked without decoding is checked."""
        given = {name: value for name, value in header.items() if value is not None}
        unknown = sorted(set(given) - {*FIELDS[path], *COMMON})
        missing = [name for name in NEEDED[path] if name not in given]
        if unknown or missing:
            raise ValueError(
                f"`/{path}` was given {unknown or 'no ' + str(missing)}, but takes {list(FIELDS[path])} and needs "
                f"{list(NEEDED[path])}. Add or remove fields."
            )
        leaves = given.pop("requires_grad", {})
        if not isinstance(leaves, dict) or (leaves and path != "gradient"):
            raise ValueError("`requires_grad` must give the samples of tensors by their names, at `/gradient` only.")
        rows = _list(given.pop("rows", []), "rows")  # numbers of samples, for messages
        given.pop("protocol", None)
        media = MediaReader(tensors, self.limits, list(leaves), self.scorer.model.device if leaves else "cpu")
        given = self._read_fields(given, media, "", rows)
        prompts = _strings(given.get("prompts", given.get("prompt")))
        num_samples = len(given.get("images", "ab"))
        if path == "compute" and self.scorer.is_pairwise and "references" not in given:
            return self._ask_in_groups(given, media, prompts)
        if path in ("compare", "rank"):
            size = self._check_call(path, given, num_samples)
            method = getattr(self.scorer, path)
            return Asked(
                num_samples, media.num_bytes, prompts, lambda: Job(call=lambda: method(**given), call_size=size)
            )
        width = len(_list(given.get("dimensions", ["?"]), "dimensions"))
        self._check_count(num_samples * width, "questions", self.limits.max_questions)
        if not all(_integer(row, "requires_grad") < num_samples for row in leaves.values()):
            raise ValueError(f"`requires_grad` names samples beyond the {num_samples} of the request.")
        of_leaves = {name: (row, media.tensors[name]) for name, row in leaves.items()}
        return Asked(
            num_samples, media.num_bytes, prompts, lambda: Job(self._questions(given, rows), width, of_leaves)
        )

    def _ask_in_groups(self, given: dict[str, Any], media: MediaReader, prompts: list[str]) -> Asked:
        """Samples of a prompt are compared with each other."""
        images, texts = given.pop("images"), given.pop("prompts")
        counts = [prompts.count(prompt) for prompt in prompts]
        if len(images) != len(prompts) or not isinstance(texts, list) or "dimensions" in given:
            raise ValueError(
                "`/compute` needs one prompt for each sample, and no `dimensions`, to compare samples in groups."
            )
        reward = as_reward(self.scorer)
        size = sum(count - 1 for count in counts)
        self._check_count(size, "questions", self.limits.max_questions)
        return Asked(
            len(images),
            media.num_bytes,
            prompts,
            lambda: Job(call=lambda: reward_in_groups(reward, images, prompts, **given), call_size=size),
        )

    def _questions(self, given: dict[str, Any], rows: list[Any]) -> list[Any]:
        """Questions with media that are loaded, and with that checked."""
        columns = {name: given.get(name) for name in SCORE if name != "dimensions"}
        processor = self.judge.processor
        with self._loading:
            made = make_questions(self.judge, **columns)  # type: ignore[arg-type]
            loaded = [processor.load(replace(q, row=_number(rows, i)), keep_gradient=True) for i, q in enumerate(made)]
        if "dimensions" not in given:
            return loaded
        return [new for question in loaded for new in by_dimension(processor, question, given["dimensions"])]

    def _read_fields(
        self, given: Mapping[str, Any], media: MediaReader, place: str, rows: list[Any]
    ) -> dict[str, Any]:
        """The same fields with images and clips, which texts are short enough for."""
        read: dict[str, Any] = {}
        for name, value in given.items():
            if name in MEDIA:
                value = None if value is None else media.read(value, f"{place}{name}")
            elif name in MEDIA_LISTS:
                self._check_count(len(_list(value, name)), name, self.limits.max_questions)
                items = ((f"{name}[{_number(rows, i)}]", item) for i, item in enumerate(value))
                value = [None if item is None else media.read(item, item_name) for item_name, item in items]
            elif name == "examples":
                self._check_count(len(_list(value, name)), name, MAX_EXAMPLES)
                value = [
                    self._read_fields(example, media, f"examples[{i}].", []) if isinstance(example, dict) else example
                    for i, example in enumerate(value)
                ]
            for text in _strings(value):
                self.limits.check_text(text, f"{place}{name}")
            read[name] = value
        return read

    def _check_call(self, path: str, given: dict[str, Any], count: int) -> int:
        """Number of questions of a comparison or ranking."""
        if path == "compare":
            if _integer(given.get("max_new_tokens", 1), "max_new_tokens") > MAX_NEW_TOKENS:
                raise ValueError(
                    f"`max_new_tokens` is {given['max_new_tokens']}, but this server allows {MAX_NEW_TOKENS}."
                )
            return 2 + 2 * len(_list(given.get("dimensions", []), "dimensions"))
        self._check_count(count, "samples to rank", self.limits.max_ranked)
        return count * (count - 1) if self.scorer.is_pairwise else count

    def _check_count(self, count: int, name: str, limit: int) -> None:
        if count > limit:
            raise ValueError(
                f"The request has {count} {name}, but this server takes {limit} at most. Send several requests."
            )


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"`{name}` is of type `{type(value).__name__}`, but must be a list.")
    return value


def _number(rows: list[Any], i: int) -> int:
    """Number that the client gives to a sample."""
    return _integer(rows[i], "rows") if i < len(rows) else i


def _integer(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
        raise TypeError(f"`{name}` is {value!r}, but must be an integer of 0 or more.")
    return value


def _strings(value: Any) -> list[str]:
    """Texts among a value and its entries."""
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str)]
