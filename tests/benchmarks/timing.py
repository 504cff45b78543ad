"""
Time of things that are compared: interleaved in one process, medians.

Machines are shared, so that on a CPU it is the time that the process computes, all of its threads together. On a GPU it is the
time on the wall.
"""

import ctypes
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rewarddance_hf.scoring.engine.products import is_slow_otherwise


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """Result and seconds."""
    clock = time.process_time
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        clock = time.perf_counter
    start = clock()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, clock() - start


def interleaved(ways: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, Any], dict[str, float]]:
    """Last results of all ways, and their median seconds."""
    results, seconds = {}, {}
    for _ in range(repeats):
        for name, way in ways.items():
            results[name], taken = timed(way)
            seconds.setdefault(name, []).append(taken)
    return results, {name: statistics.median(values) for name, values in seconds.items()}


def matrix_product_peak(device: str = "cpu", dtype: torch.dtype = torch.float32, size: int = 1024) -> float:
    """Floating-point operations per second of the best of some large matrix products."""
    size *= 8 if device == "cuda" else 1
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    ways = [lambda: a @ b]
    if device == "cpu" and dtype == torch.float32 and is_slow_otherwise():
        ways.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    return 2 * size**3 / min(timed(way)[1] for way in ways for _ in range(5))


def peak_of(function: Callable[..., None], *arguments: Any) -> float:
    """
    Bytes at the peak of a step above those before it, in a fresh process. `function(measure, *arguments)` prepares, and calls
    `measure(step)` once.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_peak, args=(function, arguments, sender))
    process.start()
    sender.close()  # or a process that fails would be waited for
    peak = receiver.recv()
    process.join()
    return peak


def _send_peak(function: Callable[..., None], arguments: tuple[Any, ...], connection: Any) -> None:
    torch.set_num_threads(1)

    def measure(step: Callable[[], Any]) -> None:
        if torch.cuda.is_available():
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step()
            connection.send(torch.cuda.max_memory_allocated() - before)
            return
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far, which a child inherits
        before = _resident("VmRSS")
        step()
        connection.send(_resident("VmHWM") - before)

    function(measure, *arguments)


def _resident(field: str) -> int:
    """Bytes in memory, now or at the peak (Linux only)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))
