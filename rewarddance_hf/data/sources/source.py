"""What is known of a public preference dataset, declared in one place."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class DatasetTerms:
    """Terms of use of a dataset, and where they are stated."""

    license: str
    commercial_training: bool | None
    source: str = "license of the dataset card"


UNKNOWN_TERMS = DatasetTerms("unknown", None, "no license is recorded here: read the dataset card")


@dataclass(frozen=True)
class Benchmark:
    """Part of a dataset on which judges are compared."""

    title: str
    split: str
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """Public preference dataset. `read(repository, split, streaming, **options)` gives its rows."""

    name: str
    title: str
    repo_id: str
    description: str
    read: Callable[..., Any]
    split: str
    splits: tuple[str, ...] = ()
    terms: DatasetTerms = UNKNOWN_TERMS
    options: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    benchmarks: Mapping[str, Benchmark] = field(default_factory=dict)
    is_family: bool = False

    def complete(self, split: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """Check split and options before anything is looked up, and add defaults. Raises a `ValueError` if one is unknown."""
        if self.splits and split not in self.splits:
            raise ValueError(f"`split` is {split!r}, but {self.title} has {list(self.splits)}. Choose one of them.")
        unknown = sorted(set(options) - set(self.options))
        if unknown:
            raise ValueError(f"{self.title} has no options {unknown}, but {sorted(self.options)}. {self.description}")
        complete = {name: values[0] if values else None for name, values in self.options.items()} | dict(options)
        for name, value in complete.items():
            if self.options[name] and value not in self.options[name]:
                raise ValueError(
                    f"`{name}` is {value!r}, but {self.title} has {list(self.options[name])}. Choose one of them. "
                    f"{self.description}"
                )
        return complete
