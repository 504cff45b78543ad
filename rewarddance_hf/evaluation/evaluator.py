"""Evaluator: how often and how consistently a judge prefers the chosen image, and how well its probabilities are
calibrated."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from ..checks import check_integers
from ..data.preference import check_columns, check_row
from ..models import RewardDanceForYesScoring, RewardDanceProcessor
from ..models.media_rewarddance import load_frames, load_image, open_clip
from ..models.question_rewarddance import Question
from ..models.tasks_rewarddance import infer_task
from ..parallel import run_split
from ..resumable import content_of, digest_of
from ..rewards import NonFiniteScoreError, as_reward
from ..scoring.judge import Judge, non_finite_error
from ..scoring.loading import is_sharded
from . import statistics


logger = logging.get_logger(__name__)

# An accuracy whose interval ends below this, on this many rows or more, is that of swapped columns.
FAR_BELOW_HALF, FEWEST_ROWS = 0.4, 20


@dataclass(frozen=True, eq=False)
class EvaluationResults:
    """
    What a judge said about each row of a dataset.

    Args:
        logits (`np.ndarray` of shape `(rows, 2)`):
            `logits` of the model, with the chosen (column 0) and the rejected image (column 1) as sample. In the
            pairwise paradigm the other image is the reference.
        scores (`np.ndarray` of shape `(rows, 2)`):
            Rewards, in the same columns.
        log_odds (`np.ndarray` of shape `(rows, 2)`):
            Log-odds of the chosen image being preferred when it is image 2 (column 0) and image 1 (column 1). Without
            references both are the difference of `logits`.
        ties (`np.ndarray` of shape `(rows,)`):
            Whether neither image is preferred in truth.
        categories (`list`):
            Category of each row, or None.
        rows_fingerprint (`str`):
            Digest of all that a judge is shown of these rows.
    """

    logits: np.ndarray
    scores: np.ndarray
    log_odds: np.ndarray
    ties: np.ndarray
    categories: list[str | None]
    rows_fingerprint: str = ""

    @property
    def probabilities(self) -> np.ndarray:
        """Probabilities of the chosen image being preferred, of shape `(rows, 2)` like `log_odds`."""
        return statistics.sigmoid(self.log_odds)


class RewardDanceEvaluator:
    r"""
    Measure a judge or any reward function on preference rows.

    Pairwise judges are asked about each row in both orders; others score both samples, and their preference is the
    sigmoid of the difference of `logits`. The difference of both rewards of a function is read in the same way:
    `accuracy` only needs its sign, `accuracy_with_ties` and calibration its scale too. Rows that are true ties only
    count in `accuracy_with_ties` and `mean_reward`. Under several processes each scores its share of the rows, and all
    get the same figures.

    Args:
        dataset (`datasets.Dataset`, `list` or any dataset with a length):
            Preference rows.
        name (`str`, *optional*, defaults to `""`):
            Prefix of all metrics.
        batch_size (`int`, *optional*, defaults to that of the scorer, or `8`):
            Number of questions per forward pass, or of rows that a reward function is asked about together.
        bootstrap_samples (`int`, *optional*, defaults to `1000`):
            Number of resampled datasets behind the 95 % interval of the accuracy.
        tie_margin (`float`, *optional*, defaults to `0.05`):
            In `accuracy_with_ties` a tie is predicted where the order-averaged probability is at most this far from 0.5.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the bootstrap.
        show_progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Inputs:
        Rows as described by [`~rewarddance_hf.data.preference.check_row`], and optionally `category` (`str`).

    Returns:
        `dict[str, float]`:
        - `accuracy`: share of verdicts for the chosen image; each order of a row counts one half, and equal probabilities
          count as half right. `accuracy_low` and `accuracy_high` are the ends of its 95 % bootstrap interval over rows;
        - `accuracy_swap_averaged`: the same for the mean of both orders' probabilities;
        - `accuracy_with_ties`, if there are ties: share of right verdicts for the mean of both orders among chosen, rejected
          and tie;
        - `order_consistency`: share of rows with the same verdict in both orders (1 without references);
        - `ece` (10 bins), `brier`, `nll`: calibration of the probability of "yes" among the two answers;
        - `mean_reward`: mean of the model's `scores` over all questions;
        - `num_rows`, `num_ties`;
        - `category/<name>/accuracy`: accuracy of each category.

    Raises:
        `ValueError`: If the dataset is empty, has no length, or lacks a column, or an argument is out of range.

    Example:

    ```python
    from rewarddance_hf import RewardDanceEvaluator

    evaluator = RewardDanceEvaluator(dataset, name="ood")
    evaluator(scorer)["ood_accuracy"]
    evaluator.results.probabilities  # of every row
    ```
    """

    greater_is_better = True

    def __init__(
        self,
        dataset: Any,
        name: str = "",
        batch_size: int | None = None,
        bootstrap_samples: int = 1000,
        tie_margin: float = 0.05,
        seed: int = 0,
        show_progress: bool = False,
    ) -> None:
        if not hasattr(dataset, "__len__"):
            raise ValueError(
                f"`dataset` is of type `{type(dataset).__name__}` without a length, but the evaluator reads it to the end more "
                "than once. Take a part of it, e.g. `list(dataset.take(1000))`."
            )
        if len(dataset) == 0:
            raise ValueError("`dataset` is empty, but must have at least one row. Check its split and filters.")
        check_integers(bootstrap_samples=bootstrap_samples)
        check_integers(may_be_none=True, batch_size=batch_size)
        if not 0 <= tie_margin < 0.5:
            raise ValueError(f"`tie_margin` is {tie_margin}, but must be in `[0, 0.5)`. Leave it at 0.05.")
        if hasattr(dataset, "column_names"):
            check_columns(dataset.column_names)
            from ..data.rows import keep_images_encoded  # needs `datasets`, which such a dataset comes from

            dataset = keep_images_encoded(dataset)  # so that a corrupt image is named by its row
        self.dataset = dataset
        self.name = name
        self.batch_size = batch_size
        self.bootstrap_samples = bootstrap_samples
        self.tie_margin = tie_margin
        self.seed = seed
        self.show_progress = show_progress
        self.primary_metric = f"{name}_accuracy" if name else "accuracy"
        self.results: EvaluationResults | None = None

    def __call__(
        self,
        model: Judge | RewardDanceForYesScoring | Callable[..., Any],
        processor: RewardDanceProcessor | None = None,
    ) -> dict[str, float]:
        """
        Measure a judge. What it said about each row stays in `results`.

        Args:
            model ([`RewardDanceScorer`], [`RemoteReward`], [`RewardDanceForYesScoring`] or `Callable`):
                Judge, whose model keeps its training mode; or what [`~rewarddance_hf.rewards.as_reward`] takes, which is
                given images or lists of frames.
            processor ([`RewardDanceProcessor`], *optional*):
                Processor, if `model` is a model and no scorer.

        Returns:
            `dict[str, float]`: Metrics as listed above.

        Raises:
            `ValueError`: If a row lacks a column, an image cannot be read, a score is not finite, or all rows are ties.
        """
        results = self._ask(model, processor)
        untied = ~results.ties
        _check_preferences(untied)
        log_odds = results.log_odds[untied]
        probabilities = results.probabilities
        averaged = probabilities.mean(axis=1)
        row_credits = statistics.verdict_credits(log_odds).mean(axis=1)
        low, high = statistics.bootstrap_interval(row_credits, self.bootstrap_samples, self.seed)
        yes_log_odds, labels = _yes_log_odds(log_odds)
        yes_probabilities = statistics.sigmoid(yes_log_odds)
        metrics = {
            "accuracy": row_credits.mean(),
            "accuracy_low": low,
            "accuracy_high": high,
            "accuracy_swap_averaged": statistics.verdict_credits(_averaged_margins(log_odds)).mean(),
            "order_consistency": statistics.order_consistency(log_odds),
            "ece": statistics.expected_calibration_error(yes_probabilities, labels),
            "brier": statistics.brier_score(yes_probabilities, labels),
            "nll": statistics.negative_log_likelihood(yes_log_odds, labels),
            "mean_reward": results.scores.mean(),
            "num_rows": len(untied),
            "num_ties": (~untied).sum(),
        }
        if results.ties.any():
            metrics["accuracy_with_ties"] = statistics.accuracy_with_ties(averaged, results.ties, self.tie_margin)
        if high < FAR_BELOW_HALF and len(row_credits) >= FEWEST_ROWS:
            logger.warning(
                f"The accuracy is {100 * metrics['accuracy']:.1f} % on {len(row_credits)} rows, far below one half: the judge "
                "prefers what the rows call rejected. Are `chosen` and `rejected` swapped, or labels read the wrong way round?"
            )
        categories = np.array([category or "" for category in results.categories])[untied]
        for category in sorted(set(categories) - {""}):
            metrics[f"category/{category}/accuracy"] = row_credits[categories == category].mean()
        prefix = f"{self.name}_" if self.name else ""
        return {prefix + key: float(value) for key, value in metrics.items()}

    def calibrate(
        self,
        model: Judge | RewardDanceForYesScoring,
        processor: RewardDanceProcessor | None = None,
        results: EvaluationResults | None = None,
    ) -> dict[str, float]:
        """
        Fit the temperature of a judge on this dataset, and store it in `model.config.score_temperature`, which
        `save_pretrained` keeps. The negative log-likelihood of both answers is minimized; verdicts do not change.

        Args:
            model ([`RewardDanceScorer`] or [`RewardDanceForYesScoring`]):
                Judge to be calibrated. A temperature that it has already is refined.
            processor ([`RewardDanceProcessor`], *optional*):
                As in calling the evaluator.
            results ([`EvaluationResults`], *optional*):
                `results` of this very judge on this dataset, to save asking it again.

        Returns:
            `dict[str, float]`: `score_temperature` as stored, `ece_before`, `ece_after`, `nll_before`, `nll_after`.

        Raises:
            `ValueError`: As in calling the evaluator.
        """
        if results is None:
            results = self._ask(model, processor)
        _check_preferences(~results.ties)
        log_odds, labels = _yes_log_odds(results.log_odds[~results.ties])
        temperature = statistics.fit_temperature(log_odds, labels)
        lowest, highest = statistics.TEMPERATURE_BOUNDS
        if not 1.01 * lowest < temperature < highest / 1.01:
            logger.warning(
                f"The fitted temperature ran into its bound, {temperature:.3g}: all verdicts of {len(labels)} rows are right, or "
                "at most half of them. Calibrate on more rows or a better judge; ignore this if that is what you measure."
            )
        config = getattr(getattr(model, "model", model), "config", None)
        if config is None:
            raise ValueError(
                f"`model` is a `{type(model).__name__}`, which stores no temperature. Calibrate the judge itself, where its "
                "weights are."
            )
        config.score_temperature = float(config.score_temperature * temperature)
        calibrated = log_odds / temperature
        return {
            "score_temperature": config.score_temperature,
            "ece_before": statistics.expected_calibration_error(statistics.sigmoid(log_odds), labels),
            "ece_after": statistics.expected_calibration_error(statistics.sigmoid(calibrated), labels),
            "nll_before": statistics.negative_log_likelihood(log_odds, labels),
            "nll_after": statistics.negative_log_likelihood(calibrated, labels),
        }

    def _ask(self, model: Any, processor: RewardDanceProcessor | None) -> EvaluationResults:
        """Ask about all rows, on each process about its share. What is known is in `results`, even if that fails midway."""
        if processor is None and hasattr(model, "check_processor"):
            raise ValueError(
                f"`processor` is None, but a `{type(model).__name__}` cannot be asked without. Pass its processor, or a "
                "`RewardDanceScorer`."
            )
        is_judge = processor is not None or hasattr(model, "stream")  # gives log-odds, here or from afar
        module = getattr(model, "model", None) if processor is None else model
        module = module if isinstance(module, torch.nn.Module) and is_judge else None
        was_training = module is not None and module.training
        if processor is not None:
            model = Judge(model, processor, batch_size=self.batch_size or 8)
        elif is_judge:
            if module is not None:
                module.eval()
            model = model if self.batch_size is None else model.with_batch_size(self.batch_size)
        is_pairwise = is_judge and model.is_pairwise
        answers: dict[int, _Answer] = {}

        def work(indices: Sequence[int]) -> list[_Answer]:
            facts: dict[int, tuple[bool, str | None, str]] = {}

            def questions() -> Iterator[Question]:
                for index, row in self._rows(indices):
                    facts[index] = bool(row.get("tie")), row.get("category"), _digest_of_row(row)
                    yield from _questions_about(row, index, is_pairwise or not is_judge)

            bar = {"desc": "Evaluating", "unit": "question", "disable": not self.show_progress}
            with tqdm(total=2 * len(indices), **bar) as progress, torch.no_grad():
                if is_judge:
                    found = _ask_judge(model, questions(), progress.update)
                else:
                    found = _ask_function(model, questions(), progress.update, self.batch_size or 8)
                try:
                    for index in indices:
                        logits, scores = zip(next(found), next(found), strict=True)
                        answers[index] = _Answer(logits, scores, *facts[index])
                except NonFiniteScoreError as error:
                    rows = sorted({indices[question // 2] for question in error.rows})
                    kept = "Rows before are in `results` of the evaluator."
                    raise non_finite_error(rows, error.scores, kept) from error
            return [answers[index] for index in indices]

        try:
            if module is not None and is_sharded(module):  # all processes must compute the same
                work(range(len(self.dataset)))
            else:
                answers = dict(enumerate(run_split(work, len(self.dataset))))
        finally:
            if module is not None:
                module.train(was_training)
            self.results = _make_results([answer for _, answer in sorted(answers.items())], is_pairwise)
        return self.results

    def _rows(self, indices: Sequence[int]) -> Iterator[tuple[int, Mapping[str, Any]]]:
        has_index = hasattr(self.dataset, "__getitem__")
        numbered: Iterable[tuple[int, Any]] = (
            ((i, self.dataset[i]) for i in indices) if has_index else enumerate(self.dataset)
        )
        for i, row in numbered:
            if i in indices:
                check_row(row, f"row {i}")
                yield i, row


class _Answer(NamedTuple):
    """What a judge said about the chosen and the rejected sample of a row, and what else is in it."""

    logits: tuple[float, float]
    scores: tuple[float, float]
    tie: bool
    category: str | None
    row: str  # digest


@dataclass(frozen=True, eq=False)
class _RowQuestion(Question):
    """Question about one sample of a row, which errors name by its column."""

    columns: tuple[str, str] = ("chosen", "rejected")

    @property
    def names(self) -> tuple[str, str, str]:
        sample, reference = self.columns
        return f"{sample} of row {self.row}", f"{reference} of row {self.row}", f"condition of row {self.row}"


def _digest_of_row(row: Mapping[str, Any]) -> str:
    texts = [row["prompt"], row.get("task") or None, row.get("criteria"), bool(row.get("tie"))]
    return digest_of(*texts, *(content_of(row.get(name)) for name in ("chosen", "rejected", "condition")))


def _questions_about(row: Mapping[str, Any], index: int, with_reference: bool) -> list[Question]:
    """The chosen image as sample, then the rejected one; the other is the reference of a pairwise judge."""
    return [
        _RowQuestion(
            row[sample],
            row["prompt"],
            reference=row[reference] if with_reference else None,
            condition=row.get("condition"),
            task=row.get("task") or None,
            criteria=row.get("criteria"),
            row=index,
            columns=(sample, reference),
        )
        for sample, reference in (("chosen", "rejected"), ("rejected", "chosen"))
    ]


def _ask_judge(
    judge: Judge, questions: Iterator[Question], on_progress: Callable[[int], Any]
) -> Iterator[tuple[float, float]]:
    """Log-odds and score of each question."""
    for logits, scores in judge.stream(questions, on_progress):
        yield from zip(logits.double().tolist(), scores.double().tolist(), strict=True)


def _ask_function(
    reward: Any, questions: Iterator[Question], on_progress: Callable[[int], Any], batch_size: int
) -> Iterator[tuple[float, float]]:
    """Reward of each sample, which is read as its log-odds, too."""
    adapted, start = as_reward(reward), 0
    while batch := [_load(question) for question in islice(questions, 2 * batch_size)]:
        columns = {name: [getattr(question, name) for question in batch] for name in ("condition", "task", "criteria")}
        if adapted.is_pairwise:
            columns["references"] = [[question.reference] for question in batch]
        try:
            scores = adapted([q.sample for q in batch], [q.prompt for q in batch], **columns).double().tolist()
        except NonFiniteScoreError as error:
            raise NonFiniteScoreError(str(error), [start + i for i in error.rows], error.scores) from error
        start += len(batch)
        on_progress(len(batch))
        yield from zip(scores, scores, strict=True)


def _load(question: Question) -> Question:
    """The same with images or lists of frames, for functions that have no processor."""

    def load(media: Any, name: str) -> Any:
        reader = None if media is None else open_clip(media, name)
        if reader is not None:
            return load_frames(reader.sample(max_frames=16), name)  # as many as judges see by default
        return None if media is None else load_image(media, name)

    media = (question.sample, question.reference, question.condition)
    sample, reference, condition = map(load, media, question.names)
    task = question.task or infer_task(sample, condition)
    return replace(question, sample=sample, reference=reference, condition=condition, task=task)


def _make_results(answers: list[_Answer], is_pairwise: bool) -> EvaluationResults:
    logits = np.array([answer.logits for answer in answers], dtype=np.float64).reshape(-1, 2)
    scores = np.array([answer.scores for answer in answers], dtype=np.float64).reshape(-1, 2)
    # A pairwise judge that is asked about the rejected image should say "no".
    log_odds = logits * [1.0, -1.0] if is_pairwise else np.repeat(logits[:, :1] - logits[:, 1:], 2, axis=1)
    ties = np.array([answer.tie for answer in answers], dtype=bool)
    categories, rows = [answer.category for answer in answers], digest_of([answer.row for answer in answers])
    return EvaluationResults(logits, scores, log_odds, ties, categories, rows)


def _yes_log_odds(log_odds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-odds of "yes", and whether it is right, of shape `(rows, 2)`: first the chosen image is image 2, then image 1."""
    return log_odds * [1.0, -1.0], np.broadcast_to([1.0, 0.0], log_odds.shape)


def _averaged_margins(log_odds: np.ndarray) -> np.ndarray:
    """Above 0 where the mean of both orders' probabilities is above 0.5, and exactly 0 where the orders contradict."""
    yes = statistics.sigmoid(log_odds * [1.0, -1.0])
    return yes[:, 0] - yes[:, 1]


def _check_preferences(untied: np.ndarray) -> None:
    if not untied.any():
        raise ValueError(
            f"`dataset` has {len(untied)} rows and all are ties, but accuracy needs at least one preference. Add rows."
        )
