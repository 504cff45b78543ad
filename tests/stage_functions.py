"""Stages for tests, which other processes import."""

import sys
import time
from typing import Any


def count(total: int, *, report: Any) -> None:
    sys.stdout.write("\x1b[1mnoise of a library\x1b[0m\r")
    for i in range(total):
        report(i + 1, total)


def fail(*, report: Any) -> None:
    raise ValueError("the disk is full")


def sleep(seconds: float, *, report: Any) -> None:
    time.sleep(seconds)
