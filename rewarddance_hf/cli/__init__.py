"""Command line: `rewarddance score | rank | evaluate | generate | demo | release`."""

from .main import main


__all__ = ["main"]
