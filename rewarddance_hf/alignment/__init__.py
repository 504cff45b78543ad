"""Tuning and searching diffusers pipelines with a reward."""
