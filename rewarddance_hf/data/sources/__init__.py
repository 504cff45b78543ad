"""
Public preference datasets as preference rows: one function for each.

Each function reads a dataset as its authors published it, from the Hub (moved repositories are found under their new
owner) or from a local folder of the same layout, and gives rows with the columns `prompt`, `chosen`, `rejected`, `task`,
`condition`, `margin`, `tie`, `criteria` and `category`. Images stay encoded until a row is read. Votes become margins
([`~rewarddance_hf.data.sources.rows.vote_margin`]), ties stay ties. What may be done with a dataset is in
[`~rewarddance_hf.data.sources.terms.terms_of`].

Without `streaming=True` the rows are written to the cache of `datasets` once, with their images.
"""

from .editing import load_editreward_bench, load_mmrb2
from .genai_bench import load_genai_bench
from .images import (
    load_hpdv2,
    load_hpdv3,
    load_hpdv3_plus_plus,
    load_imagereward_db,
    load_open_image_preferences,
    load_pickapic,
    load_rapidata_images,
)
from .terms import DatasetTerms, terms_of
from .videos import load_rapidata_videos, load_videodpo, load_videogen_rewardbench


__all__ = [
    "DatasetTerms",
    "load_editreward_bench",
    "load_genai_bench",
    "load_hpdv2",
    "load_hpdv3",
    "load_hpdv3_plus_plus",
    "load_imagereward_db",
    "load_mmrb2",
    "load_open_image_preferences",
    "load_pickapic",
    "load_rapidata_images",
    "load_rapidata_videos",
    "load_videodpo",
    "load_videogen_rewardbench",
    "terms_of",
]
