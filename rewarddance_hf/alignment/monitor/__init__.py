"""Reward dynamics: statistics of rewards in training, and warnings."""
