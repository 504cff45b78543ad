"""
Stages of a long run in processes side by side: what each needs first, how far it is, one display of all, a log for each.

Nothing heavy is imported here: the processes import what they need, once for all of them, while the display is there already.
"""

import contextlib
import importlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TextIO

from .display import Display


Report = Callable[[int, int], None]  # what is done, and of how much


NUM_PROCESSES = 2
LINES_SHOWN = 12  # of the log of a stage that failed


@dataclass(frozen=True)
class Stage:
    """
    A function that runs in a process of its own, with the keyword argument `report`, a [`Report`].

    Args:
        title (`str`):
            What it does, in words.
        function (`str`):
            Its module and name, e.g. `"package.module:function"`.
        arguments (`tuple`, *optional*):
            Its arguments, which are pickled.
        after (`tuple[str, ...]`, *optional*):
            Names of the stages that must have ended before.
        can_wait (`bool`, *optional*, defaults to `False`):
            Whether it leaves processor time, and its turn, to stages that cannot wait.
        cost (`float`, *optional*, defaults to 0):
            How long it takes, compared with others. What is left is told by it, if any is given.
    """

    title: str
    function: str
    arguments: tuple[Any, ...] = ()
    after: tuple[str, ...] = ()
    can_wait: bool = False
    cost: float = 0.0


def run_stages(
    stages: Mapping[str, Stage], log_dir: Path, preload: Sequence[str] = (), stream: TextIO | None = None
) -> None:
    """
    Run stages by name, two at a time, earlier ones first; raises a `RuntimeError` if one fails, and ends the others. Those
    that can wait are not counted by those that cannot, which run beside them and come first.

    What they write goes to `log_dir`, and how far they are to `stream` (by default the standard output): a live display in a
    terminal, else a line for each event. `preload` are modules that are imported once for all.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    can_fork = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if can_fork else "spawn")
    if can_fork:
        from multiprocessing import forkserver

        context.set_forkserver_preload(list(preload))
        with _output_in(log_dir / "start.txt"), _own_modules():  # libraries write when they are imported
            forkserver.ensure_running()
    with Display(stream or sys.stdout, {name: stage.cost for name, stage in stages.items()}) as display:
        running: dict[str, tuple[Any, Connection, float]] = {}
        done: set[str] = set()
        try:
            while len(done) < len(stages):
                for name, stage in stages.items():
                    is_ready = name not in done and name not in running and done.issuperset(stage.after)
                    beside = [other for other in running if stage.can_wait or not stages[other].can_wait]
                    if is_ready and len(beside) < NUM_PROCESSES:
                        receiver, sender = context.Pipe(duplex=False)
                        log = str(log_dir / f"{name}.txt")
                        call = (stage.function, stage.arguments, log, sender, stage.can_wait)
                        process = context.Process(target=_run, args=call)
                        display.start(name, stage.title)
                        running[name] = (process, receiver, time.monotonic())
                        process.start()  # the first one waits for what is preloaded
                        sender.close()
                for ready in wait([receiver for _, receiver, _ in running.values()]):
                    name = next(name for name, (_, receiver, _) in running.items() if receiver is ready)
                    process, receiver, started = running[name]
                    try:
                        display.show(name, *receiver.recv())
                    except EOFError:
                        process.join()
                        del running[name]
                        if process.exitcode != 0:
                            raise _failure(stages[name].title, log_dir / f"{name}.txt", process.exitcode) from None
                        done.add(name)
                        display.finish(name, time.monotonic() - started)
        finally:
            for process, _, _ in running.values():
                if process.pid is not None:
                    process.terminate()
                    process.join()


def _run(function: str, arguments: tuple[Any, ...], log: str, sender: Connection, can_wait: bool) -> None:
    """Call a function in this process, with its output in a file."""
    if can_wait and hasattr(os, "nice"):
        os.nice(10)
    with open(log, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    module, name = function.split(":")
    prepare_process()
    getattr(importlib.import_module(module), name)(*arguments, report=lambda done, total: sender.send((done, total)))
    sys.stdout.write(f"\n{sum(os.times()[:2]):.1f} s of processor time\n")


def no_report(done: int, total: int) -> None:
    """Tell nobody how far it is."""


def prepare_process() -> None:
    """Settings of a process that computes beside others."""
    import torch

    torch.set_num_threads(1)
    # Numbers too small for the usual form, which backward passes are full of, cost many times the time of others.
    torch.set_flush_denormal(True)
    if "fork" in multiprocessing.get_all_start_methods():  # for workers of data loaders, which share what is imported
        multiprocessing.set_start_method("fork", force=True)


def _failure(title: str, log: Path, code: int) -> RuntimeError:
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").strip().splitlines()
    end = "\n".join(f"    {line[:200]}" for line in lines[-LINES_SHOWN:])
    return RuntimeError(
        f"'{title}' failed (exit code {code}). What the stages before have written is kept. The end of {log}:\n{end}"
    )


@contextlib.contextmanager
def _own_modules() -> Iterator[None]:
    """
    Processes that are started meanwhile find the modules beside a script from the start. Without this, Python 3.11 looks for those to
    preload before it knows of them, and says nothing.
    """
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    try:
        yield
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


@contextlib.contextmanager
def _output_in(file: Path) -> Iterator[None]:
    """Processes that are started meanwhile write to a file. This one should not write."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(descriptor) for descriptor in (1, 2)]
    try:
        with open(file, "w", encoding="utf-8") as opened:
            os.dup2(opened.fileno(), 1)
            os.dup2(opened.fileno(), 2)
        yield
    finally:
        for descriptor, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, descriptor)
            os.close(copy)
