"""Jobs of the study: each writes one JSON file, and is not done again as long as that file fits its settings."""

import importlib
import json
import platform
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rewarddance_hf import __version__
from rewarddance_hf.resumable import digest_of, write_atomically
from rewarddance_hf.shapes.stages import Stage


RESULT_FILE = "result.json"


@dataclass(frozen=True)
class Job:
    """
    A function with its settings.

    Args:
        name (`str`):
            Its folder, below that of the study; equal names are the same job.
        function (`str`):
            Module and name, e.g. `"judges:train_and_measure"`. It is called with the folder, the folders of the jobs that it
            needs, `report`, and the settings; what it returns is written as JSON.
        settings (`dict`):
            Arguments.
        needs (`tuple[Job, ...]`, *optional*):
            Jobs that must be done before.
        cost (`float`, *optional*, defaults to 60):
            About how many seconds of a core it takes.
        inputs (`tuple[str, ...]`, *optional*):
            Files whose contents its result depends on.
    """

    name: str
    function: str
    settings: dict[str, Any]
    needs: tuple["Job", ...] = ()
    cost: float = 60.0
    inputs: tuple[str, ...] = field(default=(), compare=False)

    def fingerprint(self) -> str:
        """
        Digest of what its result depends on: version, settings, contents of its input files, wherever these are, and what it needs.
        """
        contents = [digest_of(Path(file).read_bytes().hex()) for file in self.inputs]
        folders = [str(folder) for file in self.inputs for folder in Path(file).parents]
        settings = json.dumps(
            {name: value for name, value in self.settings.items() if value not in folders}, sort_keys=True
        )
        return digest_of(__version__, self.function, settings, *contents, *(need.fingerprint() for need in self.needs))

    def result(self, folder: Path) -> dict[str, Any] | None:
        """What it has written, or None if it is not done with these settings."""
        file = folder / self.name / RESULT_FILE
        if not file.is_file():
            return None
        result = json.loads(file.read_text(encoding="utf-8"))
        return result if result["fingerprint"] == self.fingerprint() else None


def with_needs(jobs: Sequence[Job]) -> dict[str, Job]:
    """Jobs and all that they need, by name, each after what it needs."""
    found: dict[str, Job] = {}

    def add(job: Job) -> None:
        for need in job.needs:
            add(need)
        known = found.setdefault(job.name, job)
        if (known.function, known.settings) != (job.function, job.settings):
            raise ValueError(f"Two jobs are named {job.name!r}, but have different settings. Name them apart.")

    for job in jobs:
        add(job)
    return found


def stages_of(jobs: Mapping[str, Job], folder: Path) -> dict[str, Stage]:
    """Stages that do what is not done yet, of jobs that each come after what they need."""
    left: dict[str, Job] = {}
    for name, job in reversed(jobs.items()):
        result, is_needed = job.result(folder), any(job in later.needs for later in left.values())
        if result is None or (is_needed and result.get("is_taken")):
            left[name] = job
    stages = {}
    for name, job in reversed(left.items()):
        needs = [str(folder / need.name) for need in job.needs]
        arguments = (str(folder / name), job.function, job.settings, job.fingerprint(), needs)
        after = tuple(_stage_name(need.name) for need in job.needs if need.name in left)
        stages[_stage_name(name)] = Stage(name, f"{__name__}:run", arguments, after, cost=job.cost)
    return stages


def _stage_name(name: str) -> str:
    return name.replace("/", "_")  # it names a file of the log


def run(
    folder: str, function: str, settings: dict[str, Any], fingerprint: str, needs: list[str], *, report: Any
) -> None:
    """Do a job, and write its result."""
    start = time.perf_counter(), time.process_time()
    module, name = function.split(":")
    Path(folder).mkdir(parents=True, exist_ok=True)
    metrics = getattr(importlib.import_module(module), name)(folder, *needs, report=report, **settings)
    result = {
        "fingerprint": fingerprint,
        "settings": settings,
        "seconds": time.perf_counter() - start[0],
        "processor_seconds": time.process_time() - start[1],
        "measured_on": _machine(),
        "metrics": metrics,
    }
    write_atomically(Path(folder) / RESULT_FILE, (json.dumps(result, indent=1) + "\n").encode())


def _machine() -> str:
    import torch  # which the display does without

    try:
        model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        model = None
    name = model[1].strip() if model else platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}), torch {torch.__version__.partition('+')[0]}"
