"""
Public benchmarks: a judge and others on the same rows, beside published figures. Figures of one benchmark differ by up
to ten points with the split and the treatment of ties. Both stand beside every figure, and where a source does not
state them, the table says so.
"""

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from huggingface_hub import EvalResult
from huggingface_hub.repocard import metadata_load, metadata_save
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from ..data.rows import keep_images_encoded
from ..data.sources import BENCHMARKS, load_source
from ..data.sources.repository import DatasetRepository
from .evaluator import EvaluationResults, RewardDanceEvaluator


PUBLISHED_FIGURES = Path(__file__).with_name("published_figures.json")
TASK = "visual-preference"
TIES_LEFT_OUT = "ties left out"
TIE_METRICS = ("accuracy_with_ties", "accuracy_with_ties_best")


@dataclass(frozen=True)
class PublishedFigure:
    """Published accuracy of a judge, in percent; split and tie rule may be "not stated"."""

    judge: str
    accuracy: float
    split: str
    ties: str
    source: str


def published_figures(benchmark: str) -> list[PublishedFigure]:
    """Published figures on a benchmark, none of them run again."""
    tables = json.loads(PUBLISHED_FIGURES.read_text(encoding="utf-8"))
    return [
        PublishedFigure(judge, accuracy, table["split"], table["ties"], table["source"])
        for table in tables
        if benchmark in table["benchmarks"]
        for judge, accuracy in table["accuracy"].items()
    ]


def best_accuracy_with_ties(probabilities: np.ndarray, ties: np.ndarray) -> float:
    """
    Accuracy over three verdicts (chosen, rejected, tie) for the tie margin that makes it largest, as VideoGen-RewardBench
    has it (Algorithm 1 of [Ties Matter](https://huggingface.co/papers/2305.14324)): chosen on the very rows that are
    measured. `probabilities` `(rows,)` are those of the chosen image being preferred, `ties` `(rows,)` are the true ties.
    """
    distances = np.abs(probabilities - 0.5)
    order = np.argsort(distances, kind="stable")
    right = ~ties & (probabilities > 0.5)
    # With the k nearest to 0.5 called ties: ties among them are right, and preferences among the others.
    called = np.concatenate([[0], np.cumsum(ties[order])])
    kept = right.sum() - np.concatenate([[0], np.cumsum(right[order])])
    # A margin takes all rows of one distance or none.
    sorted_distances = distances[order]
    ends = np.concatenate([[True], sorted_distances[1:] != sorted_distances[:-1], [True]])
    return float((called + kept)[ends].max() / len(ties))


class BenchmarkRun:
    r"""
    Rows of a public benchmark, and what judges say about them.

    Args:
        name (`str`):
            Name in [`~rewarddance_hf.data.sources`]`.BENCHMARKS`.
        split (`str`, *optional*):
            Split in place of the usual one.
        limit (`int`, *optional*):
            Number of rows from the beginning, which are streamed. Not comparable to figures of all rows.
        repo_id (`str` or `os.PathLike`, *optional*):
            Mirror, or local folder, of the same layout.
        revision (`str`, *optional*):
            Branch, tag or commit of the benchmark.
        token (`str`, *optional*):
            Token for the Hub.
        batch_size (`int`, *optional*):
            Number of questions per forward pass.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the bootstrap.
        show_progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Attributes:
        results (`dict[str, dict[str, float]]`):
            Metrics of each judge: those of [`RewardDanceEvaluator`], and `accuracy_with_ties_best` where there are ties.
        rows_fingerprint (`str`):
            Digest of the rows, known when a judge was measured.

    Raises:
        `ValueError`: If there is no such benchmark, or its rows cannot be loaded.

    Example:

    ```python
    run = BenchmarkRun("genai-bench-image")
    run("my-judge", RewardDanceScorer.from_pretrained("org/my-judge"))
    run("PickScore", CLIPJudge.from_pretrained(PICKSCORE_MODEL, PICKSCORE_PROCESSOR))
    print(run.table())
    ```
    """

    def __init__(
        self,
        name: str,
        split: str | None = None,
        limit: int | None = None,
        repo_id: str | os.PathLike | None = None,
        revision: str | None = None,
        token: str | None = None,
        batch_size: int | None = None,
        seed: int = 0,
        show_progress: bool = False,
    ) -> None:
        if name not in BENCHMARKS:
            raise ValueError(f"There is no benchmark {name!r}, but {', '.join(BENCHMARKS)}. Choose one of them.")
        self.name = name
        self.source, self.benchmark = BENCHMARKS[name]
        self.split = split or self.benchmark.split
        self.limit = limit
        repository = DatasetRepository(repo_id or self.source.repo_id, revision, token)
        self.repo_id = repository.repo_id
        self.revision = repository.revision
        self._public_id = self.source.repo_id if repository.is_local else repository.repo_id
        options = self.benchmark.options
        rows = keep_images_encoded(load_source(self.source, repository, self.split, limit is not None, **options))
        self.rows = rows if limit is None else list(rows.take(limit))
        self.results: dict[str, dict[str, float]] = {}
        self.rows_fingerprint = ""
        self._settings: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "show_progress": show_progress}

    def __call__(self, judge_name: str, judge: Any) -> dict[str, float]:
        """Metrics of a judge, a scorer (asked in both orders if it is pairwise) or any reward function, named so in the table."""
        evaluator = RewardDanceEvaluator(self.rows, **self._settings)
        metrics = evaluator(judge)
        answers = evaluator.results
        if isinstance(answers, EvaluationResults):
            self.rows_fingerprint = answers.rows_fingerprint
            if answers.ties.any():
                averaged = answers.probabilities.mean(axis=1)
                metrics["accuracy_with_ties_best"] = best_accuracy_with_ties(averaged, answers.ties)
        self.results[judge_name] = metrics
        return metrics

    @cached_property
    def published(self) -> list[PublishedFigure]:
        """Figures of others for this benchmark."""
        return published_figures(self.name)

    def table(self) -> str:
        """Results and published figures as two Markdown tables, with split and tie rule beside every figure."""
        first = next(iter(self.results.values()))
        total, ties = int(first["num_rows"]), int(first["num_ties"])
        part = f" (the first {self.limit} at most: not comparable to figures of all rows)" if self.limit else ""
        source = [self.repo_id, *self.benchmark.options.values(), f"split {self.split}"]
        if self.revision:
            source.append(f"revision {self.revision}")
        lines = [
            f"{self.benchmark.title}: {', '.join(source)}",
            f"{total} pairs, of which {ties} are ties{part}. Accuracy: {TIES_LEFT_OUT}, each order of a pair counts one half.",
            "",
            "| judge | split | accuracy % (ties left out) | 95 % interval | % with ties (tie within 0.05 of 0.5) "
            "| % with ties (best tie margin) | same verdict in both orders % |",
            "|---|---|---|---|---|---|---|",
        ]
        for judge, metrics in self.results.items():
            interval = f"{_percent(metrics['accuracy_low'])} to {_percent(metrics['accuracy_high'])}"
            with_ties = [_percent(metrics[key]) if ties else "no ties" for key in TIE_METRICS]
            cells = [judge, self.split, _percent(metrics["accuracy"]), interval, *with_ties]
            lines.append(f"| {' | '.join([*cells, _percent(metrics['order_consistency'])])} |")
        if self.published:
            lines += [
                "",
                "Published, not run again here. Compare only where split and tie rule agree:",
                "",
                "| judge | split | accuracy % | ties | source |",
                "|---|---|---|---|---|",
            ]
            lines += [f"| {f.judge} | {f.split} | {f.accuracy:g} | {f.ties} | {f.source} |" for f in self.published]
        return "\n".join(lines)

    def document(self) -> dict[str, Any]:
        """All results and what they were measured on, for a JSON file."""
        return {
            "benchmark": self.name,
            "dataset": self.repo_id,
            "config": self.benchmark.options.get("config"),
            "dimension": self.benchmark.options.get("dimension"),
            "split": self.split,
            "revision": self.revision,
            "limit": self.limit,
            "rows_fingerprint": self.rows_fingerprint,
            "ties": TIES_LEFT_OUT,
            "results": self.results,
            "published": [vars(figure) for figure in self.published],
        }

    def eval_results(self, judge_name: str) -> list[EvalResult]:
        """Entries of a judge for the model-index of its card, one for each metric, with split, tie rule and interval."""
        metrics = self.results[judge_name]
        counts: dict[str, Any] = {
            "pairs": int(metrics["num_rows"]),
            "ties": int(metrics["num_ties"]),
            "limit": self.limit,
            "rows": self.rows_fingerprint,
        }
        # A dimension is no configuration of the dataset: the results of several stand under one.
        dimension = self.benchmark.options.get("dimension")
        prefix = f"{dimension}: " if dimension else ""
        if dimension:
            counts["dimension"] = dimension
        interval = [round(metrics["accuracy_low"], 4), round(metrics["accuracy_high"], 4)]
        shown: dict[str, tuple[str, str, dict[str, Any]]] = {
            "accuracy": ("accuracy", f"accuracy, both orders, {TIES_LEFT_OUT}", counts | {"interval_95": interval}),
            "order_consistency": ("order_consistency", f"same verdict in both orders, {TIES_LEFT_OUT}", counts),
        }
        if metrics["num_ties"]:
            names = ("ties counted, tie within 0.05 of 0.5", "ties counted, best tie margin on these pairs")
            for key, name in zip(TIE_METRICS, names, strict=True):
                shown[key] = ("accuracy", f"accuracy of the mean of both orders, {name}", counts)
        return [
            EvalResult(
                task_type=TASK,
                dataset_type=self._public_id,
                dataset_name=self.source.title,
                dataset_config=self.benchmark.options.get("config"),
                dataset_split=self.split,
                dataset_revision=self.revision,
                metric_type=metric_type,
                metric_name=prefix + name,
                metric_value=round(metrics[key], 4),
                metric_args=arguments,
            )
            for key, (metric_type, name, arguments) in shown.items()
        ]


def write_model_index(path: str | os.PathLike, model_name: str, eval_results: list[EvalResult]) -> None:
    """
    Write results into the metadata of a model card, or of a file that will only hold metadata, in place of older ones of
    the same benchmark. `model_name` is for files without a model-index. Raises a `ValueError` if the metadata cannot be read.
    """
    path = Path(path)
    name, known = model_name, list[EvalResult]()
    try:
        metadata = (metadata_load(path) if path.exists() else None) or {}
        if metadata.get("model-index"):
            name, known = model_index_to_eval_results(metadata["model-index"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"The metadata of {str(path)!r} cannot be read ({error}). Repair it, or choose another file."
        ) from error
    measured = {_measured_on(result) for result in eval_results}
    kept = [result for result in known if _measured_on(result) not in measured]
    metadata["model-index"] = eval_results_to_model_index(name, [*kept, *eval_results])
    metadata_save(path, metadata)


def _measured_on(result: EvalResult) -> tuple[str | None, ...]:
    dimension = (result.metric_args or {}).get("dimension")
    return result.dataset_type, result.dataset_config, result.dataset_split, dimension


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"
