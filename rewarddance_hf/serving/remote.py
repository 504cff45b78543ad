"""A judge on another machine, as a reward."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from tqdm.auto import tqdm

from ..models.question_rewarddance import Example, Question
from ..rewards import NonFiniteScoreError, is_address
from ..scoring.dataset import DatasetScoring
from ..scoring.judge import non_finite_error
from ..scoring.questions import Examples, as_list, make_columns
from ..scoring.ranking import check_ranking
from ..scoring.results import Comparison, Ranking
from .answers import BadAnswerError, read_comparison, read_ranking, read_scores
from .batching import Answer
from .errors import RemoteRewardError
from .media import MediaWriter
from .protocol import PROTOCOL, pack
from .transport import Transport


BACKENDS = ("rewarddance", "openai")
TOKEN_VARIABLE = "REWARDDANCE_TOKEN"
STREAMED = 64  # questions of a stream that are sent together
HEADER_SHARE = 0.9  # of the largest body that media may take


class RemoteReward(DatasetScoring):
    r"""
    Judge behind `rewarddance serve`, as a reward: the same call, with the gradient of images, as of a [`RewardDanceScorer`].

    The score of a sample depends on this sample only. A server returns its gradient with it, in one call and without
    keeping anything, so any replica may answer and a call can be repeated. There is no second derivative.

    Args:
        url (`str` or `list[str]`):
            Address of the server, or of several with the same judge: samples of a call are shared among them, and while one
            does not answer the others go on.
        token (`str`, *optional*):
            Token that the server wants. Defaults to the variable `REWARDDANCE_TOKEN`.
        timeout (`float`, *optional*, defaults to `300.0`):
            Seconds in which a request must be answered.
        max_wait (`float`, *optional*, defaults to `600.0`):
            Seconds for which a request is tried again, ever more rarely, while servers are busy, restarted or out of reach.
        backend (`str`, *optional*, defaults to `"rewarddance"`):
            What answers there: `"rewarddance"`, or `"openai"`, an engine with a folder of `rewarddance export`; then further
            arguments are those of [`~rewarddance_hf.serving.engine.EngineJudge`], which this call gives.

    Raises:
        `RemoteRewardError`: If no server answers, here and in each call: a reward that is missing is never a number.
        `JudgeChangedError`: If another judge answers than at the first contact.

    Example:

    ```python
    reward = RemoteReward("http://judge:8000")
    trainer = ReFLTrainer(pipeline, reward, args, train_dataset)
    ```
    """

    is_probability = True

    def __new__(cls, url: str | Sequence[str], *args: Any, backend: str = "rewarddance", **kwargs: Any) -> Any:
        if backend not in BACKENDS:
            raise ValueError(f"`backend` is {backend!r}, but must be one of {BACKENDS}.")
        if backend == "openai":
            from .engine import EngineJudge

            return EngineJudge(url, *args, **kwargs)
        return super().__new__(cls)

    def __init__(
        self,
        url: str | Sequence[str],
        token: str | None = None,
        timeout: float = 300.0,
        max_wait: float = 600.0,
        backend: str = "rewarddance",
    ) -> None:
        urls = [url] if isinstance(url, str) else list(url)
        if not urls or not all(is_address(each) for each in urls):
            raise ValueError(
                f"`url` is {url!r}, but must be an address, e.g. 'http://judge:8000', or a list of those."
            )
        self._transport = Transport(urls, token or os.environ.get(TOKEN_VARIABLE), timeout, max_wait)
        self.description: dict[str, Any] = self._transport.get("/v1/model")
        if self.description.get("protocol") != PROTOCOL:
            raise RemoteRewardError(
                f"{urls} speak version {self.description.get('protocol')!r} of the protocol, but this client {PROTOCOL}. Use the "
                "same version of rewarddance_hf on both sides."
            )
        self._transport.judge = self.description["judge"]
        limits = self.description["limits"]
        self._max_questions, self._max_bytes = (
            int(limits["max_questions"]),
            int(limits["max_body_bytes"] * HEADER_SHARE),
        )

    @classmethod
    def at(cls, addresses: str) -> "RemoteReward":
        """Judge at one address, or at several that are separated by commas, as commands take them."""
        return cls(addresses.split(","))

    @property
    def is_pairwise(self) -> bool:
        """Whether a sample is judged relative to a reference."""
        return self.description["paradigm"] == "pairwise"

    def fingerprint(self) -> dict[str, Any]:
        """That of the judge, as [`~RewardDanceScorer.fingerprint`]: files of scores do not tell where it ran."""
        return dict(self.description["fingerprint"])

    def with_batch_size(self, batch_size: int) -> "RemoteReward":
        """The same: the server chooses."""
        return self

    @property
    def is_sharded(self) -> bool:
        """Whether processes must ask together: never."""
        return False

    def read_examples(self, examples: Examples, task: str | None = None) -> tuple[()]:
        """Examples of rows of a file, which are read by the processor of a judge in this process only."""
        if examples:
            raise NotImplementedError(
                "`examples` were given, but files of scores of a remote judge have none. Pass them to `score`, or load the judge."
            )
        return ()

    def close(self) -> None:
        """Close connections."""
        self._transport.close()

    def score(
        self,
        images: Any,
        prompts: str | Sequence[str],
        references: Any = None,
        conditions: Sequence[Any] | None = None,
        task: str | Sequence[str | None] | None = None,
        criteria: str | Sequence[str | None] | None = None,
        dimensions: Sequence[str] | None = None,
        examples: Examples = None,
        show_progress: bool = False,
    ) -> torch.Tensor:
        """
        Compute rewards of samples. Arguments, returns and errors are those of [`RewardDanceScorer.score`]; rewards are on the
        device of `images`, if these are a tensor.

        Raises:
            `RemoteRewardError`: If no server answers, with the `rows` that have no reward.
        """
        columns = make_columns(self.description["paradigm"], images, prompts, references, conditions, task, criteria)
        rows = list(range(len(columns["images"])))
        device = images.device if isinstance(images, torch.Tensor) else "cpu"
        with tqdm(total=len(rows), desc="Scoring", unit="sample", disable=not show_progress) as progress:
            answers = self._ask(columns, rows, examples, dimensions, progress.update)
        return torch.cat([scores for _, scores in answers]).to(device)

    __call__ = score  # so that signatures tell what it takes as a reward function

    @torch.no_grad()
    def compare(
        self,
        image_a: Any,
        image_b: Any,
        prompt: str,
        swap: bool = True,
        explain: bool = False,
        condition: Any = None,
        task: str | None = None,
        criteria: str | None = None,
        max_new_tokens: int = 256,
        dimensions: Sequence[str] | None = None,
        examples: Examples = None,
    ) -> Comparison:
        """Decide which of two samples of a prompt is better. Arguments, returns and errors are those of [`RewardDanceScorer.compare`]."""
        writer = _Writer()
        media = {"image_a": image_a, "image_b": image_b, "condition": condition}
        described = {name: writer.write(value, name) for name, value in media.items() if value is not None}
        texts = {"prompt": prompt, "task": task, "criteria": criteria, "dimensions": dimensions and list(dimensions)}
        settings = {"swap": swap, "explain": explain, "max_new_tokens": max_new_tokens}
        header = {**described, **texts, **settings, "examples": writer.examples(examples)}
        return read_comparison(self._transport.post("/compare", pack(header, writer.tensors), [0, 1])[0])

    @torch.no_grad()
    def rank(
        self,
        images: Any,
        prompt: str,
        top_k: int | None = None,
        condition: Any = None,
        task: str | None = None,
        criteria: str | None = None,
        show_progress: bool = False,
        ranking_method: str = "round_robin",
        num_rounds: int | None = None,
        examples: Examples = None,
    ) -> Ranking:
        """Rank samples of a prompt. Arguments, returns and errors are those of [`RewardDanceScorer.rank`]."""
        samples = as_list(images, "images")
        check_ranking(len(samples), self.is_pairwise, top_k, ranking_method, num_rounds)
        writer = _Writer()
        described = [writer.write(sample, f"images[{i}]") for i, sample in enumerate(samples)]
        header = {
            "images": described,
            "prompt": prompt,
            "top_k": top_k,
            "condition": None if condition is None else writer.write(condition, "condition"),
            "task": task,
            "criteria": criteria,
            "ranking_method": ranking_method,
            "num_rounds": num_rounds,
            "examples": writer.examples(examples),
        }
        rows = list(range(len(samples)))
        return read_ranking(*self._transport.post("/rank", pack(header, writer.tensors), rows))

    def stream(
        self,
        questions: Iterable[Question],
        on_progress: Callable[[int], Any] = lambda count: None,
        session: None = None,
        window: int | None = None,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Log-odds and scores of questions as they arrive; see [`RewardDanceScorer.stream`]."""
        rest, known = iter(questions), list[torch.Tensor]()
        while batch := list(islice(rest, window or STREAMED)):
            if any(question.reasons_first or question.examples != batch[0].examples for question in batch):
                raise NotImplementedError(
                    "Questions with reasons first, or with examples of their own, were given, which a server is not asked. Load "
                    "the judge for them."
                )
            fields = {"images": "sample", "prompts": "prompt", "references": "reference", "conditions": "condition"}
            fields |= {"task": "task", "criteria": "criteria"}
            columns = {name: [getattr(question, field) for question in batch] for name, field in fields.items()}
            start = sum(map(len, known))
            rows = [start + i if question.row is None else question.row for i, question in enumerate(batch)]
            try:
                answers = self._ask(columns, rows, batch[0].examples, None, on_progress)
            except NonFiniteScoreError as error:
                scores = torch.cat([*known, error.scores])
                raise non_finite_error([start + row for row in error.rows], scores) from error
            logits, scores = (torch.cat(parts) for parts in zip(*answers, strict=True))
            known.append(scores.detach())
            yield logits, scores

    def _ask(
        self,
        columns: dict[str, list[Any]],
        rows: Sequence[int],
        examples: Examples,
        dimensions: Sequence[str] | None,
        on_progress: Callable[[int], Any],
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Log-odds and scores of the parts of a request, in order."""
        width = 1 if dimensions is None else len(dimensions)
        num_replicas = len(self._transport.urls)
        size = max(1, self._max_questions // max(width, 1))
        size = min(size, -(-len(rows) // num_replicas))  # replicas work at the same time
        common = {"dimensions": None if dimensions is None else list(dimensions)}
        parts = _write_parts(columns, rows, examples, common, size, self._max_bytes)
        answers: list[tuple[torch.Tensor, torch.Tensor]] = []

        def post(part: _Part) -> Answer:
            shape = (len(part.rows),) if width == 1 else (len(part.rows), width)
            try:
                return read_scores(self._transport.post(part.path, part.body, part.rows)[1], shape)
            except BadAnswerError as error:
                raise RemoteRewardError(f"Samples {part.rows} have no reward: {error}.", part.rows) from error

        try:
            for part, answer in _in_flight(post, parts, num_replicas):
                logits, scores = _with_gradient(part, answer)
                if dimensions is not None:
                    logits, scores = logits.view(-1, width), scores.view(-1, width)
                answers.append((logits, scores))
                on_progress(len(part.rows))
        except NonFiniteScoreError as error:
            before = [known.detach() for _, known in answers]
            start = sum(map(len, before))
            scores = torch.cat([*before, error.scores.view(-1, *before[0].shape[1:]) if before else error.scores])
            raise non_finite_error([start + row for row in error.rows], scores) from error
        return answers


@dataclass
class _Part:
    """Samples that are sent together."""

    rows: list[int]
    path: str
    body: bytes
    leaves: list[tuple[int, str, torch.Tensor]]  # place among the rows, name, tensor


def _write_parts(
    columns: Mapping[str, Sequence[Any]],
    rows: Sequence[int],
    examples: Examples,
    common: dict[str, Any],
    size: int,
    max_bytes: int,
) -> Iterator[_Part]:
    """Requests about samples: as many in each as the server takes."""
    start = 0
    while start < len(rows):
        writer = _Writer()
        header: dict[str, Any] = {**common, "examples": writer.examples(examples), "rows": []}
        header |= {name: [] for name in columns}
        for row in range(start, min(start + size, len(rows))):
            kept = writer.mark()
            described = {
                name: writer.write(columns[name][row], f"{name}[{rows[row]}]", row - start)
                for name in ("images", "references", "conditions")
            }
            if writer.num_bytes > max_bytes and row > start:
                writer.forget(kept)
                break
            if writer.num_bytes > max_bytes:
                raise ValueError(
                    f"`images[{rows[row]}]` and what it is shown with have {writer.num_bytes} bytes, but the server takes "
                    f"{max_bytes}. Send smaller images or fewer frames, or raise `--max-body-bytes` there."
                )
            for name in columns:
                header[name].append(described.get(name, columns[name][row]))
            header["rows"].append(rows[row])
        path = "/gradient" if writer.leaves else "/score"
        header["requires_grad"] = {name: place for place, name, _ in writer.leaves} or None
        for name in ("references", "conditions", "task", "criteria"):
            if all(value is None for value in header[name]):
                header[name] = None
        count = len(header["rows"])
        yield _Part(header["rows"], path, pack(header, writer.tensors), writer.leaves)
        start += count


def _in_flight(post: Callable[[_Part], Answer], parts: Iterator[_Part], count: int) -> Iterator[tuple[_Part, Answer]]:
    """Parts and their answers in order, with so many on their way at a time."""
    if count == 1:
        yield from ((part, post(part)) for part in parts)
        return
    threads = ThreadPoolExecutor(count)
    try:
        sent: deque[tuple[_Part, Future[Answer]]] = deque()
        for part in parts:
            sent.append((part, threads.submit(post, part)))
            if len(sent) == count:
                first, answer = sent.popleft()
                yield first, answer.result()
        yield from ((part, answer.result()) for part, answer in sent)
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def _with_gradient(part: _Part, answer: Answer) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-odds, and scores that carry the gradient."""
    if not part.leaves:
        return answer.logits, answer.scores
    missing = [name for _, name, leaf in part.leaves if name not in answer.gradients]
    if missing:
        raise RemoteRewardError(
            f"Samples {part.rows} have no reward: the answer has no gradient of {missing}.", part.rows
        )
    places, names, leaves = zip(*part.leaves, strict=True)
    gradients = [answer.gradients[name] for name in names]
    return answer.logits, _Score.apply(answer.scores, places, gradients, *leaves)  # type: ignore[no-untyped-call]


class _Score(torch.autograd.Function):
    """Scores that were computed elsewhere, with the derivative of each to the leaves of its own sample."""

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, places: Any, gradients: Any, *leaves: torch.Tensor) -> torch.Tensor:
        ctx.places, ctx.gradients = places, gradients
        ctx.save_for_backward(*leaves)
        return scores.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_scores: torch.Tensor) -> tuple[Any, ...]:
        found = []
        for place, gradient, leaf in zip(ctx.places, ctx.gradients, ctx.saved_tensors, strict=True):
            weights = grad_scores[place].reshape(-1, *[1] * leaf.ndim)  # one for each dimension
            gradient = gradient.to(weights).view(len(weights), *leaf.shape)
            found.append((weights * gradient).sum(dim=0).to(leaf))
        return None, None, None, *found


class _Writer(MediaWriter):
    """Media and examples of one request."""

    def examples(self, examples: Examples) -> list[dict[str, Any]] | None:
        """Descriptions of examples."""
        return [self._example(example, f"examples[{i}].") for i, example in enumerate(examples or ())] or None

    def _example(self, example: Mapping[str, Any] | Example, place: str) -> Any:
        if isinstance(example, Example):
            question = example.question
            media = {"image": question.sample, "reference": question.reference, "condition": question.condition}
            texts = {"prompt": question.prompt, "criteria": question.criteria, "task": question.task}
            example = {**media, **texts, "verdict": example.verdict}
        if not isinstance(example, Mapping):
            raise TypeError(f"`{place[:-1]}` is of type `{type(example).__name__}`, but must be a dict.")
        shown = ("image", "reference", "condition")
        with torch.no_grad():
            return {
                key: self.write(value, f"{place}{key}") if key in shown and value is not None else value
                for key, value in example.items()
            }
