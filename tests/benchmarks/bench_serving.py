"""
A judge behind HTTP on the loopback interface, beside the same judge in this process: throughput of 16 clients, time of their
requests, and the memory of a server that is asked for ten times what it can hold.

    python tests/benchmarks/bench_serving.py
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image


CLIENTS = 16
OVERLOAD_CLIENTS, OVERLOAD_SIDE = (12, 60), 1024  # clients of one request each, side of their images
MEMORY_MIB = 128  # that requests of the overloaded server may hold, a tenth of what its clients send


@dataclass(frozen=True)
class Load:
    """What clients ask, and of which judge: the base of the shapes world with 0.4M parameters, or a random one."""

    judge: str
    samples: int  # of a request
    client_samples: int = 32  # of each client in a round
    rounds: int = 7


LOADS = {
    "throughput": Load("0.4m", 16),
    "small_requests": Load("3m", 4, client_samples=8, rounds=3),
    "smallest_judge": Load("0.4m", 4, client_samples=128, rounds=3),
}


def save_judge(folder: Path, judge: str = "0.4m") -> None:
    """Save a judge without training."""
    import judges

    from rewarddance_hf import RewardDanceForYesScoring, RewardDanceScorer
    from rewarddance_hf.shapes.models import BASE_VLM, judge_processor

    if judge == "0.4m":
        model = RewardDanceForYesScoring.from_pretrained(BASE_VLM, paradigm="pairwise")
        processor = judge_processor()
    else:
        model, processor = judges.make_judge(64, "text_first", **judges.tiny_config(judge))
    RewardDanceScorer(model, processor).save_pretrained(folder)


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[tuple[str, int]]:
    """Address and process of `rewarddance serve`."""
    command = [sys.executable, "-m", "rewarddance_hf", "serve", "--model", str(folder), "--port", "0", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            while "http://" not in (line := process.stderr.readline()):
                if not line:
                    raise RuntimeError("The server did not start.")
            threading.Thread(target=process.stderr.read, daemon=True).start()  # its log must not fill the pipe
            yield re.search(r"http://[\d.:]+", line).group(), process.pid
        finally:
            process.terminate()


def peak_memory(process: int) -> int:
    """Bytes that a process has held at most."""
    (line,) = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    return int(line) * 1024


def cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def images(count: int, side: int, seed: int) -> list[Image.Image]:
    generator = np.random.default_rng(seed)
    return [Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


def throughput(load: Load) -> dict[str, float]:
    """Distinct pairs, so that nothing is shared, by 16 clients and in this process by turns: medians over rounds, and extremes."""
    from rewarddance_hf import RemoteReward, RewardDanceScorer

    with tempfile.TemporaryDirectory() as folder:
        save_judge(Path(folder), load.judge)
        scorer = RewardDanceScorer.from_pretrained(folder)
        with serving(Path(folder)) as (url, process), ThreadPoolExecutor(CLIENTS) as threads:
            remotes = [RemoteReward(url) for _ in range(CLIENTS)]
            throughputs, cpu_ratios, rates = list[float](), list[float](), list[float]()
            latencies: list[float] = []
            lost = 0
            for turn in range(load.rounds + 1):  # the first warms up
                size = CLIENTS * load.client_samples
                samples, references = images(size, 32, 2 * turn), images(size, 32, 2 * turn + 1)
                start, cpu = time.perf_counter(), time.process_time()
                wanted = scorer.score(samples, "a circle", references)
                here, here_cpu = time.perf_counter() - start, time.process_time() - cpu

                def ask(client: int, samples=samples, references=references) -> list[torch.Tensor]:
                    found = []
                    for request in range(load.client_samples // load.samples):
                        first = client * load.client_samples + request * load.samples
                        part = slice(first, first + load.samples)
                        began = time.perf_counter()
                        found.append(remotes[client].score(samples[part], "a circle", references[part]))
                        latencies.append(time.perf_counter() - began)
                    return found

                start, cpu = time.perf_counter(), cpu_seconds(process)
                found = torch.cat([part for parts in threads.map(ask, range(CLIENTS)) for part in parts])
                served, served_cpu = time.perf_counter() - start, cpu_seconds(process) - cpu
                lost += int((~torch.isclose(found, wanted, rtol=0, atol=1e-5)).sum())
                if turn:
                    throughputs.append(here / served)
                    cpu_ratios.append(served_cpu / here_cpu)
                    rates.append(size / served)
                else:
                    latencies.clear()
    p50, p99 = np.quantile(latencies, [0.5, 0.99]).tolist()
    return {
        "throughput_over_in_process": statistics.median(throughputs),
        "lowest_throughput_over_in_process": min(throughputs),
        "highest_throughput_over_in_process": max(throughputs),
        "server_cpu_over_in_process": statistics.median(cpu_ratios),
        "pairs_per_second": statistics.median(rates),
        "p50_seconds": p50,
        "p99_seconds": p99,
        "lost": float(lost),
    }


def overload() -> dict[str, float]:
    """More than a server may hold at once, twice and ten times: all is answered in the end, and its memory is the same."""
    from rewarddance_hf import RemoteReward

    sample, reference = torch.rand(2, 1, 3, OVERLOAD_SIDE, OVERLOAD_SIDE, generator=torch.Generator().manual_seed(0))
    peaks, lost = [], 0
    with tempfile.TemporaryDirectory() as folder:
        save_judge(Path(folder))
        options = ("--max-memory-bytes", str(MEMORY_MIB), "--max-body-bytes", str(MEMORY_MIB // 4))
        with serving(Path(folder), *options) as (url, process):
            remote = RemoteReward(url, max_wait=600)
            first = remote.score(sample, "a circle", reference)

            def ask(_: int) -> bool:
                return torch.allclose(remote.score(sample, "a circle", reference), first, rtol=0, atol=1e-5)

            for count in OVERLOAD_CLIENTS:
                with ThreadPoolExecutor(count) as threads:
                    answers = list(threads.map(ask, range(count)))
                peaks.append(peak_memory(process))
                lost += len(answers) - sum(answers)
            text = remote._transport._client.get(f"{url}/metrics").text
            refused = re.findall(r'requests_total\{path="score",status="429"\} ([\d.]+)', text)
    # Of two images in 8 bits: three copies of the body, and what is decoded
    sent = OVERLOAD_CLIENTS[-1] * 8 * sample.numel()
    return {
        "asked_over_bound": sent / (MEMORY_MIB << 20),
        "peak_memory_over_twice_asked": peaks[-1] / peaks[0],
        "refused_for_a_while": float(refused[0]) if refused else 0.0,
        "lost": float(lost),
    }


def measurements(is_full: bool = False) -> dict[str, Callable[[], dict[str, float]]]:
    """All measurements by name."""
    return {**{name: partial(throughput, load) for name, load in LOADS.items()}, "overload": overload}


def main() -> None:
    torch.set_num_threads(1)
    for name, measure in measurements().items():
        for key, value in measure().items():
            sys.stdout.write(f"{name}/{key:30} {value:10.4f}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
