"""Command line: `rewarddance score | rank | evaluate | train | tune | generate | demo | release`."""

from .main import main


__all__ = ["main"]
