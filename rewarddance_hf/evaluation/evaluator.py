"""Evaluator: how often, how consistently and how honestly a judge prefers the chosen image."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from ..data.preference import check_columns, check_row
from ..models import RewardDanceForYesScoring, RewardDanceProcessor
from ..models.processing_rewarddance import load_image
from ..rewards import NonFiniteScoreError
from ..scoring.results import Judgement
from ..scoring.scorer import RewardDanceScorer
from . import statistics


logger = logging.get_logger(__name__)


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
    """

    logits: np.ndarray
    scores: np.ndarray
    log_odds: np.ndarray
    ties: np.ndarray
    categories: list[str | None]

    @property
    def probabilities(self) -> np.ndarray:
        """Probabilities of the chosen image being preferred, of shape `(rows, 2)` like `log_odds`."""
        return statistics.sigmoid(self.log_odds)


class RewardDanceEvaluator:
    r"""
    Measure a judge on preference rows.

    Pairwise judges are asked about each row in both orders; others score both samples, and their preference is the sigmoid
    of the difference of `logits`. Rows that are ties in truth count in `accuracy_with_ties` and `mean_reward` only.

    Args:
        dataset (`datasets.Dataset`, `list` or any dataset with a length):
            Preference rows.
        name (`str`, *optional*, defaults to `""`):
            Prefix of all metrics.
        batch_size (`int`, *optional*, defaults to that of the scorer, or `8`):
            Number of judgements per forward pass.
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
        - `accuracy_with_ties`: share of right verdicts for the mean of both orders among chosen, rejected and tie;
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
        if bootstrap_samples < 1:
            raise ValueError(f"`bootstrap_samples` is {bootstrap_samples}, but must be 1 or more. Leave it at 1000.")
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
        model: RewardDanceScorer | RewardDanceForYesScoring,
        processor: RewardDanceProcessor | None = None,
    ) -> dict[str, float]:
        """
        Measure a judge. What it said about each row stays in `results`.

        Args:
            model ([`RewardDanceScorer`] or [`RewardDanceForYesScoring`]):
                Judge. A model keeps its training mode.
            processor ([`RewardDanceProcessor`], *optional*):
                Processor, if `model` is not a scorer.

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
        yes_log_odds, labels = _questions(log_odds)
        yes_probabilities = statistics.sigmoid(yes_log_odds)
        metrics = {
            "accuracy": row_credits.mean(),
            "accuracy_low": low,
            "accuracy_high": high,
            "accuracy_swap_averaged": statistics.verdict_credits(_averaged_margins(log_odds)).mean(),
            "accuracy_with_ties": statistics.accuracy_with_ties(averaged, results.ties, self.tie_margin),
            "order_consistency": statistics.order_consistency(log_odds),
            "ece": statistics.expected_calibration_error(yes_probabilities, labels),
            "brier": statistics.brier_score(yes_probabilities, labels),
            "nll": statistics.negative_log_likelihood(yes_log_odds, labels),
            "mean_reward": results.scores.mean(),
            "num_rows": len(untied),
            "num_ties": (~untied).sum(),
        }
        categories = np.array([category or "" for category in results.categories])[untied]
        for category in sorted(set(categories) - {""}):
            metrics[f"category/{category}/accuracy"] = row_credits[categories == category].mean()
        prefix = f"{self.name}_" if self.name else ""
        return {prefix + key: float(value) for key, value in metrics.items()}

    def calibrate(
        self,
        model: RewardDanceScorer | RewardDanceForYesScoring,
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
                Processor, if `model` is not a scorer.
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
        log_odds, labels = _questions(results.log_odds[~results.ties])
        temperature = statistics.fit_temperature(log_odds, labels)
        lowest, highest = statistics.TEMPERATURE_BOUNDS
        if not 1.01 * lowest < temperature < highest / 1.01:
            logger.warning(
                f"The fitted temperature ran into its bound, {temperature:.3g}: all verdicts of {len(labels)} rows are right, or "
                "at most half of them. Calibrate on more rows or a better judge; ignore this if that is what you measure."
            )
        config = (model.model if isinstance(model, RewardDanceScorer) else model).config
        config.score_temperature = float(config.score_temperature * temperature)
        calibrated = log_odds / temperature
        return {
            "score_temperature": config.score_temperature,
            "ece_before": statistics.expected_calibration_error(statistics.sigmoid(log_odds), labels),
            "ece_after": statistics.expected_calibration_error(statistics.sigmoid(calibrated), labels),
            "nll_before": statistics.negative_log_likelihood(log_odds, labels),
            "nll_after": statistics.negative_log_likelihood(calibrated, labels),
        }

    def _ask(
        self, model: RewardDanceScorer | RewardDanceForYesScoring, processor: RewardDanceProcessor | None
    ) -> EvaluationResults:
        """Ask a judge about all rows; what it says is kept in `results`, even if it fails midway."""
        if isinstance(model, RewardDanceScorer):
            scorer = copy.copy(model)
            if self.batch_size is not None:
                scorer.batch_size = self.batch_size
            return self._ask_scorer(scorer)
        if processor is None:
            raise ValueError(
                f"`processor` is None, but a `{type(model).__name__}` cannot be asked without. Pass its processor, or a "
                "`RewardDanceScorer`."
            )
        was_training = model.training
        try:
            return self._ask_scorer(RewardDanceScorer(model, processor, batch_size=self.batch_size or 8))
        finally:
            model.train(was_training)

    def _ask_scorer(self, scorer: RewardDanceScorer) -> EvaluationResults:
        was_training = scorer.model.training
        scorer.model.eval()
        logits: list[np.ndarray] = []
        scores: list[np.ndarray] = []
        ties: list[bool] = []
        categories: list[str | None] = []
        try:
            with tqdm(
                total=len(self.dataset), desc="Evaluating", unit="row", disable=not self.show_progress
            ) as progress:
                for rows in self._batches(scorer.batch_size):
                    start = len(logits)
                    judgements = [j for i, row in enumerate(rows, start) for j in _row_judgements(row, i, scorer)]
                    batch_logits, batch_scores = _ask_batch(scorer, judgements, start)
                    logits.extend(batch_logits)
                    scores.extend(batch_scores)
                    ties += [bool(row.get("tie")) for row in rows]
                    categories += [row.get("category") for row in rows]
                    progress.update(len(rows))
        finally:
            scorer.model.train(was_training)
            self.results = _make_results(logits, scores, ties, categories, scorer.is_pairwise)
        return self.results

    def _batches(self, size: int) -> Iterator[list[Mapping[str, Any]]]:
        rows: list[Mapping[str, Any]] = []
        has_index = hasattr(self.dataset, "__getitem__")
        for row in (self.dataset[i] for i in range(len(self.dataset))) if has_index else self.dataset:
            rows.append(row)
            if len(rows) == size:
                yield rows
                rows = []
        if rows:
            yield rows


def _row_judgements(row: Mapping[str, Any], index: int, scorer: RewardDanceScorer) -> list[Judgement]:
    """The chosen image as sample, then the rejected one; the other is the reference of a pairwise judge."""
    name = f"row {index}"
    check_row(row, name)
    task = row.get("task") or "text-to-image"
    chosen, rejected = (
        scorer.processor.load_frames(row[column], f"{column} of {name}", task) for column in ("chosen", "rejected")
    )
    condition = row.get("condition")
    context = {
        "prompt": row["prompt"],
        "condition": None if condition is None else load_image(condition, f"condition of {name}"),
        "task": task,
        "criteria": row.get("criteria"),
    }
    return [
        Judgement(chosen, reference=rejected if scorer.is_pairwise else None, **context),
        Judgement(rejected, reference=chosen if scorer.is_pairwise else None, **context),
    ]


def _ask_batch(scorer: RewardDanceScorer, judgements: list[Judgement], start: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits and scores of shape `(rows, 2)`."""
    try:
        with torch.no_grad():
            answers = scorer._judge(judgements)
    except NonFiniteScoreError as error:
        rows = sorted({start + judgement // 2 for judgement in error.rows})
        raise ValueError(
            f"Scores of the rows {rows} are NaN or infinite, but must be finite. Check the weights for NaN, or load them in "
            "another type (`dtype=torch.float32`). Rows before are in `results` of the evaluator."
        ) from error
    logits, scores = (values.double().cpu().numpy().reshape(-1, 2) for values in answers)
    return logits, scores


def _make_results(
    logits: list[np.ndarray],
    scores: list[np.ndarray],
    ties: list[bool],
    categories: list[str | None],
    is_pairwise: bool,
) -> EvaluationResults:
    all_logits = np.array(logits, dtype=np.float64).reshape(-1, 2)
    # A pairwise judge that is asked about the rejected image should say "no".
    difference = all_logits[:, :1] - all_logits[:, 1:]
    log_odds = all_logits * [1.0, -1.0] if is_pairwise else np.repeat(difference, 2, axis=1)
    return EvaluationResults(
        logits=all_logits,
        scores=np.array(scores, dtype=np.float64).reshape(-1, 2),
        log_odds=log_odds,
        ties=np.array(ties, dtype=bool),
        categories=categories,
    )


def _questions(log_odds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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
