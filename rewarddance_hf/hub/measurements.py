"""What was measured of a judge: results of `rewarddance evaluate`, as a card shows them."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from transformers.utils import logging


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Measurement:
    """
    Metrics of [`~rewarddance_hf.RewardDanceEvaluator`] on one split; `judge` and `rows` are the fingerprints of the judge and of
    the rows, if known.
    """

    dataset: str
    split: str
    metrics: Mapping[str, float]
    config: str | None = None
    dimension: str | None = None
    judge: Mapping[str, Any] | None = None
    rows: str | None = None

    def __post_init__(self) -> None:
        wanted = {"accuracy", "accuracy_low", "accuracy_high", "num_rows", "num_ties"}
        missing = wanted | ({"accuracy_with_ties"} if self.metrics.get("num_ties") else set())
        missing -= set(self.metrics)
        if missing or not self.dataset or not self.split:
            raise ValueError(
                f"A measurement of {self.dataset!r}, split {self.split!r}, lacks {sorted(missing) or 'dataset or split'}, but no "
                "number is published without. Write it with `rewarddance evaluate --split ... --output results.json`."
            )

    @property
    def name(self) -> str:
        """Dataset and split, for messages."""
        return f"{self.dataset!r}, split {self.split!r}"

    def check_judge(self, fingerprint: Mapping[str, Any]) -> None:
        """Raise a `ValueError` if another judge was measured. Results without a fingerprint cannot be checked."""
        name = self.name
        if self.judge is None:
            logger.warning(
                f"The results on {name} do not tell which judge was measured: make sure that it is this one."
            )
            return
        different = sorted(key for key, value in fingerprint.items() if self.judge.get(key) != value)
        if different:
            raise ValueError(
                f"The results on {name} are those of another judge than the one to be released: they differ in {different}. "
                "Measure this one with `rewarddance evaluate --output`, in the type of its weights, or leave the results out."
            )


def read_measurements(files: Iterable[str | Path]) -> list[Measurement]:
    """Read JSON files of `rewarddance evaluate --output`. The first rows of a split are named as in `test[:100]`."""
    measurements = []
    for file in files:
        try:
            document = json.loads(Path(file).read_text(encoding="utf-8"))
            dataset, split, metrics = (document[name] for name in ("dataset", "split", "metrics"))
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{str(file)!r} is no result of `rewarddance evaluate --output` ({error!r}). Write it again with that command."
            ) from error
        if dataset.startswith("shapes:"):
            dataset, split = "shapes", split or dataset.removeprefix("shapes:")
            split += f", seed {document['seed']}" if document.get("seed") else ""
        else:
            dataset = _public_name(dataset, document)
            if split and document.get("limit"):
                split = f"{split}[:{document['limit']}]"
        details = (document.get(name) for name in ("config", "dimension", "judge_fingerprint", "rows_fingerprint"))
        measurements.append(Measurement(dataset, split or "", metrics, *details))
    _check_each_once(measurements)
    return measurements


def _check_each_once(measurements: list[Measurement]) -> None:
    """Refuse two results of the same name, which readers would take for figures of the same rows."""
    known: dict[tuple[str | None, ...], Measurement] = {}
    for measurement in measurements:
        name = measurement.name
        if measurement.rows is None:
            logger.warning(
                f"The results on {name} do not tell which rows were measured: make sure that they are what they are called."
            )
        key = (measurement.dataset, measurement.config, measurement.dimension, measurement.split)
        other = known.setdefault(key, measurement)
        if other is not measurement:
            rows = "the same rows" if other.rows == measurement.rows else "different rows"
            raise ValueError(
                f"Two results are on {name}, measured on {rows}, but a card names each once. Leave one out, or name them apart "
                "with `--split` or `--config`."
            )


def _public_name(dataset: str, document: Mapping[str, Any]) -> str:
    """Files of this machine by their names: where they lie means nothing to others."""
    if document.get("data_files"):
        return f"{', '.join(Path(file).name for file in document['data_files'])} (not public)"
    is_local = document.get("is_local", os.path.isabs(dataset) or Path(dataset).exists())
    return f"{Path(dataset).name} (not public)" if is_local else dataset


def model_index(measurement: Measurement) -> list[EvalResult]:
    """Model-index entries of a measurement, each with its split, and its tie rule in the name of the metric."""
    names = {
        "accuracy": "accuracy, ties left out, both orders",
        "accuracy_with_ties": "accuracy, ties counted (within 0.05 of one half)",
        "order_consistency": "order consistency, ties left out",
        "ece": "expected calibration error, ties left out",
        "brier": "Brier score, ties left out",
    }
    if not measurement.metrics["num_ties"]:
        del names["accuracy_with_ties"]
    return [
        EvalResult(
            task_type="visual-preference",
            dataset_type=measurement.dataset,
            dataset_name=measurement.dataset,
            dataset_config=measurement.config,
            dataset_split=measurement.split,
            metric_type=key.removesuffix("_with_ties"),
            metric_name=f"{measurement.dimension}: {name}" if measurement.dimension else name,
            metric_value=round(measurement.metrics[key], 4),
            metric_args={"rows": measurement.rows} if measurement.rows else None,
        )
        for key, name in names.items()
        if key in measurement.metrics
    ]


def table_rows(measurement: Measurement) -> list[dict[str, str]]:
    """Rows of a card's table: one with ties left out, and one with ties counted where there are ties."""
    metrics = measurement.metrics
    num_ties = int(metrics["num_ties"])

    def shown(key: str, form: str, factor: float = 1.0) -> str:
        return format(factor * metrics[key], form) if key in metrics else "-"

    rows = [
        {
            "ties": "left out" if num_ties else "none",
            "accuracy": shown("accuracy", ".1f", 100),
            "interval": f"{100 * metrics['accuracy_low']:.1f} to {100 * metrics['accuracy_high']:.1f}",
            "order_consistency": shown("order_consistency", ".1f", 100),
            "ece": shown("ece", ".3f"),
            "brier": shown("brier", ".3f"),
            "pairs": f"{int(metrics['num_rows']) - num_ties}",
            "rows": measurement.rows or "unknown",
        }
    ]
    if num_ties:
        rows.append(
            {
                "ties": "counted",
                "accuracy": shown("accuracy_with_ties", ".1f", 100),
                **dict.fromkeys(("interval", "order_consistency", "ece", "brier"), "-"),
                "pairs": f"{int(metrics['num_rows'])}",
                "rows": measurement.rows or "unknown",
            }
        )
    details = [detail for detail in (measurement.config, measurement.dimension) if detail]
    dataset = measurement.dataset + (f" ({', '.join(details)})" if details else "")
    return [{"dataset": dataset, "split": measurement.split, **row} for row in rows]
