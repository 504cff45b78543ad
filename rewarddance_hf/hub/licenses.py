"""Licenses of training data: what forbids commercial use never enters a release unnoticed."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.sources import terms_of
from ..data.sources.repository import canonical_name
from ..trainer.model_card import LOCAL_FILES


NON_COMMERCIAL = re.compile(r"(^|-)(nc|noncommercial|non-commercial)(-|$)", re.IGNORECASE)


@dataclass(frozen=True)
class TrainingData:
    """A dataset that a model was trained on: repository ID or name, and license as on the Hub, e.g. `"apache-2.0"`."""

    name: str
    license: str

    @classmethod
    def parse(cls, text: str) -> "TrainingData":
        """Read `NAME=LICENSE`."""
        name, separator, license = text.rpartition("=")
        if not (name and separator and license):
            raise ValueError(
                f"`training_data` has {text!r}, but must be NAME=LICENSE, e.g. ymhao/HPDv2=apache-2.0. Read the dataset's card."
            )
        return cls(name.strip(), license.strip().lower())

    @property
    def is_non_commercial(self) -> bool:
        """Whether its license, or what is known of it, forbids commercial use of what is trained on it."""
        return bool(NON_COMMERCIAL.search(self.license)) or terms_of(self.name).commercial_training is False


def check_training_data(
    declared: Sequence[TrainingData], recorded: Sequence[Mapping[str, Any]] = (), allow_non_commercial: bool = False
) -> list[TrainingData]:
    """
    Make sure that all training data is declared with its license, also what the trainer `recorded` (`name`, `license`).

    Returns the data that forbids commercial use, and raises a `ValueError` for it unless `allow_non_commercial`.
    """
    if not declared:
        raise ValueError(
            "`training_data` is empty, but a release says what its model was trained on, and under which licenses. Declare all "
            "of it: `--training-data NAME=LICENSE ...`, or `none=none` for an untrained model."
        )
    by_name = {canonical_name(data.name): data for data in declared}
    named = [data for data in recorded if data["name"] != LOCAL_FILES]
    undeclared = [data["name"] for data in named if canonical_name(data["name"]) not in by_name]
    if len(named) < len(recorded) and by_name.keys() <= {canonical_name(data["name"]) for data in named}:
        undeclared.append(LOCAL_FILES)  # under a name that only their owner knows
    if undeclared:
        raise ValueError(
            f"`training_data` lacks {undeclared}, which the trainer recorded in the checkpoint's card. Declare them with their "
            "licenses."
        )
    for entry in named:
        found = by_name[canonical_name(entry["name"])]
        if NON_COMMERCIAL.search(entry.get("license") or "") and not found.is_non_commercial:
            raise ValueError(
                f"The license of {found.name!r} was declared as {found.license!r}, but the trainer recorded {entry['license']!r}. "
                "Declare that, or take the data out of the training."
            )
    for data in declared:
        known = terms_of(data.name)
        if data.license == "unknown":
            raise ValueError(f"The license of {data.name!r} is 'unknown', but must be known. Read the dataset's card.")
        if known.license not in ("unknown", data.license):
            raise ValueError(
                f"The license of {data.name!r} was declared as {data.license!r}, but is {known.license!r} ({known.source}). "
                "Declare that, or take the data out of the training."
            )
    non_commercial = [data for data in declared if data.is_non_commercial]
    if non_commercial and not allow_non_commercial:
        listed = ", ".join(f"{data.name} ({data.license})" for data in non_commercial)
        raise ValueError(
            f"`training_data` has {listed}, which forbids commercial use of the model. Train without it, or pass "
            "`--allow-non-commercial`: the model's license then says so."
        )
    return non_commercial


def model_license(wanted: str, non_commercial: Sequence[TrainingData]) -> str:
    """The license that was `wanted`, or that of the `non_commercial` training data if `wanted` allows more."""
    if not non_commercial or NON_COMMERCIAL.search(wanted):
        return wanted
    licenses = [data.license for data in non_commercial if NON_COMMERCIAL.search(data.license)]
    return licenses[0] if licenses else "cc-by-nc-4.0"
