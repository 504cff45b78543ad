"""Training of judges on preference rows."""

from ..import_utils import require_extra


require_extra("train", "accelerate", "datasets")
