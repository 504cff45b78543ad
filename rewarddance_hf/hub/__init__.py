"""Releases on the Hub: checkpoints with their code, cards, and the checks before anything is uploaded."""
