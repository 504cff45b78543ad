"""
Public preference datasets as preference rows.

[`load_preferences`] reads a dataset as its authors published it, from the Hub (moved repositories are found under their
new owner) or from a local folder of the same layout. What is known of a dataset is a [`~source.Source`], which stands
beside the code that reads it in `images`, `editing` and `videos`; their `SOURCES` list all of them.
"""

from ...import_utils import require_extra


require_extra("train", "datasets")

from .catalogue import BENCHMARKS, SOURCES, load_preferences, load_source, terms_of  # noqa: E402
from .source import Benchmark, DatasetTerms, Source  # noqa: E402


__all__ = [
    "BENCHMARKS",
    "SOURCES",
    "Benchmark",
    "DatasetTerms",
    "Source",
    "load_preferences",
    "load_source",
    "terms_of",
]
