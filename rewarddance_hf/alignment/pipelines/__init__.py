"""Diffusers pipelines as they run: noise levels, clean predictions, staged runs, loading."""
