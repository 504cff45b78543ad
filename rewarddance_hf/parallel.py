"""Work on rows, split over processes: no communication while rows are worked on, results in order, failures raised
together."""

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
    """The processes of a run, as `accelerate launch` or `torchrun` started them; one if nothing did."""

    index: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> "Processes":
        """The processes of this run, connected if they are not yet."""
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
        """Whether this is the process that prints, and writes what is written once."""
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
        """Raise the error of this process, or a `RuntimeError` if another one failed, so that none waits for the others."""
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
    Results of all rows in their order, on every process, each of which works on its own share.

    `work` gets the indices of rows and returns a result for each; it must not wait for other processes. If it fails on
    another process, that is a `RuntimeError` here.
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
