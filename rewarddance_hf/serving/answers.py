"""Answers of a judge, written as the body of a response and read back."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from ..scoring.results import Comparison, Ranking
from .batching import Answer
from .protocol import JSON, PROTOCOL, pack


class BadAnswerError(Exception):
    """The answer of a server cannot be read."""


GRADIENT = "gradient of "  # prefix of names of tensors


def write_answer(answer: Any, content_type: str) -> bytes:
    """Body of an answer, in the form of its request."""
    header, tensors = _parts(answer)
    if content_type != JSON:
        return pack(header, tensors)
    return write_json({**header, **{name: _nested(tensor.tolist()) for name, tensor in tensors.items()}})


def write_json(content: Mapping[str, Any]) -> bytes:
    """JSON body. Numbers that are not finite must be null already, since JSON has none."""
    return (json.dumps({"protocol": PROTOCOL, **content}, allow_nan=False) + "\n").encode()


def _parts(answer: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    if isinstance(answer, Comparison):
        return asdict(answer), {}
    if isinstance(answer, Ranking):
        tensors = {"wins": answer.wins, "scores": answer.scores, "matrix": answer.matrix}
        return {"order": answer.order, "num_questions": answer.num_questions}, tensors
    gradients = {GRADIENT + name: gradient for name, gradient in answer.gradients.items()}
    return {}, {"scores": answer.scores, "logits": answer.logits, **gradients}


def read_scores(tensors: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> Answer:
    """Scores of an answer, which must be of this shape and finite."""
    for name in ("scores", "logits"):
        found = tensors.get(name)
        if found is None or tuple(found.shape) != shape or not found.isfinite().all():
            got = "none" if found is None else f"shape {tuple(found.shape)}"
            raise BadAnswerError(f"the answer has {got} of `{name}`, but must have {shape} finite numbers")
    gradients = {name.removeprefix(GRADIENT): value for name, value in tensors.items() if name.startswith(GRADIENT)}
    return Answer(tensors["logits"], tensors["scores"], gradients)


def read_comparison(header: Mapping[str, Any]) -> Comparison:
    """Verdict of an answer."""
    found = {name: header[name] for name in Comparison.__dataclass_fields__}
    if found["dimensions"] is not None:
        found["dimensions"] = {name: read_comparison(verdict) for name, verdict in found["dimensions"].items()}
    return Comparison(**found)


def read_ranking(header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Ranking:
    """Ranking of an answer."""
    return Ranking(header["order"], tensors["wins"], tensors["scores"], tensors["matrix"], header["num_questions"])


def _nested(value: Any) -> Any:
    """Numbers with null in place of those that are not finite."""
    if isinstance(value, list):
        return [_nested(part) for part in value]
    return value if math.isfinite(value) else None
