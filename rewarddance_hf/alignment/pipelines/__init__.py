"""Diffusers pipelines as they run: noise levels, clean predictions, staged runs, loading."""

from ...import_utils import require_extra


require_extra("diffusers", "diffusers")
