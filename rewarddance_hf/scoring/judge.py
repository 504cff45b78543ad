"""A judge that answers questions: with the engine where scores stay the same, else plainly."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from ..checks import check_integers
from ..models import RewardDanceForYesScoring, RewardDanceProcessor
from ..models.question_rewarddance import Example, Question
from ..resumable import describe_weights, digest_of
from ..rewards import NonFiniteScoreError
from .engine.checkpointing import layers_computed_again, layers_of
from .engine.engine import ScoringEngine, windows_of
from .engine.session import EngineSession, ScoringStatistics
from .loading import is_sharded


logger = logging.get_logger(__name__)

# How far log-odds of a padded question may be from those of the same one alone, in low precision and in float32
PADDING_TOLERANCE = (0.1, 2e-4)
ENGINES = ("auto", "features", "plain")


class Judge:
    """Model and processor that answer questions; the base of [`RewardDanceScorer`], which documents the arguments."""

    sees_equal_images_once = True

    is_probability = True  # the reward, in all paradigms
    _source: tuple[str, dict[str, Any]] | None = None  # where it was loaded from

    def __init__(
        self,
        model: RewardDanceForYesScoring,
        processor: RewardDanceProcessor,
        batch_size: int = 8,
        engine: str = "auto",
        max_batch_tokens: int = 32768,
        num_workers: int = 2,
        pad_to_multiple_of: int | None = None,
        compile_model: bool | dict[str, Any] = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        check_integers(batch_size=batch_size, max_batch_tokens=max_batch_tokens)
        check_integers(may_be_none=True, pad_to_multiple_of=pad_to_multiple_of)
        check_integers(0, num_workers=num_workers)
        if engine not in ENGINES:
            raise ValueError(f"`engine` is {engine!r}, but must be one of {ENGINES}.")
        if gradient_checkpointing and not layers_of(model):
            raise ValueError(
                f"`gradient_checkpointing` is True, but `{type(model.vlm).__name__}` has no layers that can be computed again. Leave "
                "it out."
            )
        model.check_processor(processor)
        self.model = model.eval()
        self.processor = processor
        self.batch_size = batch_size
        self.gradient_checkpointing = gradient_checkpointing
        self.statistics: ScoringStatistics | None = None
        self._engine: ScoringEngine | None = None
        self._kept: EngineSession | None = None  # by `reuse`
        self._needs_one_by_one: bool | None = None  # not known before the first padded batch
        reason = None if engine == "plain" else ScoringEngine.unsupported_reason(model, processor)
        if engine == "auto" and reason is not None:
            logger.info(f"Questions are answered one batch at a time, and nothing is shared: {reason}.")
        if engine == "features" and reason is not None:
            raise ValueError(
                f"`engine` is 'features', but {reason}, so that scores may differ. Pass `engine=\"plain\"`, or leave it out."
            )
        if engine != "plain" and reason is None:
            limits = (batch_size, max_batch_tokens, num_workers)
            self._engine = ScoringEngine(
                model, processor, *limits, engine == "auto", pad_to_multiple_of, compile_model, gradient_checkpointing
            )

    @property
    def is_pairwise(self) -> bool:
        """Whether a sample is judged relative to a reference."""
        return self.model.config.uses_reference

    @property
    def is_sharded(self) -> bool:
        """Whether processes must ask together, as each holds a part of the weights only."""
        return is_sharded(self.model)

    def read_examples(self, examples: Any, task: str | None = None) -> tuple[Example, ...]:
        """Examples for questions to this judge, as [`RewardDanceProcessor.read_examples`]."""
        return self.processor.read_examples(examples, task, self.is_pairwise)

    def fingerprint(self) -> dict[str, Any]:
        """
        Identify this judge, for files that hold its scores.

        Returns:
            `dict[str, Any]`: Digests of weights and of the processor's settings (criteria and layout among them), paradigm, normalization,
            temperature and type of the weights.
        """
        config = self.model.config
        settings = {name: getattr(config, name) for name in ("paradigm", "score_normalization", "score_temperature")}
        return {
            "class": "RewardDanceScorer",
            **settings,
            "dtype": str(self.model.dtype),
            "weights": describe_weights(self.model),
            "processor": digest_of(self.processor.to_dict(), self.processor.chat_template),
        }

    def with_batch_size(self, batch_size: int) -> "Judge":
        """The same judge with another largest number of questions per forward pass."""
        judge = copy(self)
        judge.batch_size, judge._kept = batch_size, None
        judge._engine = None if self._engine is None else self._engine.with_batch_size(batch_size)
        return judge

    def ask(
        self,
        questions: Iterable[Question],
        count: int | None = None,
        show_progress: bool = False,
        session: EngineSession | None = None,
        window: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-odds and scores of all questions, as in [`~Judge.stream`]."""
        with tqdm(total=count, desc="Scoring", unit="question", disable=not show_progress) as progress:
            logits, scores = zip(*self.stream(questions, progress.update, session, window), strict=True)
        return torch.cat(logits), torch.cat(scores)

    def stream(
        self,
        questions: Iterable[Question],
        on_progress: Callable[[int], Any] = lambda count: None,
        session: EngineSession | None = None,
        window: int | None = None,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """
        `logits` and `scores` `(n,)` of the model for the next questions, as float32. All rewards come from here.
        `on_progress` is called with the number of questions that have just been answered. `session` is that of a call
        that goes on, and `window` the number of questions that the engine plans and yields together. Scores that are
        not finite raise `NonFiniteScoreError` with the numbers of their questions.
        """
        numbered = (q if q.row is not None else replace(q, row=i) for i, q in enumerate(questions))
        size = self.batch_size if self._engine is None else window
        return self.stream_windows(windows_of(numbered, size), on_progress, session)

    def stream_windows(
        self,
        windows: Iterator[list[Question]],
        on_progress: Callable[[int], Any] = lambda count: None,
        session: EngineSession | None = None,
        apart: bool = False,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """
        As [`~Judge.stream`], of numbered questions that are planned and answered together. The next window is taken while
        one is answered, so that its images are prepared meanwhile. An empty one ends the stream. Windows that are `apart`
        share nothing, so that scores do not depend on what is in others, not even by rounding.
        """
        count, known = 0, []
        with nullcontext(session) if session is not None else self.session() as session:
            if self._engine is None or session is None:
                batches = self._answer_plainly(windows, on_progress)
            else:
                batches = self._engine.answer(windows, session, on_progress, apart)
            for logits, scores in batches:
                known.append(scores.detach())
                finite = logits.isfinite() & scores.isfinite()
                if not finite.all():
                    raise non_finite_error([count + i for i in (~finite).nonzero()[:, 0].tolist()], torch.cat(known))
                count += len(finite)
                yield logits, scores

    def _answer_plainly(
        self, windows: Iterator[list[Question]], on_progress: Callable[[int], Any]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in windows:
            batch = [self.processor.load(question, keep_gradient=True) for question in batch]
            if self._needs_one_by_one is not True:
                logits, scores, num_padded = self._answer_together(batch)
                if self._needs_one_by_one is None and num_padded.any():
                    self._needs_one_by_one = self._depends_on_padding(
                        batch[num_padded.argmax()], logits[num_padded.argmax()]
                    )
            if self._needs_one_by_one:
                logits, scores = map(
                    torch.cat, zip(*(self._answer_together([question])[:2] for question in batch), strict=True)
                )
            on_progress(len(batch))
            yield logits, scores

    def _answer_together(self, batch: list[Question]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-odds and scores of a batch of loaded questions, and the number of padding tokens of each."""
        inputs = self.processor.encode(batch).to(self.model.device)
        with layers_computed_again(self.model) if self.gradient_checkpointing else nullcontext():
            output = self.model(**inputs)
        return output.logits[:, 0].float(), output.scores.float(), (inputs["attention_mask"] == 0).sum(-1)

    @torch.no_grad()
    def _depends_on_padding(self, question: Question, padded: torch.Tensor) -> bool:
        """
        Whether a padded question has other log-odds than it has alone. In some families plain transformers counts padding as if
        it were text (convolutions, states, positions), which only such a comparison tells.
        """
        alone = self._answer_together([question])[0][0]
        gap = (alone - padded.detach()).abs().item()
        tolerance = PADDING_TOLERANCE[self.model.dtype == torch.float32] * max(1.0, abs(alone.item()))
        if gap <= tolerance or not math.isfinite(gap):  # what is not finite is told by who reads the scores
            return False
        logger.warning(
            f"Log-odds of {self.model.config.vlm_config.model_type!r} models depend on padding, here by {gap:.1g}: questions are "
            "asked one by one from now on, so that scores do not depend on what is beside them. Pass `batch_size=1` to silence "
            "this."
        )
        return True

    @contextmanager
    def reuse(self) -> Iterator[None]:
        """
        Keep images, their features and the key/value states of what questions share from call to call inside this context, e.g.
        of references that come again and again in a training run. The weights of the judge must not change meanwhile. Nothing
        with a gradient is kept; of features up to 65,536 tokens are, and of states up to a gibibyte, the latest.

        Example:

        ```python
        with scorer.reuse():
            for samples in generator:
                scorer.score(samples, prompts, references).mean().backward()
        ```
        """
        if self._engine is None or self._kept is not None:
            yield
            return
        with self._engine.session() as self._kept:
            self._kept.keeps_states = True
            try:
                yield
            finally:
                self._kept = None

    @contextmanager
    def session(self) -> Iterator[EngineSession | None]:
        """Questions of one session share images and features. Without an engine there is nothing to share."""
        self.statistics = None
        if self._engine is None:
            yield None
        elif self._kept is not None:
            self.statistics = self._kept.statistics
            try:
                yield self._kept
            finally:
                self._kept.drop_gradients()
        else:
            with self._engine.session() as session:
                self.statistics = session.statistics
                yield session


def non_finite_error(
    rows: list[int], scores: torch.Tensor, kept: str = "Scores until there are in `scores` of this error."
) -> NonFiniteScoreError:
    """Error about rows whose scores are not finite, which says where those before are kept."""
    message = (
        f"Scores of the rows {rows} are NaN or infinite, but must be finite. Check the weights for NaN, or load them in "
        f"another type (`dtype=torch.float32`). {kept}"
    )
    return NonFiniteScoreError(message, rows, scores)
