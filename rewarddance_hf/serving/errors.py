"""Errors across the network: the client raises the error that a local judge would raise."""

import math
from typing import Any

import torch

from ..rewards import NonFiniteScoreError


class RemoteRewardError(RuntimeError):
    """
    A remote judge returned no rewards.

    Args:
        message (`str`):
            Which samples, why and what to do.
        rows (`list[int]`, *optional*):
            Indices of samples without a reward.
    """

    def __init__(self, message: str, rows: list[int] | None = None) -> None:
        super().__init__(message)
        self.rows = rows or []


class JudgeChangedError(RemoteRewardError):
    """Another judge answers at an address than the one that answered there before, or than those of other addresses."""


class Refusal(Exception):
    """
    Why the server does not answer a request.

    Args:
        status (`int`):
            HTTP status.
        kind (`str`):
            Kind of error, for programs.
        message (`str`):
            For people.
        retry_after (`float`, *optional*):
            Seconds after which it may be tried again.
    """

    def __init__(self, status: int, kind: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.retry_after = retry_after


# Errors about what was asked, which a local judge would raise too. Their class travels by name.
OF_QUESTIONS = {error.__name__: error for error in (ValueError, TypeError, NotImplementedError)}


def describe_error(error: BaseException) -> tuple[int, dict[str, Any]]:
    """HTTP status and description of an error, as JSON can hold it. Unexpected errors are not described."""
    if isinstance(error, Refusal):
        return error.status, {"type": error.kind, "message": str(error)}
    if isinstance(error, NonFiniteScoreError):
        scores = [value if math.isfinite(value) else None for value in error.scores.double().flatten().tolist()]
        shape = list(error.scores.shape)
        return 422, {
            "type": "NonFiniteScoreError",
            "message": str(error),
            "rows": error.rows,
            "scores": scores,
            "shape": shape,
        }
    for name, kind in OF_QUESTIONS.items():
        if isinstance(error, kind):
            return 422, {"type": name, "message": str(error)}
    if isinstance(error, ImportError):  # video files without PyAV
        return 501, {"type": "ImportError", "message": str(error)}
    return 500, {"type": "InternalError", "message": "The judge failed. The log of the server says why."}


def error_of(description: dict[str, Any], status: int, url: str, rows: list[int]) -> Exception:
    """The error that a description stands for; `rows` are the samples that were asked about."""
    kind, message = str(description.get("type")), str(description.get("message"))
    if kind == "NonFiniteScoreError":
        values = [math.nan if value is None else value for value in description["scores"]]
        scores = torch.tensor(values, dtype=torch.float32).view(description["shape"])
        return NonFiniteScoreError(message, [int(row) for row in description["rows"]], scores)
    if kind in OF_QUESTIONS:
        return OF_QUESTIONS[kind](message)
    if kind == "JudgeChangedError":
        return JudgeChangedError(message, rows)
    return RemoteRewardError(f"{url} answered with status {status}, {kind}: {message}", rows)
