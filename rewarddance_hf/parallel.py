"""Work on rows, split over processes: no communication while rows are worked on, results in order, failures raised
together."""

import atexit
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch

from .import_utils import require_extra


T = TypeVar("T")

# How long processes wait for each other where one may work for hours longer than another. By default they give up after ten
# minutes or half an hour.
PATIENCE = timedelta(days=30)
_patient_groups: dict[Any, Any] = {}  # by the group of all processes, of which a program may make a new one


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as `accelerate launch` or `torchrun` started them; one if nothing did."""

    index: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> "Processes":
        """
        The processes of this run, connected if they are not yet.

        Raises:
            `RuntimeError`: If each of several processes takes itself for the only one, because accelerate finds no GPU.
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
        if "LOCAL_RANK" in os.environ and state.num_processes == 1:
            raise RuntimeError(
                f"{os.environ['WORLD_SIZE']} processes were launched, but each takes itself for the only one: accelerate finds no GPU, "
                "and was not told to use the CPU. Set `ACCELERATE_USE_CPU=true` (for trainers `--use_cpu true`), or launch one."
            )
        return cls(state.process_index, state.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints, and writes what is written once."""
        return self.index == 0

    def rows(self, num_rows: int) -> range:
        """Indices of the rows that this process works on: every `count`-th one."""
        return range(self.index, num_rows, self.count)

    def gather(self, values: list[T], group: Any = None) -> list[T]:
        """Values of all processes, in the order of processes, on each. They are pickled on the way."""
        if self.count == 1:
            return values
        if group is not None:
            found: list[Any] = [None] * self.count
            torch.distributed.all_gather_object(found, values, group=group)
            return [value for part in found for value in part]
        from accelerate.utils import gather_object

        return gather_object(values)

    def patient_group(self) -> Any:
        """
        Group for [`~Processes.gather`] in which processes wait for each other for as long as it takes, or None for a single one.
        All must ask for it at about the same time, before the work that takes long.
        """
        if self.count == 1:
            return None
        world = torch.distributed.group.WORLD
        if world not in _patient_groups:
            _patient_groups[world] = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
        return _patient_groups[world]

    def raise_together(self, error: BaseException | None, group: Any = None) -> None:
        """Raise the error of this process, or a `RuntimeError` if another one failed, so that none waits for the others."""
        message = None if error is None else f"{type(error).__name__}: {error}"
        failed = [found for found in self.gather([message], group) if found]
        if error is not None:
            raise error
        if failed:
            raise RuntimeError(f"{len(failed)} of {self.count} processes failed, the first with {failed[0]}")

    def wait(self, group: Any = None) -> None:
        """Wait until all processes are here."""
        self.gather([None], group)


def own_device() -> torch.device:
    """Where this process computes: of several on one machine, each has a GPU of its own. The CPU if there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def run_split(work: Callable[[Sequence[int]], Sequence[T]], num_rows: int) -> list[T]:
    """
    Results of all rows in their order, on every process, each of which works on its own share.

    `work` gets the indices of rows and returns a result for each; it must not wait for other processes. If it fails on
    another process, that is a `RuntimeError` here. Those that are done wait for the others, however long it takes.
    """
    processes = Processes.current()
    group = processes.patient_group()
    mine = processes.rows(num_rows)
    found: list[tuple[int, T]] = []
    error: BaseException | None = None
    try:
        found = list(zip(mine, work(mine) if mine else [], strict=True))
    except Exception as raised:
        error = raised
    processes.raise_together(error, group)
    results: dict[int, Any] = dict(processes.gather(found, group))
    return [results[row] for row in range(num_rows)]
