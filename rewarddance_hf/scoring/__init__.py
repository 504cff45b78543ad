"""Reward models in use: scores, comparisons and rankings."""
