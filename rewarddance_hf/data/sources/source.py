"""What is known of a public preference dataset, declared in one place."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class DatasetTerms:
    """
    Terms of use of a dataset.

    Args:
        license (`str`):
            License identifier as on the Hub, or `"unknown"`.
        commercial_training (`bool`, *optional*):
            Whether a model that is trained on it may be released for commercial use. None if that is not known.
        source (`str`):
            Where this is stated.
    """

    license: str
    commercial_training: bool | None
    source: str = "license of the dataset card"


UNKNOWN_TERMS = DatasetTerms("unknown", None, "no license is recorded here: read the dataset card")


@dataclass(frozen=True)
class Benchmark:
    """
    Part of a dataset on which judges are compared.

    Args:
        title (`str`):
            Name for people.
        split (`str`):
            Split that is measured unless another is asked for.
        options (`Mapping[str, str]`, *optional*):
            Options that its rows are loaded with.
    """

    title: str
    split: str
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """
    Public preference dataset.

    Args:
        name (`str`):
            Short name.
        title (`str`):
            Name for people.
        repo_id (`str`):
            Repository on the Hub.
        description (`str`):
            What its rows and options are.
        read (`Callable`):
            `read(repository, split, streaming, **options)` gives its rows.
        split (`str`):
            Split that is loaded unless another is asked for.
        splits (`tuple[str, ...]`, *optional*):
            All splits, where the tables of the repository do not tell them.
        terms ([`DatasetTerms`], *optional*):
            Terms of use.
        options (`Mapping[str, tuple]`, *optional*):
            Options of `read` and their values, the default first. An empty tuple stands for any value, and None as default.
        benchmarks (`Mapping[str, Benchmark]`, *optional*):
            Benchmarks by name.
        is_family (`bool`, *optional*, defaults to `False`):
            Whether the same reader reads other datasets too. The terms are those of repositories that begin with `repo_id`.
    """

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
        """
        Check split and options before anything is looked up, and add the defaults of options that were not given.

        Raises a `ValueError` if there is no such split, option or value.
        """
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
