"""ReFL: a generator is tuned by the gradient of a reward."""

from ...import_utils import require_extra


require_extra("train", "accelerate", "datasets")
