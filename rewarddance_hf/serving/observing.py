"""Metrics of a server, and a log with a line of JSON for each event, without texts or images of users."""

import asyncio
import json
import logging
import sys
import time
import traceback
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


logger = logging.getLogger("rewarddance_hf.serving")


class Metrics:
    """Metrics of one server, in the form of Prometheus."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        common: dict[str, Any] = {"namespace": "rewarddance", "registry": self.registry}
        self.requests = Counter("requests", "Requests by path and status", ["path", "status"], **common)
        self.seconds = Histogram("request_seconds", "Seconds from headers to answer", ["path"], **common)
        self.wait_seconds = Histogram("wait_seconds", "Seconds that questions waited for the judge", **common)
        self.samples = Counter("samples", "Samples that were judged", **common)
        self.batch_questions = Histogram(
            "batch_questions", "Questions answered together", buckets=[2**i for i in range(11)], **common
        )
        self.batch_requests = Histogram(
            "batch_requests", "Requests answered together", buckets=[2**i for i in range(9)], **common
        )
        self.judge_seconds = Counter("judge_seconds", "Seconds in which the judge worked", **common)
        self.waiting = Gauge("waiting_questions", "Questions that wait", **common)
        self.memory = Gauge("memory_bytes", "Bytes of bodies and images that are held", **common)

    def on_batch(self, jobs: int, questions: int, seconds: float) -> None:
        self.batch_requests.observe(jobs)
        self.batch_questions.observe(questions)
        self.judge_seconds.inc(seconds)

    def write(self) -> bytes:
        return generate_latest(self.registry)


def log(event: str, **fields: Any) -> None:
    """Write one line."""
    line = {"time": round(time.time(), 3), "event": event, **{k: v for k, v in fields.items() if v is not None}}
    logger.info(json.dumps(line, default=str))


def log_failure(error: BaseException, **fields: Any) -> None:
    """Write where an error that nobody expects comes from."""
    frames = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    log("failure", error=type(error).__name__, message=str(error), frames=frames[-8:], **fields)


class LinesHandler(logging.StreamHandler):
    """Writes the lines of one turn of the event loop together, and others at once."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, or keep it until the event loop has done what it has before it."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # in another thread, or before and after the loop
            super().emit(record)
            return
        if not self._lines:
            loop.call_soon(self.flush)
        self._lines.append(self.format(record) + self.terminator)

    def flush(self) -> None:
        """Write the lines that were kept."""
        lines, self._lines = self._lines, []
        self.stream.write("".join(lines))
        super().flush()


def log_to_stderr() -> None:
    """Let lines be written to the standard error stream."""
    handler = LinesHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
