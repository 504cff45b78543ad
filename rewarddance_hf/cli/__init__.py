"""Command line: `rewarddance score | merge | rank | evaluate | train | tune | generate | serve | demo | release`."""

from .main import main


__all__ = ["main"]
