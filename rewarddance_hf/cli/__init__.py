"""Command line: `rewarddance score | merge | rank | evaluate | train | tune | generate | serve | export | demo | release`."""

from .main import main


__all__ = ["main"]
