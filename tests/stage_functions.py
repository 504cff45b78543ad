"""Stages for tests, which other processes import."""

import os
import sys
import time
from pathlib import Path
from typing import Any


def count(total: int, *, report: Any) -> None:
    sys.stdout.write("\x1b[1mnoise of a library\x1b[0m\r")
    for i in range(total):
        report(i + 1, total)


def fail(*, report: Any) -> None:
    raise ValueError("the disk is full")


def sleep(seconds: float, *, report: Any) -> None:
    time.sleep(seconds)


def write_niceness(file: str, *, report: Any) -> None:
    Path(file).write_text(str(os.nice(0)))


def wait_for(file: str, *, report: Any) -> None:
    start = time.monotonic()
    while not Path(file).exists():
        if time.monotonic() - start > 120:
            raise TimeoutError(f"there is no {file}")
        time.sleep(0.05)
