"""Requests wait in one bounded queue. One thread asks the judge, about several requests at once where possible."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from ..models.question_rewarddance import Question
from ..rewards import NonFiniteScoreError, frozen
from ..scoring.judge import non_finite_error
from ..scoring.scorer import RewardDanceScorer
from .errors import Refusal


@dataclass(eq=False)
class Job:
    """What one request asks the judge: questions, with gradients of what they show if there are leaves; or a call of its own."""

    questions: list[Question] = field(default_factory=list)
    width: int = 1  # questions of each sample: its dimensions
    leaves: dict[str, tuple[int, torch.Tensor]] = field(default_factory=dict)  # sample and tensor, by name
    call: Callable[[], Any] | None = None
    call_size: int = 0  # number of its questions
    future: Future = field(default_factory=Future)
    waited: float = 0.0  # seconds, when it is answered
    started: float = field(default_factory=time.monotonic)

    @property
    def size(self) -> int:
        return self.call_size if self.call else len(self.questions)

    @property
    def kind(self) -> Any:
        """Jobs of one kind are answered together. Those of the kind None never are."""
        if self.call or (self.leaves and self.width > 1):
            return None
        return "gradient" if self.leaves else "score"


@dataclass(frozen=True)
class Answer:
    """Log-odds and scores `(n,)` or `(n, width)`, and for each leaf its gradient, with one more dimension if `width` is above 1."""

    logits: torch.Tensor
    scores: torch.Tensor
    gradients: dict[str, torch.Tensor]


class Batcher:
    """
    The thread that asks the judge.

    Args:
        scorer ([`RewardDanceScorer`]):
            Judge. No other thread may use it.
        max_batch (`int`, *optional*, defaults to `256`):
            Questions that are planned together.
        gradient_batch (`int`, *optional*):
            Samples whose graphs are in memory together. Defaults to the batch size of the judge.
        max_waiting (`int`, *optional*, defaults to `1024`):
            Questions that may wait.
        merge (`bool`, *optional*, defaults to `True`):
            Whether requests are answered together. Without it, rounding in the last bits never depends on others.
        on_batch (`Callable`, *optional*):
            Told the number of jobs, of questions and of seconds of each batch.
        on_answers (`Callable`, *optional*):
            Called once when all answers of a batch are there.
    """

    def __init__(
        self,
        scorer: RewardDanceScorer,
        max_batch: int = 256,
        gradient_batch: int | None = None,
        max_waiting: int = 1024,
        merge: bool = True,
        on_batch: Callable[[int, int, float], Any] = lambda jobs, questions, seconds: None,
        on_answers: Callable[[], Any] = lambda: None,
    ) -> None:
        self.scorer = scorer
        self.max_batch = max_batch
        self.gradient_batch = gradient_batch or scorer.batch_size
        self.max_waiting = max_waiting
        self.merge = merge
        self.on_batch = on_batch
        self.on_answers = on_answers
        self.waiting = 0  # questions
        self._begun = 0  # questions that the judge has taken, and not answered
        self._seconds_each = 0.1  # of a question, a running mean
        self._jobs: list[Job] = []
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="rewarddance-judge", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Let a job wait, unless too many do."""
        with self._changed:
            if self._closed:
                raise Refusal(503, "ShuttingDownError", "The server is shutting down. Ask another one.", 1.0)
            if self.waiting and self.waiting + job.size > self.max_waiting:
                raise Refusal(
                    429,
                    "BusyError",
                    f"{self.waiting} questions wait, of {self.max_waiting} that may. Try again later.",
                    self.retry_after,
                )
            job.started = time.monotonic()
            self._jobs.append(job)
            self.waiting += job.size
            self._changed.notify()

    def withdraw(self, job: Job) -> bool:
        """Forget a job whose client is gone. Returns False if the judge has begun with it."""
        with self._changed:
            if job not in self._jobs:
                return False
            self._jobs.remove(job)
            self.waiting -= job.size
            return True

    @property
    def retry_after(self) -> float:
        """Seconds until half of what waits will be answered."""
        return min(max(0.5 * self.waiting * self._seconds_each, 0.1), 60.0)

    def close(self) -> None:
        """Answer the waiting requests, and end."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while jobs := self._next():
            if self.merge and jobs[0].kind == "score":
                self._stream(jobs)
            else:
                start = time.monotonic()
                self._answer(jobs)
                self._note(jobs, start)

    def _note(self, jobs: list[Job], start: float) -> None:
        """Count a batch that was begun some time ago, and is answered."""
        self.on_answers()
        seconds, count = time.monotonic() - start, sum(job.size for job in jobs)
        self._begun -= count
        self._seconds_each += 0.2 * (seconds / max(count, 1) - self._seconds_each)
        self.on_batch(len(jobs), count, seconds)

    def _stream(self, jobs: list[Job]) -> None:
        """
        Answer jobs, and those that come meanwhile, whose images are prepared while the judge works. If something fails, batches that
        were begun are answered one by one.
        """
        begun: deque[list[Job]] = deque()

        def windows() -> Iterator[list[Question]]:
            batch = jobs
            while batch:
                begun.append(batch)
                yield [question for job in batch for question in job.questions]
                # Fewer wait until more have come: a batch that is not full takes as long as a full one.
                batch = self._next(kind="score") if self.waiting >= self.scorer.batch_size else []

        start = time.monotonic()
        try:
            with torch.no_grad():
                for logits, scores in self.scorer.stream_windows(windows()):
                    answered = begun.popleft()
                    _give(answered, _split(answered, logits, scores))
                    self._note(answered, start)
                    start = time.monotonic()
        except Exception:
            for batch in begun:  # which of them is bad is not known
                start = time.monotonic()
                self._answer(batch)
                self._note(batch, start)

    def _next(self, kind: str | None = None) -> list[Job]:
        """
        Jobs that are answered together: the one that has waited longest, and others of its kind. With `kind`, only of this one, and
        none if no job waits.
        """
        with self._changed:
            while True:
                while not self._jobs and not self._closed and not kind:
                    self._changed.wait()
                if kind and (not self._jobs or self._jobs[0].kind != kind):
                    return []
                batch: list[Job] = []
                count, rest, limit = 0, [], self._window()
                for job in self._jobs:
                    is_alike = job.kind is not None and self.merge and batch and job.kind == batch[0].kind
                    if batch and not (is_alike and count < limit and count + job.size <= self.max_batch):
                        rest.append(job)
                        continue
                    self.waiting -= job.size
                    if job.future.set_running_or_notify_cancel():  # else its client is gone
                        batch.append(job)
                        count += job.size
                self._jobs = rest
                if batch or self._closed or kind:
                    self._begun += count
                    for job in batch:
                        job.waited = time.monotonic() - job.started
                    return batch

    def _window(self) -> int:
        """
        Questions after which no other request is planned with them: a third of all, in full batches, but at least three batches.
        So one part is judged, one prepared, and one on its way from and to clients.
        """
        size = self.scorer.batch_size
        return min(max(3, -(-(self.waiting + self._begun) // (3 * size))) * size, self.max_batch)

    def _answer(self, jobs: list[Job]) -> None:
        """Answer jobs. If they fail together, each is answered alone, so that only the failing one fails."""
        try:
            answers = self._compute(jobs)
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].future.set_exception(error)
                return
        else:
            _give(jobs, answers)
            return
        for job in jobs:
            self._answer([job])

    def _compute(self, jobs: list[Job]) -> list[Any]:
        if jobs[0].call:
            return [jobs[0].call()]
        if jobs[0].leaves:
            return self._differentiate(jobs)
        with torch.no_grad():
            try:
                logits, scores = self.scorer.ask(question for job in jobs for question in job.questions)
            except NonFiniteScoreError as error:
                raise _of_samples(error, jobs[0].width, []) from error
        return _split(jobs, logits, scores)

    def _differentiate(self, jobs: list[Job]) -> list[Answer]:
        """Scores and gradients. A score depends on its own sample only, so that the sum of all gives the gradient of each."""
        width = jobs[0].width
        rows = [(job, row) for job in jobs for row in range(len(job.questions) // width)]
        logits, scores = list[torch.Tensor](), list[torch.Tensor]()
        gradients: dict[Job, dict[str, torch.Tensor]] = {job: {} for job in jobs}
        for start in range(0, len(rows), self.gradient_batch):
            part = rows[start : start + self.gradient_batch]
            leaves = [
                (job, name, leaf) for job, row in part for name, (of_row, leaf) in job.leaves.items() if of_row == row
            ]
            asked = [question for job, row in part for question in job.questions[row * width : (row + 1) * width]]
            with torch.enable_grad(), frozen(self.scorer.model):
                try:
                    of_logits, of_scores = self.scorer.ask(asked)
                except NonFiniteScoreError as error:
                    raise _of_samples(error, width, scores) from error
                by_dimension = of_scores.view(-1, width).sum(dim=0)
                found = [
                    torch.autograd.grad(
                        by_dimension[i], [leaf for *_, leaf in leaves], retain_graph=i < width - 1, allow_unused=True
                    )
                    for i in range(width)
                ]
            for (job, name, leaf), *of_leaf in zip(leaves, *found, strict=True):
                values = [torch.zeros_like(leaf) if value is None else value for value in of_leaf]
                gradients[job][name] = (values[0] if width == 1 else torch.stack(values)).cpu()
            logits.append(of_logits.detach().cpu())
            scores.append(of_scores.detach().cpu())
        return _split(jobs, torch.cat(logits), torch.cat(scores), gradients)


def _split(
    jobs: list[Job],
    logits: torch.Tensor,
    scores: torch.Tensor,
    gradients: Mapping[Job, dict[str, torch.Tensor]] = MappingProxyType({}),
) -> list[Answer]:
    """The answer to each job."""
    sizes = [job.size for job in jobs]
    answers = []
    for job, *parts in zip(jobs, logits.cpu().split(sizes), scores.cpu().split(sizes), strict=True):
        of_logits, of_scores = (part if job.width == 1 else part.view(-1, job.width) for part in parts)
        answers.append(Answer(of_logits, of_scores, gradients.get(job, {})))
    return answers


def _give(jobs: list[Job], answers: list[Any]) -> None:
    for job, answer in zip(jobs, answers, strict=True):
        job.future.set_result(answer)


def _of_samples(error: NonFiniteScoreError, width: int, before: list[torch.Tensor]) -> NonFiniteScoreError:
    """The same error about samples, whose questions are `width` each, with the scores `before` it."""
    start = sum(map(len, before))
    known = torch.cat([*before, error.scores.cpu()])
    known = torch.nn.functional.pad(known, (0, -len(known) % width), value=torch.nan)
    return non_finite_error(
        sorted({(start + index) // width for index in error.rows}), known if width == 1 else known.view(-1, width)
    )
