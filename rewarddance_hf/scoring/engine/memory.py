"""Batches that are halved when memory runs out, and freed memory that is used again."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from transformers.utils import logging


logger = logging.get_logger(__name__)


class BatchLimit:
    """Largest number of rows of a batch, lowered whenever memory runs out."""

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows

    def run_in_halves(self, items: list[Any], run: Callable[[list[Any]], None]) -> None:
        """Run a batch; if memory runs out, run its halves, and smaller batches from then on."""
        try:
            return run(items)
        except RuntimeError as error:
            if len(items) == 1 or not is_out_of_memory(error):
                raise
        # Out of the handler, so that the failed pass is freed.
        half = (len(items) + 1) // 2
        if half < self.max_rows:
            self.max_rows = half
            logger.warning(f"Memory ran out with {len(items)} rows in a batch. Going on with at most {half}.")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.run_in_halves(items[:half], run)
        self.run_in_halves(items[half:], run)


@cache
def keep_freed_memory() -> None:
    """
    Let glibc keep blocks of up to 31 MiB that are freed, in place of giving them back to the system and asking for them again in
    each layer, which takes a tenth of the time on a CPU. It does so by itself from the first free of such a block on: one is taken
    and freed, and never written to. Elsewhere this does nothing.
    """
    torch.empty(31 << 20, dtype=torch.uint8, device="cpu")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that a device or the machine is out of memory."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)
