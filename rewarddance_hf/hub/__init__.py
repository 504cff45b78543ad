"""Releases on the Hub: checkpoints with their code, cards, and what is checked before anything is uploaded."""
