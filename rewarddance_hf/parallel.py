"""Work on rows, split over processes: no collective while rows are worked on, results in order, failures raised together."""

import atexit
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from .import_utils import require_extra


T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """
    The processes of a run, as `accelerate launch` or `torchrun` started them; one if nothing did.

    Args:
        index (`int`, *optional*, defaults to `0`):
            Index of this process.
        count (`int`, *optional*, defaults to `1`):
            Number of processes.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> "Processes":
        """
        Find out about the processes of this run, and connect them if they are not yet.

        Returns:
            [`Processes`]

        Raises:
            `ImportError`: If there are several processes and accelerate is not installed.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        require_extra("train", "accelerate")
        from accelerate import PartialState
        from accelerate.utils import parse_flag_from_env

        is_connected = torch.distributed.is_initialized()
        state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
        if not is_connected:  # else threads of gloo abort the process at its end
            atexit.register(state.destroy_process_group)
        return cls(state.process_index, state.num_processes)

    @property
    def is_main(self) -> bool:
        """`bool`: Whether this is the process that talks and writes what is written once."""
        return self.index == 0

    def rows(self, num_rows: int) -> range:
        """Indices of the rows that this process works on: every `count`-th one."""
        return range(self.index, num_rows, self.count)

    def gather(self, values: list[T]) -> list[T]:
        """Values of all processes, in the order of processes, on each. They are pickled on the way."""
        if self.count == 1:
            return values
        from accelerate.utils import gather_object

        return gather_object(values)

    def raise_together(self, error: BaseException | None) -> None:
        """
        Raise the error of one process on all of them, so that none waits for the others.

        Args:
            error (`BaseException`, *optional*):
                What went wrong on this process. Raised as it is.

        Raises:
            `RuntimeError`: If another process failed.
        """
        failed = [
            found for found in self.gather([None if error is None else f"{type(error).__name__}: {error}"]) if found
        ]
        if error is not None:
            raise error
        if failed:
            raise RuntimeError(f"{len(failed)} of {self.count} processes failed, the first with {failed[0]}")

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.gather([None])


def run_split(work: Callable[[Sequence[int]], Sequence[T]], num_rows: int) -> list[T]:
    """
    Work on rows on all processes, each on its own share.

    Args:
        work (`Callable`):
            Function that gets the indices of rows and returns a result for each of them. It must not wait for other
            processes.
        num_rows (`int`):
            Number of rows.

    Returns:
        `list`: Results of all rows in their order, on every process.

    Raises:
        `RuntimeError`: If another process failed. What fails on this one is raised as it is.
    """
    processes = Processes.current()
    mine = processes.rows(num_rows)
    found: list[tuple[int, T]] = []
    error: BaseException | None = None
    try:
        found = list(zip(mine, work(mine) if mine else [], strict=True))
    except Exception as raised:
        error = raised
    processes.raise_together(error)
    results: dict[int, Any] = dict(processes.gather(found))
    return [results[row] for row in range(num_rows)]
